"""Scripted players of `trip_planning`: one that is right, and five that are wrong, each in its own way."""

from __future__ import annotations

import random

from components.environments import scripted
from components.environments.scripted import Conversation, LookupEpisode
from components.environments.trip_planning.programs import Rule, rule_from_json
from components.environments.trip_planning.world import MODES, PLACES
from components.environments.words import CITIES
from components.runtime.contracts import Demonstration

CAREFUL = "careful"
WRONG_KINDS = ("assumes", "outer_only", "misreads", "stays_home", "guesses")


def wrong_kinds(trips: int, shape: str) -> list[str]:
    """The kinds of `WRONG_KINDS` for which a program gives occasion."""
    applies = {"assumes": True, "outer_only": shape != "single", "misreads": True, "stays_home": trips > 0}
    return [kind for kind in WRONG_KINDS if applies.get(kind, True)]


def play(episode: LookupEpisode, kind: str, rng: random.Random) -> Demonstration:
    """The whole conversation as the teacher `kind` plays it. Raises ValueError for an unknown kind."""
    if kind not in (CAREFUL, *WRONG_KINDS):
        raise ValueError(f"unknown teacher {kind!r}; known: {', '.join((CAREFUL, *WRONG_KINDS))}")
    state = episode.task.initial_state
    talk = Conversation(episode)
    if kind == "guesses":
        talk.submit([rng.choice(PLACES), rng.choice(CITIES)])
        return talk.demonstration(kind)
    modes = state["modes"][:-1] if kind == "stays_home" else state["modes"]
    city = state["start"]
    for mode in modes:
        (city,) = talk.look("travel", city, mode)
    known: dict[scripted.Lookup, list[str]] = {}
    rule, depth, thought = rule_from_json(state["rule"]), 0, ""
    misread = 0 if kind == "misreads" else None
    while isinstance(rule, Rule):
        if (kind == "assumes" and depth == 0) or (kind == "outer_only" and depth > 0):
            holds = True  # not looked up
        else:
            lookup = rule.lookup(city)
            if lookup not in known:
                known[lookup] = talk.look(lookup[0], *lookup[1], content=thought)
                thought = ""
            holds = known[lookup] == [rule.value]
        rule, depth = (rule.yes if holds != (depth == misread) else rule.no), depth + 1
        # what is left of the rules is written down, so that the next decision is between two words
        thought = rule.words() if isinstance(rule, Rule) else ""
    talk.submit([rule, city], content=thought)
    return talk.demonstration(kind)


def random_plan(rng: random.Random) -> list[str]:
    return [rng.choice(PLACES), rng.choice(CITIES)]


def random_lookup(rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """A look-up by a player without knowledge."""
    city, place = rng.choice(CITIES), rng.choice(PLACES)
    name = rng.choice(["weather", "status", "price", "travel"])
    return name, {"weather": (city,), "travel": (city, rng.choice(MODES))}.get(name, (place, city))
