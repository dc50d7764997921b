"""Scripted players of compiled environments: one that is right, and five that are wrong, each in its own way."""

from __future__ import annotations

import random
from collections.abc import Sequence

from components.environments.grammar.programs import (
    Program,
    find_lookup,
    functional_lookups,
    is_paged,
    list_lookup,
    parse_program,
)
from components.environments.grammar.world import ENTITIES, MOST_LISTED, World
from components.environments.scripted import Conversation, LookupEpisode
from components.runtime.contracts import Demonstration

CAREFUL = "careful"
WRONG_KINDS = ("first_page_only", "skips_hop", "wrong_relation", "stops_early", "guesses")


def shortcut(program: Program, paged: bool) -> str | None:
    """Counting page by page reads the first page only; three hops are made in two."""
    if program.operator == "count" and paged:
        return "first_page_only"
    return "skips_hop" if program.operator == "name" and program.hops == 3 else None


def wrong_kinds(program: Program, world: World, end: str) -> list[str]:
    """The kinds of `WRONG_KINDS` for which the task gives occasion; `end` is the entity at the end of the path."""
    applies = {
        "first_page_only": program.operator != "name" and is_paged(world.definition) and len(world.pages(end)) > 1,
        "skips_hop": program.hops > 1,
        "wrong_relation": program.hops > 0 and len(world.definition.relations) > 1,
        "stops_early": program.hops > 0 and program.operator == "name",
    }
    return [kind for kind in WRONG_KINDS if applies.get(kind, True)]


def random_answer(program: Program, rng: random.Random) -> list[str]:
    """An answer of the right kind by a player that knows nothing."""
    if program.operator == "count":
        return [str(rng.randint(0, MOST_LISTED))]
    return rng.sample(ENTITIES, 1 if program.operator == "name" else rng.randint(1, 4))


def play(episode: LookupEpisode, world: World, kind: str, rng: random.Random) -> Demonstration:
    """The whole conversation as the teacher `kind` plays it. Raises ValueError for an unknown kind."""
    if kind not in (CAREFUL, *WRONG_KINDS):
        raise ValueError(f"unknown teacher {kind!r}; known: {', '.join((CAREFUL, *WRONG_KINDS))}")
    program, state, definition = parse_program(episode.task.template), episode.task.initial_state, world.definition
    talk = Conversation(episode)
    if kind == "guesses":
        talk.submit(random_answer(program, rng))
        return talk.demonstration(kind)
    path = _path(kind, state["path"], definition.relations, rng)
    entity: str = state["start"]
    if program.start == "find":
        name, values = find_lookup(definition, world.codes[entity])
        (entity,) = talk.look(name, *values)
    for relation in path:
        reply: list[str] = []
        for name, values in functional_lookups(definition, world, entity, relation):
            reply = talk.look(name, *values)
        (entity,) = reply
    if program.operator == "name":
        talk.submit([entity])
    else:
        _answer_list(talk, world, entity, program.operator, 1 if kind == "first_page_only" else None)
    return talk.demonstration(kind)


def _path(kind: str, path: Sequence[str], relations: Sequence[str], rng: random.Random) -> list[str]:
    path = list(path)
    at = rng.randrange(len(path)) if path else 0
    if kind == "skips_hop":
        del path[at]
    elif kind == "stops_early":
        del path[-1]
    elif kind == "wrong_relation":
        path[at] = rng.choice([one for one in relations if one != path[at]])
    return path


def _answer_list(talk: Conversation, world: World, entity: str, operator: str, most_pages: int | None) -> None:
    """Read the list at the end of the path and submit; with pages, a running total is written down: 3, 6, then 7."""
    counted = world.definition.design.listing == "counted"
    found: list[str] = []
    page, more, tally = 0, True, ""
    while more and page != most_pages:
        page += 1
        name, values = list_lookup(world.definition, entity, page)
        words = talk.look(name, *values, content=tally)
        more = words[-1] == "more"
        found += [word for word in words if word not in ("more", "none")]
        tally = str(len(found)) if operator == "count" and not counted else ""
    if counted:
        talk.submit(found)
    else:
        talk.submit([tally] if operator == "count" else found, content=tally)
