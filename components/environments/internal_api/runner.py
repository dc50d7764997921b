"""Runs a program that was written as words, and reads which functions it calls. A model's program runs in the sandbox;
one of the scripted players, which this package wrote, may run in this process."""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import Any

from components.environments.internal_api.library import MODULE
from components.environments.sandbox import Sandbox, SandboxLimits
from components.environments.words import NUMBERS

_SANDBOX = Sandbox(SandboxLimits(wall_seconds=2.0, cpu_seconds=1, memory_bytes=128 << 20, output_bytes=1 << 10))


def source_of(program: str) -> str:
    """Words -> Python: a line for each `;`."""
    return "\n".join(line.strip() for line in program.split(";"))


def run_program(library: str, program: str) -> str:
    """What the program prints, in words: a number, or `error program`, `error output`, `error time`."""
    try:
        return _run_once(library, program)
    except TimeoutError:
        return "error time"


@lru_cache(maxsize=20_000)
def _run_once(library: str, program: str) -> str:
    """As `run_program`. Programs and libraries are deterministic, so the same pair is run once.

    Raises TimeoutError when the wall clock ended the program: the machine may have been busy, so that is not kept.
    """
    try:
        ast.parse(source_of(program))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "error program"  # what the sandbox would say of it
    result = _SANDBOX.run(f"from {MODULE} import *\n{source_of(program)}", {f"{MODULE}.py": library})
    if result.ended == "fault":
        raise RuntimeError(f"the sandbox failed: {result.output}")
    if result.ended == "time":
        raise TimeoutError
    if not result.ok:
        return "error time" if result.ended == "cpu" else "error program"
    return _said(result.output)


def run_trusted(library: str, program: str) -> str:
    """As `run_program`, in this process: a hundred times as fast, and nothing is kept from doing harm.

    For straight-line programs of the scripted players (`programs.code_words`), never for one that a model wrote.
    """
    printed: list[str] = []
    names = {**_public_names(library), "print": lambda *values: printed.append(" ".join(map(str, values)))}
    try:
        exec(compile(source_of(program), "program", "exec"), names)
    except Exception:
        return "error program"
    return _said("\n".join(printed))


@lru_cache(maxsize=512)
def _public_names(library: str) -> dict[str, Any]:
    """What `from library import *` would give."""
    names: dict[str, Any] = {}
    exec(compile(library, MODULE, "exec"), names)
    return {name: value for name, value in names.items() if not name.startswith("_")}


def _said(output: str) -> str:
    words = output.split()
    return words[0] if len(words) == 1 and words[0] in NUMBERS else "error output"


def called(program: str) -> list[str]:
    """Names of the functions that the program calls, but print, in the order of the calls; [] for no valid Python."""
    try:
        tree = ast.parse(source_of(program))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    names: list[str] = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            visit(child)
        if isinstance(node, ast.Call):
            names.append(node.func.id if isinstance(node.func, ast.Name) else "?")

    visit(tree)
    return [name for name in names if name != "print"]
