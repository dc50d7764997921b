"""A fictional library, drawn from a seed: a Python module with documentation, distractors and deprecated functions.

Each function takes a value of one type and gives one of another. A deprecated function does what its replacement does,
but wrongly: only its documentation tells.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from components.runtime.contracts import digest

TYPES = ("raw", "table", "chart", "memo", "index", "model", "score", "draft")
NAMES = (
    *("load", "parse", "clean", "merge", "render", "export", "pack", "split", "join", "fold", "sort", "trim"),
    *("lift", "bind", "cast", "wrap", "seal", "tune", "mark", "link", "draw", "stack", "shift", "blend"),
)
MODULE = "library"


@dataclass(frozen=True)
class Function:
    """value -> (factor * value + offset) % 100. `replacement` is the name of what to use instead, where deprecated."""

    name: str
    takes: str
    gives: str
    factor: int
    offset: int
    replacement: str = ""

    def __call__(self, value: int) -> int:
        return (self.factor * value + self.offset) % 100

    @property
    def documentation(self) -> str:
        if self.replacement:
            return f"deprecated use {self.replacement}"
        return f"takes {self.takes} gives {self.gives}"


@dataclass(frozen=True)
class Library:
    """functions by name; shelf[type]: names of those that take it, in the order in which a search lists them."""

    functions: dict[str, Function]
    shelf: dict[str, tuple[str, ...]]
    start: str  # the type of the value that a program begins with

    @cached_property
    def source(self) -> str:
        """The module, as it lies beside a program in the sandbox."""
        lines = [_HEAD]
        for one in self.functions.values():
            lines.append(
                f"def {one.name}(value):\n"
                f'    """{one.documentation}"""\n'
                f"    return _step(value, {one.takes!r}, {one.gives!r}, {one.factor}, {one.offset})\n"
            )
        return "\n".join(lines) + f"\n_START = {self.start!r}\n"

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the module and of what a search lists."""
        return digest([self.source, self.shelf])


_HEAD = """class Value:
    def __init__(self, kind, number):
        self.kind, self.number = kind, number

    def __repr__(self):
        return str(self.number)


def _step(value, takes, gives, factor, offset):
    if isinstance(value, int):
        value = Value(_START, value)
    if not isinstance(value, Value) or value.kind != takes:
        raise TypeError(f"a {takes} is needed")
    return Value(gives, (factor * value.number + offset) % 100)

"""


@lru_cache(maxsize=512)
def build_library(seed: int, path: tuple[str, ...], traps: str) -> Library:
    """The library of `seed` in which `path` can be walked; traps[i] is 1 where step i has a deprecated function."""
    rng = random.Random(f"internal_api/{seed}/{'/'.join(path)}/{traps}")
    names = iter(rng.sample(NAMES, len(NAMES)))
    functions: dict[str, Function] = {}
    shelf = {}

    def add(takes: str, gives: str) -> Function:
        made = Function(next(names), takes, gives, rng.choice((3, 7, 9, 11, 13)), rng.randrange(1, 100))
        functions[made.name] = made
        return made

    for step, (takes, gives) in enumerate(pairwise(path)):
        right = add(takes, gives)
        other = add(takes, rng.choice([kind for kind in TYPES if kind not in (takes, gives)]))
        listed = [right.name, other.name]
        rng.shuffle(listed)
        if traps[step] == "1":
            # the same but for the offset: its result is always another
            name = next(names)
            wrong = (right.offset + rng.randrange(1, 100)) % 100
            functions[name] = Function(name, takes, gives, right.factor, wrong, right.name)
            listed.insert(0, name)
        shelf[takes] = tuple(listed)
    return Library(functions, shelf, path[0])


def chain(library: Library, path: Sequence[str]) -> list[Function]:
    """The documented, not deprecated functions that walk `path`."""
    return [
        next(f for f in library.functions.values() if (f.takes, f.gives) == step and not f.replacement)
        for step in pairwise(path)
    ]
