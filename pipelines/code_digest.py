"""A hash of the sources that a stage can reach by imports: part of the key of its cached result.

The closure is computed from the syntax trees of our own packages, lazy imports included, and never listed by hand.
A stage that asks for an environment reaches every installed family, since those are plug-ins and not imports.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "model", "components", "pipelines")
PLUGIN_LOADER, PLUGIN_GROUP = "components.environments.protocol", "sparseline.environments"
MODULE_NAME = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+")
DATA_SUFFIXES = (".yaml", ".json", ".jinja", ".html", ".css")


def module_path(module: str, root: Path) -> Path | None:
    """The source file of `module` below `root`, or None when it is no module of ours."""
    if module.split(".", 1)[0] not in PACKAGES:
        return None
    base = root / module.replace(".", "/")
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def imports(source_text: str, package: str) -> frozenset[str]:
    """Every module name that import statements mention, wherever they stand. `package`: what relative ones start at."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source_text)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*parents, *([source] if source else [])])
            names.add(source)
            names.update(f"{source}.{alias.name}" for alias in node.names)
    return frozenset(names)


@cache
def named(source_text: str) -> frozenset[str]:
    """Module names that stand in strings, as in `[sys.executable, "-m", "components.serving"]`."""
    texts = (node.value for node in ast.walk(ast.parse(source_text)) if isinstance(node, ast.Constant))
    return frozenset(text for text in texts if isinstance(text, str) and MODULE_NAME.fullmatch(text))


def closure(modules: Iterable[str], root: Path = ROOT) -> tuple[dict[str, Path], set[str]]:
    """Our modules that `modules` reach, with their files, and the names of other top-level packages that they import.

    Raises ValueError when a starting module does not exist.
    """
    found: dict[str, Path] = {}
    others: set[str] = set()
    waiting = list(modules)
    for start in waiting:
        if module_path(start, root) is None:
            raise ValueError(f"no source of the module {start} below {root}")
    while waiting:
        name = waiting.pop()
        path = module_path(name, root)
        if path is None:
            if name:
                others.add(name.split(".", 1)[0])
            continue
        if name in found:
            continue
        found[name] = path
        text = path.read_text()
        waiting.extend(imports(text, name if path.name == "__init__.py" else name.rpartition(".")[0]))
        # A program that is started as a process of its own is reached, too.
        waiting.extend(started for other in named(text) for started in (other, f"{other}.__main__"))
        if "." in name:  # importing a.b.c runs a/__init__.py and a/b/__init__.py too
            parent = name.rpartition(".")[0]
            if module_path(parent, root) is not None:
                waiting.append(parent)
        if name == PLUGIN_LOADER:
            waiting.extend(entry.module for entry in entry_points(group=PLUGIN_GROUP))
    return found, others - set(PACKAGES) - set(sys.stdlib_module_names)


def data_beside(folder: Path) -> list[Path]:
    """Data files in a package's folder, and in its subfolders that hold data only."""
    found = [path for path in folder.iterdir() if path.suffix in DATA_SUFFIXES]
    for inner in folder.iterdir():
        if inner.is_dir() and inner.name != "__pycache__" and not any(inner.glob("*.py")):
            found.extend(path for path in inner.rglob("*") if path.suffix in DATA_SUFFIXES)
    return found


def code_digest(modules: Iterable[str], root: Path = ROOT) -> str:
    """sha256 of every source (and data file beside it) that `modules` reach, and of the versions of what they import.

    Same sources in another folder give the same digest.
    """
    found, others = closure(modules, root)
    files = set(found.values())
    for folder in {path.parent for path in files}:
        files.update(data_beside(folder))
    content = hashlib.sha256(f"python {sys.version_info.major}.{sys.version_info.minor}\n".encode())
    for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
        data = path.read_bytes()
        content.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode())
        content.update(data)
    for package in sorted(others):
        try:
            content.update(f"{package} {version(package)}\n".encode())
        except PackageNotFoundError:  # imported under another name than it is distributed by, or optional
            content.update(f"{package}\n".encode())
    return content.hexdigest()
