"""Scripted players of `internal_api`: one that is right, and five that are wrong, each in its own way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from components.environments.internal_api.library import NAMES, TYPES
from components.environments.internal_api.programs import Program, code_words, parse_program
from components.environments.scripted import Conversation, LookupEpisode
from components.runtime.contracts import Demonstration

CAREFUL = "careful"
WRONG_KINDS = ("undocumented", "ignores_deprecation", "skips_step", "other_function", "guesses")


def wrong_kinds(program: Program) -> list[str]:
    """The kinds of `WRONG_KINDS` for which a program gives occasion."""
    applies = {"ignores_deprecation": "1" in program.traps, "skips_step": len(program.traps) > 1}
    return [kind for kind in WRONG_KINDS if applies.get(kind, True)]


def play(episode: LookupEpisode, kind: str, rng: random.Random) -> Demonstration:
    """The whole conversation as the teacher `kind` plays it. Raises ValueError for an unknown kind."""
    if kind not in (CAREFUL, *WRONG_KINDS):
        raise ValueError(f"unknown teacher {kind!r}; known: {', '.join((CAREFUL, *WRONG_KINDS))}")
    program, value = parse_program(episode.task.template), episode.task.initial_state["value"]
    talk = Conversation(episode)
    if kind == "guesses":
        talk.submit([str(rng.randrange(100))])
        return talk.demonstration(kind)
    path = program.path[:-1] if kind == "skips_step" else program.path
    chosen = [_choose(talk, takes, gives, kind) for takes, gives in pairwise(path)]
    reply = talk.look("run", code_words(chosen, value))
    talk.submit(reply[-1:] if reply[0] != "error" else [str(rng.randrange(100))])
    return talk.demonstration(kind)


def _choose(talk: Conversation, takes: str, gives: str, kind: str) -> str:
    """The function for one step. The careful teacher reads until a documentation gives what is wanted."""
    names = talk.look("search", takes)
    if kind == "undocumented":
        return names[0]
    for name in names:
        words = talk.look("doc", name)
        if words[0] == "deprecated":
            if kind == "ignores_deprecation":
                return name
            name, words = words[-1], talk.look("doc", words[-1])
        if (words[-1] == gives) != (kind == "other_function"):
            return name
    return names[-1]


def random_lookup(rng: random.Random, tools: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """A look-up by a player without knowledge."""
    # programs of a player without knowledge hardly ever run, and running is the slowest thing here
    name = "run" if rng.random() < 0.1 else rng.choice([tool for tool in tools if tool not in ("submit", "run")])
    program = code_words(rng.sample(NAMES, rng.randint(1, 2)), rng.randrange(100))
    return name, ({"search": rng.choice(TYPES), "doc": rng.choice(NAMES)}.get(name, program),)
