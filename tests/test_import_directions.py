"""pipelines -> components -> model -> kernels, and inside components: stages -> rollouts -> environments -> runtime."""

import sys
from pathlib import Path

import pytest

from pipelines.code_digest import PACKAGES, ROOT, imports

# What the modules below a prefix may import of ours; the longest prefix that fits a module counts.
STAGES = ("synthesis", "pretraining", "post_training", "evaluation", "serving")
BELOW_STAGES = ("components.rollouts", "components.environments", "components.runtime", "model", "kernels")
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": ("kernels",),
    "model": ("model", "kernels"),
    # Scripts of the image builds, beside the Containerfile that runs them: the standard library only.
    "components.pin": (),
    "components.requirements": (),
    "components.runtime": ("components.runtime",),
    "components.environments": ("components.environments", "components.runtime"),
    "components.rollouts": BELOW_STAGES,
    **{f"components.{stage}": (f"components.{stage}", *BELOW_STAGES) for stage in STAGES},
    # Synthesis plays scripted players: no model, so its cached result outlives every change of the model.
    "components.synthesis": ("components.synthesis", "components.environments", "components.runtime"),
    "pipelines": ("pipelines", "components"),
}
MODEL_MAY_NEED = {"torch", "triton", "numpy", "pydantic", "safetensors", "tokenizers"}


def sources() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()


def reached(module: str, path: Path) -> set[str]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return set(imports(path.read_text(), package))


def room(module: str) -> str | None:
    fitting = [prefix for prefix in ALLOWED if module == prefix or module.startswith(prefix + ".")]
    return max(fitting, key=len) if fitting else None


def fits(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def test_every_module_lies_in_a_room():
    assert len(SOURCES) > 50
    assert [module for module in SOURCES if room(module) is None and module != "components"] == []


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_nothing_imports_to_its_left(module):
    if module == "components":
        return
    ours = {name for name in reached(module, SOURCES[module]) if name.split(".")[0] in PACKAGES}
    # `from components import x` mentions the bare package, too; what it names counts.
    wrong = {name for name in ours if name not in ("components",) and not fits(name, ALLOWED[room(module) or ""])}
    assert not wrong, f"{module} may import {ALLOWED[room(module) or '']} only, but imports {sorted(wrong)}"


@pytest.mark.parametrize("module", [name for name in SOURCES if name.split(".")[0] in ("model", "kernels")])
def test_model_and_kernels_need_little(module):

    others = {name.split(".")[0] for name in reached(module, SOURCES[module])} - set(PACKAGES) - {""}
    # the benchmarks' plots are drawn where matplotlib is installed
    may = MODEL_MAY_NEED | ({"matplotlib"} if module.startswith("kernels.benchmarks") else set())
    wrong = {name for name in others if name not in sys.stdlib_module_names and name not in may}
    assert not wrong, f"{module} imports {sorted(wrong)}; {sorted(MODEL_MAY_NEED)} is all it may"


def test_only_the_object_store_speaks_s3():
    speakers = {
        module for module, path in SOURCES.items() if "minio" in {n.split(".")[0] for n in reached(module, path)}
    }
    assert speakers == {"components.runtime.object_store"}


def test_stages_run_without_kfp():
    """KFP is imported by component.py alone, at the left end of the house: images and stages by hand do without."""
    users = {
        module
        for module, path in SOURCES.items()
        if module.startswith("components.")
        and "kfp" in {name.split(".")[0] for name in reached(module, path)}
        and not module.endswith(".component")
    }
    assert users == set()


def test_the_import_reader_sees_lazy_and_relative_imports():
    text = "def f():\n    from model import x\n    import kernels.topk\nfrom . import a\nfrom ..b import c\n"
    assert imports(text, "components.runtime") == {
        "model", "model.x", "kernels.topk", "components.runtime", "components.runtime.a",
        "components.b", "components.b.c",
    }  # fmt: skip
