"""Programs: the shape of the nested rules, what each condition asks about, and how many trips come first.

`1/both/weather/status/price`: one trip, then a rule with a rule in both branches; the outer condition is about the
weather, the inner ones about opening and price.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from components.environments.scripted import Lookup
from components.environments.trip_planning.world import MODES, PLACES, PRICE, STATUS, WEATHER, World

ABOUT = ("weather", "status", "price")
VALUES = {"weather": WEATHER, "status": STATUS, "price": PRICE}
SHAPES = {"single": 1, "then": 2, "else": 2, "both": 3}  # number of conditions
MOST_TRIPS = 2
LONG_TRIPS = (6, 7)


@dataclass(frozen=True)
class Program:
    trips: int
    shape: str
    about: tuple[str, ...]

    @property
    def template(self) -> str:
        return "/".join([str(self.trips), self.shape, *self.about])


def parse_program(template: str) -> Program:
    """The program that `template` names. Raises ValueError when there is no such program."""
    trips, _, rest = template.partition("/")
    shape, *about = rest.split("/")
    if not trips.isdigit() or len(about) != SHAPES.get(shape, -1) or not set(about) <= set(ABOUT):
        raise ValueError(f"trip_planning template {template!r}: expected trips/shape/condition/...")
    return Program(int(trips), shape, tuple(about))


def programs(trips: tuple[int, ...]) -> list[Program]:
    """All programs with these numbers of trips, in a fixed order."""
    return [
        Program(number, shape, about)
        for number in trips
        for shape, conditions in SHAPES.items()
        for about in product(ABOUT, repeat=conditions)
    ]


@dataclass(frozen=True)
class Rule:
    """If the look-up of `about` (of `place`, except for the weather) gives `value`, then `yes`, else `no`."""

    about: str
    place: str
    value: str
    yes: Rule | str
    no: Rule | str

    def lookup(self, city: str) -> Lookup:
        return (self.about, (city,)) if self.about == "weather" else (self.about, (self.place, city))

    def words(self) -> str:
        condition = self.value if self.about == "weather" else f"{self.place} {self.value}"
        return f"if {condition} then {_words(self.yes)} else {_words(self.no)}"


def _words(branch: Rule | str) -> str:
    return branch if isinstance(branch, str) else branch.words()


def draw_rule(program: Program, world: World, city: str, rng: random.Random) -> Rule:
    """A rule of the program's shape about `city`; each of its conditions holds in about half of the draws."""
    leaves = iter(rng.sample(PLACES, SHAPES[program.shape] + 1))
    asked = iter(rng.sample(PLACES, SHAPES[program.shape]))

    def rule(about: str, yes: Rule | str, no: Rule | str) -> Rule:
        place = next(asked)
        actual = world.look(about, (city,) if about == "weather" else (place, city))
        others = [value for value in VALUES[about] if value != actual]
        return Rule(about, place, actual if rng.random() < 0.5 else rng.choice(others), yes, no)

    outer, *inner = program.about
    yes: Rule | str = next(leaves)
    no: Rule | str = next(leaves)
    if program.shape in ("then", "both"):
        yes = rule(inner[0], yes, next(leaves))
    if program.shape in ("else", "both"):
        no = rule(inner[-1], no, next(leaves))
    return rule(outer, yes, no)


def draw_modes(program: Program, rng: random.Random) -> list[str]:
    return [rng.choice(MODES) for _ in range(program.trips)]


def decide(rule: Rule | str, world: World, city: str) -> Iterator[tuple[Lookup, bool]]:
    """The look-ups on the way to the decision, and whether each condition held."""
    while isinstance(rule, Rule):
        lookup = rule.lookup(city)
        holds = world.look(*lookup) == rule.value
        yield lookup, holds
        rule = rule.yes if holds else rule.no


def rule_to_json(rule: Rule | str) -> object:
    """As stored in a task's initial state."""
    if isinstance(rule, str):
        return rule
    return [rule.about, rule.place, rule.value, rule_to_json(rule.yes), rule_to_json(rule.no)]


def rule_from_json(value: object) -> Rule | str:
    if isinstance(value, str):
        return value
    assert isinstance(value, list)
    about, place, wanted, yes, no = value
    return Rule(about, place, wanted, rule_from_json(yes), rule_from_json(no))
