"""Programs of a compiled environment: where to start, how many relations to follow, what to give.

`env017/find/2/count`: in environment 17, find the start by its code, follow two relations, count the list at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from components.environments.grammar.definitions import Definition, compile_environment, parameters_of
from components.environments.grammar.world import World
from components.environments.scripted import Lookup

MOST_HOPS = 3


@dataclass(frozen=True)
class Program:
    environment: int
    start: str  # "from" a named entity, or "find" it by its code
    hops: int  # functional relations to follow
    operator: str  # name, count or list

    @property
    def template(self) -> str:
        return f"env{self.environment:03d}/{self.start}/{self.hops}/{self.operator}"


def parse_program(template: str) -> Program:
    """The program that `template` names. Raises ValueError when there is none."""
    parts = template.split("/")
    if len(parts) != 4 or not parts[0].startswith("env") or not (parts[0][3:] + parts[2]).isdigit():
        raise ValueError(f"compiled template {template!r}: expected envNUMBER/start/hops/operator")
    program = Program(int(parts[0][3:]), parts[1], int(parts[2]), parts[3])
    if program not in programs(program.environment):
        raise ValueError(f"compiled template {template!r}: env{program.environment:03d} has no such program")
    return program


def programs(number: int) -> list[Program]:
    """The programs of environment `number`, in a fixed order."""
    definition = compile_environment(number)
    design = definition.design
    starts = ["from", "find"] if design.find != "none" else ["from"]
    most = min(MOST_HOPS if design.gate == "none" else 2, len(definition.relations))
    listed = {"none": [], "counted": ["count"]}.get(design.listing, ["count", "list"])
    found = [Program(number, start, hops, "name") for start in starts for hops in range(1, most + 1)]
    found += [Program(number, starts[-1], hops, operator) for hops in range(most) for operator in listed]
    return found


def functional_lookups(definition: Definition, world: World, entity: str, relation: str) -> Iterator[Lookup]:
    """The look-ups that give the object of a functional relation: what the gate asks for, then the fact."""
    design, verbs = definition.design, definition.verbs
    if design.gate != "none":
        yield verbs["gate"], (entity,)
    given = {"entity": entity, "relation": relation, "key": world.keys[entity]}
    name = relation if design.functional == "own" else verbs["functional"]
    yield name, tuple(given[one] for one in parameters_of(design, "functional"))


def list_lookup(definition: Definition, entity: str, page: int) -> Lookup:
    """The look-up of one page of the entity's list (the only one, where it is not paged)."""
    given = {"entity": entity, "relation": definition.listing, "page": str(page)}
    name = definition.verbs["list"] if "relation" in definition.design.listing else definition.listing
    return name, tuple(given[one] for one in parameters_of(definition.design, "list"))


def find_lookup(definition: Definition, code: str) -> Lookup:
    """The look-up of the entity that has the code."""
    given = {"relation": definition.code, "value": code}
    return definition.verbs["find"], tuple(given[one] for one in parameters_of(definition.design, "find"))


def is_paged(definition: Definition) -> bool:
    return "page" in definition.design.listing


def solve(program: Program, world: World, start: str, path: Sequence[str]) -> tuple[list[Lookup], list[str]]:
    """The look-ups that any player needs, in order, and the answer in words."""
    definition = world.definition
    lookups = [find_lookup(definition, world.codes[start])] if program.start == "find" else []
    entity = start
    for relation in path:
        lookups += functional_lookups(definition, world, entity, relation)
        entity = world.facts[entity, relation]
    if program.operator == "name":
        return lookups, [entity]
    pages = len(world.pages(entity)) if is_paged(definition) else 1
    lookups += [list_lookup(definition, entity, page) for page in range(1, pages + 1)]
    listed = list(world.lists[entity])
    return lookups, [str(len(listed))] if program.operator == "count" else listed
