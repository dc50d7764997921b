"""The hidden world of `kg_query`: a typed enterprise graph whose facts are drawn anew for each seed.

The words are always the same 64 entities and 25 relations; what they say about each other is not, so a player can only
know a fact by asking for it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property, lru_cache

from components.environments.words import CITIES, COMPANIES, PEOPLE, PRODUCTS, TEAMS
from components.runtime.contracts import digest

ENTITIES: dict[str, tuple[str, ...]] = {
    "person": PEOPLE,
    "team": TEAMS,
    "company": COMPANIES,
    "city": CITIES,
    "product": PRODUCTS,
}
TYPE_OF: dict[str, str] = {name: kind for kind, names in ENTITIES.items() for name in names}


@dataclass(frozen=True)
class Relation:
    """`domain` and `range` are entity types; a functional relation gives each subject exactly one object."""

    name: str
    domain: str
    range: str
    functional: bool


_FUNCTIONAL = """
person works_in team, person lives_in city, person reports_to person,
team led_by person, team part_of company, team based_in city,
company seated_in city, company run_by person, company owned_by company,
city governed_by person, city twinned_with city, city powered_by company,
product made_by company, product maintained_by team, product replaces product
"""
_MANY_VALUED = """
person mentors person, person uses product,
team advisers person, team tests product,
company offices city, company suppliers company,
city hosts company, city honours person,
product buyers company, product markets city
"""


def _relations() -> dict[str, Relation]:
    found = {}
    for text, functional in ((_FUNCTIONAL, True), (_MANY_VALUED, False)):
        for line in text.split(","):
            domain, name, range_ = line.split()
            found[name] = Relation(name, domain, range_, functional)
    return found


RELATIONS: dict[str, Relation] = _relations()

# How many objects a many-valued relation has: 0 to 8, mostly 1 to 6 (index = number of objects).
OBJECT_WEIGHTS = (1, 2, 2, 2, 2, 2, 2, 1, 1)


class Graph:
    """Facts of one world: (subject, relation) -> objects in the order in which the tool lists them."""

    def __init__(self, facts: dict[tuple[str, str], tuple[str, ...]]) -> None:
        self.facts = facts

    def objects(self, subject: str, relation: str) -> tuple[str, ...]:
        """Objects of a fact. KeyError when the subject's type does not have the relation."""
        return self.facts[subject, relation]

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the facts."""
        return digest([[*key, *objects] for key, objects in self.facts.items()])


def _slots() -> list[tuple[str, Relation, tuple[str, ...]]]:
    """Every (subject, relation) of a world, and the entities it may point to: all of the range but itself."""
    return [
        (subject, relation, tuple(name for name in ENTITIES[relation.range] if name != subject))
        for relation in RELATIONS.values()
        for subject in ENTITIES[relation.domain]
    ]


_SLOTS = _slots()


@lru_cache(maxsize=512)  # the episodes of one group of rollouts share their world
def build_graph(seed: int) -> Graph:
    """The graph of `seed`. No entity relates to itself."""
    rng = random.Random(seed)
    draw = rng.random
    counts = iter(rng.choices(range(len(OBJECT_WEIGHTS)), OBJECT_WEIGHTS, k=len(_SLOTS)))
    facts: dict[tuple[str, str], tuple[str, ...]] = {}
    for subject, relation, pool in _SLOTS:
        # not rng.choice and rng.sample: four times faster, and worlds are most of what synthesis costs
        if relation.functional:
            facts[subject, relation.name] = (pool[int(draw() * len(pool))],)
        else:
            left = list(pool)
            drawn = [left.pop(int(draw() * len(left))) for _ in range(next(counts))]
            facts[subject, relation.name] = tuple(drawn)
    return Graph(facts)
