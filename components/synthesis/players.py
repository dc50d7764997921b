"""Players without a model, each on the same tasks: what a family gives to the one that knows and to those that do not.

`reference` makes the solver's calls, `empty` none, `random` calls without knowledge, `shortcut` follows the wrong
teacher that most demonstrations of a template show (or, where there is none, the first that applies).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from components.environments.chat_format import conversation_words
from components.runtime.contracts import Message, TaskRecord, ToolCall
from components.synthesis.family import Family, shortcut_of

SAMPLES = 16
PLAYERS = ("reference", "empty", "random", "shortcut")


def calls_played(family: Family, task: TaskRecord, calls: Sequence[ToolCall]) -> tuple[bool, int]:
    """Whether an episode of exactly these calls passes, and the words of its conversation."""
    episode, messages = family.reset(task), list(task.messages)
    for call in calls:
        observation = episode.step(call)
        messages.append(Message(role="assistant", tool_calls=[call]))
        if observation.done:
            break
        messages.append(Message(role="tool", content=observation.content))
    return episode.verdict().passed, len(conversation_words(messages, task.tools)[0])


def sample_of(family: Family, task: TaskRecord, player: str, number: int) -> tuple[bool, int]:
    """Verdict and words of the `number`-th play of the task by the player; the same for the same arguments."""
    rng = random.Random(f"{task.id}/{player}/{number}")
    if player == "reference":
        return calls_played(family, task, task.solution)
    if player == "empty":
        return calls_played(family, task, [])
    if player == "random":
        return calls_played(family, task, [family.random_call(task, rng) for _ in range(task.limits.turns)])
    applicable, shortcut = family.wrong_kinds(task), shortcut_of(family, task.template)
    kind = shortcut if shortcut in applicable else next(iter(applicable), None)
    if kind is None:
        return calls_played(family, task, [])
    played = family.play(task, kind, rng)
    return played.passed, len(conversation_words(played.messages, played.tools)[0])


def play_all(family: Family, tasks: Sequence[TaskRecord]) -> dict[str, dict[str, Any]]:
    """By player: pass@1 and pass@16 (shares of tasks), mean words of an episode, tasks and samples played."""
    found = {}
    for player in PLAYERS:
        samples = SAMPLES if player in ("random", "shortcut") else 1  # the others always play alike
        played = [[sample_of(family, task, player, number) for number in range(samples)] for task in tasks]
        passes = [sum(passed for passed, _ in of_task) for of_task in played]
        words = [count for of_task in played for _, count in of_task]
        found[player] = {
            "pass_at_1": sum(passes) / (samples * len(tasks)),
            "pass_at_16": sum(c > 0 for c in passes) / len(tasks),  # all samples are the 16, or all are alike
            "tokens": sum(words) / len(words),
            "tasks": len(tasks),
            "samples": samples,
        }
    return found
