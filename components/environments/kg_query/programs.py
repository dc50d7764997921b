"""Programs: what a task asks, apart from its wording and its facts. A template of `kg_query` is the name of a program.

`works_in/part_of/offices/count`: from the start entity follow works_in, then part_of, then count the offices. All hops
but the last are functional; the last is functional with operator `name`, or many-valued with `count` or `list`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from components.environments.kg_query.graph import RELATIONS, Graph

OPERATORS = ("name", "count", "list")
PAGE_SIZE = 3
MOST_STANDARD_HOPS = 3
WORDINGS = (
    "from {start} follow {path} give {operator}",
    "start at {start} take {path} and give {operator}",
    "give {operator} of {path} from {start}",
)


@dataclass(frozen=True)
class Program:
    relations: tuple[str, ...]
    operator: str

    @property
    def template(self) -> str:
        return "/".join([*self.relations, self.operator])

    @property
    def domain(self) -> str:
        """Type of the start entity."""
        return RELATIONS[self.relations[0]].domain

    @property
    def range(self) -> str:
        """Type of the entities that the last hop gives."""
        return RELATIONS[self.relations[-1]].range


def parse_program(template: str) -> Program:
    """The program that `template` names. ValueError when it is not well typed."""
    *relations, operator = template.split("/")
    unknown = [name for name in relations if name not in RELATIONS]
    if not relations or unknown or operator not in OPERATORS:
        raise ValueError(
            f"kg_query template {template!r}: expected relation/.../operator, unknown: {unknown or operator}"
        )
    program = Program(tuple(relations), operator)
    steps = [RELATIONS[name] for name in relations]
    for here, there in pairwise(steps):
        if not here.functional or here.range != there.domain:
            raise ValueError(f"kg_query template {template!r}: {there.name} cannot follow {here.name}")
    if steps[-1].functional != (operator == "name"):
        raise ValueError(f"kg_query template {template!r}: {operator} does not fit the last relation {steps[-1].name}")
    return program


def programs(hops: int) -> list[Program]:
    """All programs of `hops` hops that use no relation twice, in a fixed order."""
    paths: list[tuple[str, ...]] = [()]
    for hop in range(hops):
        last = hop == hops - 1
        paths = [
            (*path, relation.name)
            for path in paths
            for relation in RELATIONS.values()
            if relation.name not in path
            and (not path or RELATIONS[path[-1]].range == relation.domain)
            and (last or relation.functional)
        ]
    return [
        Program(path, operator)
        for path in paths
        for operator in (("name",) if RELATIONS[path[-1]].functional else ("count", "list"))
    ]


def long_programs(number: int = 24) -> list[Program]:
    """A fixed sample of programs of 11 and 12 hops that end in a many-valued relation: evaluation only."""
    rng = random.Random("kg_query long programs")
    found: dict[str, Program] = {}
    while len(found) < number:
        path: list[str] = []
        hops = rng.choice((11, 12))
        while len(path) < hops:
            last = len(path) == hops - 1
            fitting = [
                relation.name
                for relation in RELATIONS.values()
                if relation.name not in path
                and relation.functional != last
                and (not path or RELATIONS[path[-1]].range == relation.domain)
            ]
            if not fitting:
                break  # every relation of this type is used up: start again
            path.append(rng.choice(fitting))
        if len(path) == hops:
            program = Program(tuple(path), rng.choice(("count", "list")))
            found[program.template] = program
    return [found[template] for template in sorted(found)]


def wording(program: Program, start: str, index: int) -> str:
    """The user's message: one of a few paraphrases of the program."""
    return WORDINGS[index].format(start=start, path=" then ".join(program.relations), operator=program.operator)


def pages(objects: tuple[str, ...]) -> list[tuple[str, ...]]:
    """What the tool shows page by page; one empty page when there are no objects."""
    return [objects[at : at + PAGE_SIZE] for at in range(0, len(objects), PAGE_SIZE)] or [()]


@dataclass(frozen=True)
class Solution:
    """What the reference solver found: the pages that have to be read, as (entity, relation, page), and the objects."""

    lookups: tuple[tuple[str, str, int], ...]
    objects: tuple[str, ...]
    answer: tuple[str, ...]


def solve(graph: Graph, program: Program, start: str) -> Solution:
    """Run the program on the graph: the answer in words, and the look-ups that any player needs to know it."""
    lookups = []
    at = start
    for relation in program.relations[:-1]:
        lookups.append((at, relation, 1))
        (at,) = graph.objects(at, relation)
    objects = graph.objects(at, program.relations[-1])
    lookups += [(at, program.relations[-1], page) for page in range(1, len(pages(objects)) + 1)]
    answer = (str(len(objects)),) if program.operator == "count" else objects
    return Solution(tuple(lookups), objects, answer)
