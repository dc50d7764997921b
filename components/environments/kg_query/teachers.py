"""Scripted players that demonstrate `kg_query`: one that is right and five that are wrong, each in its own way.

They play through the environment, so every tool result in a demonstration is one that the tool gave. Nothing in the
prompt tells which of them plays: a model that imitates them all has to find out by reward which behaviour pays.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from components.environments.kg_query.graph import ENTITIES, OBJECT_WEIGHTS, RELATIONS, Graph
from components.environments.kg_query.programs import PAGE_SIZE, Program, parse_program, solve
from components.environments.protocol import Episode
from components.runtime.contracts import Message, TaskRecord, ToolCall

CAREFUL = "careful"
WRONG_KINDS = ("stops_early", "first_page_only", "guesses", "skips_hop", "wrong_relation")


class _Game:
    """A conversation in the making."""

    def __init__(self, episode: Episode, task: TaskRecord) -> None:
        self.episode = episode
        self.messages = list(task.messages)

    def look(self, entity: str, relation: str, page: int, content: str = "") -> list[str]:
        call = ToolCall(name="neighbors", arguments={"entity": entity, "relation": relation, "page": page})
        self.messages.append(Message(role="assistant", content=content, tool_calls=[call]))
        reply = self.episode.step(call).content
        self.messages.append(Message(role="tool", content=reply))
        return reply.split()

    def submit(self, answer: Sequence[str], content: str = "") -> None:
        call = ToolCall(name="submit", arguments={"answer": list(answer)})
        self.messages.append(Message(role="assistant", content=content, tool_calls=[call]))
        self.episode.step(call)

    def follow(self, start: str, relations: Sequence[str]) -> str:
        for relation in relations:
            start = self.look(start, relation, 1)[0]
        return start

    def answer(self, entity: str, relation: str, operator: str, most_pages: int | None = None) -> None:
        """Read the pages of the last hop (all of them, or `most_pages`) and submit what they say.

        For `count` the running total is written down before each further call: 3, 6, then 7.
        """
        found: list[str] = []
        page, more, tally = 0, True, ""
        while more and page != most_pages:
            page += 1
            words = self.look(entity, relation, page, tally)
            more = words[-1] == "more"
            found += [word for word in words if word not in ("more", "none")]
            tally = str(len(found)) if operator == "count" else ""
        self.submit([tally] if operator == "count" else found, tally)


def _shortcuts(program: Program) -> list[tuple[str, ...]]:
    """The program's path with one hop left out, where the types still fit (the last hop stays)."""
    paths = [program.relations[:i] + program.relations[i + 1 :] for i in range(len(program.relations) - 1)]
    return [path for path in paths if _typed(path, program.domain)]


def _detours(program: Program) -> list[tuple[str, ...]]:
    """The program's path with one relation replaced by another of the same kind, where the types still fit."""
    paths = []
    for i, name in enumerate(program.relations):
        for other in RELATIONS.values():
            if other.name != name and other.functional == RELATIONS[name].functional:
                path = (*program.relations[:i], other.name, *program.relations[i + 1 :])
                if _typed(path, program.domain):
                    paths.append(path)
    return paths


def _typed(path: Sequence[str], domain: str) -> bool:
    for name in path:
        if RELATIONS[name].domain != domain:
            return False
        domain = RELATIONS[name].range
    return True


def wrong_kinds(task: TaskRecord, graph: Graph) -> list[str]:
    """The kinds of `WRONG_KINDS` that can be played on this task and that it gives occasion for."""
    program = parse_program(task.template)
    many_pages = len(solve(graph, program, task.initial_state["start"]).objects) > PAGE_SIZE
    applies = {
        "stops_early": len(program.relations) > 1,
        "first_page_only": many_pages,
        "guesses": True,
        "skips_hop": bool(_shortcuts(program)),
        "wrong_relation": bool(_detours(program)),
    }
    return [kind for kind in WRONG_KINDS if applies[kind]]


def random_answer(task: TaskRecord, rng: random.Random) -> list[str]:
    """An answer of the right type by a player that knows nothing."""
    program = parse_program(task.template)
    if program.operator == "count":
        return [str(rng.randrange(len(OBJECT_WEIGHTS)))]
    number = 1 if program.operator == "name" else rng.randint(1, 4)
    return rng.sample(ENTITIES[program.range], number)


def play(episode: Episode, task: TaskRecord, kind: str, rng: random.Random) -> list[Message]:
    """The whole conversation, the task's messages first, ending with the submission.

    Raises ValueError for an unknown kind and IndexError for one that does not apply (see `wrong_kinds`).
    """
    program = parse_program(task.template)
    start = task.initial_state["start"]
    *path, last = program.relations
    game = _Game(episode, task)
    if kind == CAREFUL:
        game.answer(game.follow(start, path), last, program.operator)
    elif kind == "first_page_only":
        game.answer(game.follow(start, path), last, program.operator, most_pages=1)
    elif kind == "stops_early":
        reached = game.follow(start, path)
        game.submit(["1"] if program.operator == "count" else [reached], "1" if program.operator == "count" else "")
    elif kind == "guesses":
        if rng.random() < 0.5:
            game.look(start, program.relations[0], 1)
        game.submit(random_answer(task, rng))
    elif kind in ("skips_hop", "wrong_relation"):
        *path, last = rng.choice(_shortcuts(program) if kind == "skips_hop" else _detours(program))
        game.answer(game.follow(start, path), last, program.operator)
    else:
        raise ValueError(f"unknown teacher {kind!r}; known: {', '.join((CAREFUL, *WRONG_KINDS))}")
    return game.messages
