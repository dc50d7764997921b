"""Programs: which types are walked through, and at which steps a deprecated function lies in the way.

`raw/table/chart/10`: from a raw value to a chart by way of a table; the first step has a deprecated function.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

from components.environments.internal_api.library import TYPES

MOST_HOPS = 2
PATHS = {1: 40, 2: 40, 4: 6}  # hops -> how many of all paths are templates


@dataclass(frozen=True)
class Program:
    path: tuple[str, ...]
    traps: str

    @property
    def template(self) -> str:
        return "/".join([*self.path, self.traps])

    @property
    def release(self) -> str:
        """What the user calls the library: the second release deprecates a function at every step."""
        return "v2" if "0" not in self.traps else "v1"


@lru_cache(maxsize=8)
def programs(hops: int) -> tuple[Program, ...]:
    """All programs of so many hops, in a fixed order."""
    paths = sorted(random.Random(f"internal_api/{hops}").sample(list(permutations(TYPES, hops + 1)), PATHS[hops]))
    return tuple(Program(path, "".join(traps)) for path in paths for traps in product("01", repeat=hops))


def parse_program(template: str) -> Program:
    """The program that `template` names. Raises ValueError when there is none."""
    *path, traps = template.split("/")
    program = Program(tuple(path), traps)
    if len(path) - 1 not in PATHS or program not in programs(len(path) - 1):
        raise ValueError(f"internal_api template {template!r}: expected type/type/.../traps")
    return program


def code_words(functions: list[str], value: int) -> str:
    """The program that applies the functions in turn, as words."""
    argument, lines = str(value), []
    for name in functions:
        lines.append(f"x = {name} ( {argument} ) ;")
        argument = "x"
    return " ".join([*lines, "print ( x )"])
