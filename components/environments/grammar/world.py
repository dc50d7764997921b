"""The facts of one play of a compiled environment, and what its tools answer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from components.environments.grammar.definitions import Definition, compile_environment, parameters_of
from components.environments.words import NUMBERS, PEOPLE, PRODUCTS
from components.runtime.contracts import digest

ENTITIES = (*PEOPLE, *PRODUCTS)
PAGE_SIZE = 3
MOST_LISTED = 8


@dataclass(frozen=True)
class World:
    """facts[entity, relation] -> entity; lists[entity] -> entities; codes and keys are different for all entities."""

    definition: Definition
    facts: dict[tuple[str, str], str]
    lists: dict[str, tuple[str, ...]]
    codes: dict[str, str]
    keys: dict[str, str]

    @cached_property
    def by_code(self) -> dict[str, str]:
        return {code: entity for entity, code in self.codes.items()}

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the environment and its facts."""
        facts = sorted((entity, relation, value) for (entity, relation), value in self.facts.items())
        return digest([self.definition.name, facts, self.lists, self.codes, self.keys])

    def pages(self, entity: str) -> list[tuple[str, ...]]:
        """What the list of an entity shows page by page; one empty page when it has nothing."""
        listed = self.lists[entity]
        return [listed[at : at + PAGE_SIZE] for at in range(0, len(listed), PAGE_SIZE)] or [()]


@dataclass
class Desk:
    """Answers one episode's look-ups: remembers which entities were opened."""

    world: World
    opened: set[str] = field(default_factory=set)

    def look(self, tool: str, values: tuple[str, ...]) -> str:
        """The answer of a tool in words."""
        world, definition = self.world, self.world.definition
        role = definition.role(tool)
        given = dict(zip(parameters_of(definition.design, role), values, strict=True))
        if role == "find":
            if given.get("relation", definition.code) != definition.code:
                return "error unknown relation"
            return world.by_code.get(given["value"], "error unknown value")
        entity = given["entity"]
        if entity not in world.keys:
            return "error unknown entity"
        if role == "gate":
            if definition.design.gate == "open":
                self.opened.add(entity)
                return "done"
            return world.keys[entity]
        if role == "list":
            return self._list(entity, given)
        if definition.design.gate == "open" and entity not in self.opened:
            return "error closed"
        if given.get("key", world.keys[entity]) != world.keys[entity]:
            return "error unknown key"
        return world.facts.get((entity, given.get("relation", tool)), "error unknown relation")

    def _list(self, entity: str, given: dict[str, str]) -> str:
        world, definition = self.world, self.world.definition
        if given.get("relation", definition.listing) != definition.listing:
            return "error unknown relation"
        if definition.design.listing == "counted":
            return str(len(world.lists[entity]))
        if definition.design.listing == "at once":
            return " ".join(world.lists[entity]) or "none"
        shown, page = world.pages(entity), int(given["page"])
        if not 1 <= page <= len(shown):
            return "error unknown page"
        words = [*shown[page - 1]] or ["none"]
        return " ".join([*words, "more"] if page < len(shown) else words)


@lru_cache(maxsize=256)
def build_world(number: int, seed: int) -> World:
    """The facts of environment `number` that `seed` draws."""
    definition = compile_environment(number)
    rng = random.Random(f"compiled/world/{number}/{seed}")
    codes, keys = rng.sample(NUMBERS, len(ENTITIES)), rng.sample(NUMBERS, len(ENTITIES))
    return World(
        definition,
        {
            (entity, relation): rng.choice([other for other in ENTITIES if other != entity])
            for entity in ENTITIES
            for relation in definition.relations
        },
        {entity: tuple(rng.sample(ENTITIES, rng.randint(0, MOST_LISTED))) for entity in ENTITIES},
        dict(zip(ENTITIES, codes, strict=True)),
        dict(zip(ENTITIES, keys, strict=True)),
    )
