"""The validation battery: what a task has to survive before anybody is trained or judged on it.

A task is kept when its record is sound, the reference solver passes, players that know nothing fail (empty, random,
constant), at least 90% of the mutated solutions fail, the verifier agrees with itself, and no like task is there yet.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, SchemaError

from components.environments.chat_format import conversation_words
from components.environments.protocol import Verdict
from components.runtime.contracts import TaskRecord, ToolCall, canonical_json, digest
from components.synthesis.family import CAREFUL, Family

CHECKS = ("record", "reference", "limits", "empty", "random", "constant", "mutants", "deterministic", "duplicate")
LEAST_MUTANTS_FAILING = 0.9
_RUNS = 3  # plays of the reference that have to agree


def content_identity(task: TaskRecord) -> str:
    """What makes two tasks the same to a player: the messages and the reference's calls, whatever the seed."""
    return digest(
        {
            "messages": [message.model_dump(mode="json") for message in task.messages],
            "solution": [call.model_dump(mode="json") for call in task.solution],
        }
    )


def replay(family: Family, task: TaskRecord, calls: Sequence[ToolCall]) -> Verdict:
    """The verdict on an episode of exactly these calls (those after the end are not made)."""
    episode = family.reset(task)
    for call in calls:
        if episode.step(call).done:
            break
    return episode.verdict()


def emptied(call: ToolCall) -> ToolCall:
    """The call with every argument empty: [] for an array, 0 for a number, "" for a text."""
    arguments = {name: type(value)() for name, value in call.arguments.items()}
    return ToolCall(name=call.name, arguments=arguments)


def mutants(task: TaskRecord, words: Sequence[str], number: int, rng: random.Random) -> list[list[ToolCall]]:
    """Up to `number` different mutated solutions: a call dropped, or one argument of a call changed.

    The mutant without any call but the last (the answer, never looked up) is always among them.
    """
    solution = list(task.solution)
    found: dict[str, list[ToolCall]] = {}
    if len(solution) > 1:
        found[_key(solution[-1:])] = solution[-1:]
    for _ in range(4 * number):
        if len(found) >= number:
            break
        at = rng.randrange(len(solution))
        if rng.random() < 0.3:
            mutant = solution[:at] + solution[at + 1 :]
        else:
            mutant = [*solution[:at], _changed(solution[at], words, rng), *solution[at + 1 :]]
        if mutant != solution:
            found.setdefault(_key(mutant), mutant)
    return list(found.values())


def _key(calls: Sequence[ToolCall]) -> str:
    return canonical_json([call.model_dump(mode="json") for call in calls])


def _same_value(one: ToolCall, other: ToolCall) -> bool:
    """Whether two submissions say the same, arrays taken as sets."""

    def value(call: ToolCall) -> list[Any]:
        return [sorted(v) if isinstance(v, list) else v for v in call.arguments.values()]

    return value(one) == value(other)


def _changed(call: ToolCall, words: Sequence[str], rng: random.Random) -> ToolCall:
    name = rng.choice(list(call.arguments))
    value = call.arguments[name]
    if isinstance(value, list):
        value = list(value)
        action = rng.choice(["replace", "append", "drop"] if value else ["append"])
        if action == "append":
            value.append(rng.choice(words))
        elif action == "drop":
            value.pop(rng.randrange(len(value)))
        else:
            value[rng.randrange(len(value))] = rng.choice(words)
    elif isinstance(value, int):
        value += rng.choice((-1, 1))
    else:
        value = rng.choice(words)
    return ToolCall(name=call.name, arguments={**call.arguments, name: value})


@lru_cache(maxsize=64)
def _validator(schema: str) -> Draft202012Validator:
    loaded = json.loads(schema)
    Draft202012Validator.check_schema(loaded)
    return Draft202012Validator(loaded)


class Battery:
    """Checks tasks one by one and counts what it removes, by the first check that failed."""

    def __init__(self, family: Family, constant: dict[str, ToolCall], mutants: int, random_plays: int) -> None:
        """`constant`: per operator the submission that the constant player makes (see `constant_submissions`)."""
        self.family = family
        self.constant = constant
        self.mutants = mutants
        self.random_plays = random_plays
        self.words = family.vocabulary()
        self.seen: set[str] = set()
        self.checked = 0
        self.removed = dict.fromkeys(CHECKS, 0)
        self.mutants_played = self.mutants_failed = 0
        self.constant_value_right: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()

    def keeps(self, task: TaskRecord) -> bool:
        """Whether the task survives; a survivor is remembered, so that its like is a duplicate from now on."""
        self.checked += 1
        failed = next((check for check in CHECKS if not getattr(self, f"_{check}")(task)), None)
        if failed is not None:
            self.removed[failed] += 1
            return False
        self.seen.add(content_identity(task))
        operator = str(task.difficulty["operator"])
        self.operators[operator] += 1
        constant = self.constant.get(operator)
        self.constant_value_right[operator] += constant is not None and _same_value(constant, task.solution[-1])
        return True

    def _record(self, task: TaskRecord) -> bool:
        if task.id != task.identity() or TaskRecord.model_validate_json(task.model_dump_json()) != task:
            return False
        schemas = {tool.name: canonical_json(tool.input_schema) for tool in task.tools}
        try:
            return all(
                call.name in schemas and _validator(schemas[call.name]).is_valid(call.arguments)
                for call in task.solution
            )
        except SchemaError:
            return False

    def _reference(self, task: TaskRecord) -> bool:
        return replay(self.family, task, task.solution).passed

    def _limits(self, task: TaskRecord) -> bool:
        played = self.family.play(task, CAREFUL, random.Random(0))
        words, _ = conversation_words(played.messages, task.tools)
        turns = sum(message.role == "assistant" for message in played.messages)
        return played.passed and len(words) <= task.limits.tokens and turns <= task.limits.turns

    def _empty(self, task: TaskRecord) -> bool:
        plays: tuple[list[ToolCall], ...] = (
            [],
            [emptied(task.solution[-1])],
            [*task.solution[:-1], emptied(task.solution[-1])],
        )
        return not any(replay(self.family, task, calls).passed for calls in plays)

    def _random(self, task: TaskRecord) -> bool:
        for play in range(self.random_plays):
            rng = random.Random(f"{task.id}/random/{play}")
            calls = [self.family.random_call(task, rng) for _ in range(task.limits.turns)]
            if replay(self.family, task, calls).passed:
                return False
        return True

    def _constant(self, task: TaskRecord) -> bool:
        constant = self.constant.get(str(task.difficulty["operator"]))
        return constant is None or not replay(self.family, task, [constant]).passed

    def _mutants(self, task: TaskRecord) -> bool:
        played = mutants(task, self.words, self.mutants, random.Random(f"{task.id}/mutants"))
        failed = sum(not replay(self.family, task, calls).passed for calls in played)
        self.mutants_played += len(played)
        self.mutants_failed += failed
        return failed >= LEAST_MUTANTS_FAILING * len(played)

    def _deterministic(self, task: TaskRecord) -> bool:
        outcomes = set()
        for _ in range(_RUNS):
            episode = self.family.reset(task)
            hashes = [episode.state_hash()]
            observations = [episode.step(call) for call in task.solution]
            hashes.append(episode.state_hash())
            outcomes.add((tuple(hashes), tuple(observations), episode.verdict()))
        return len(outcomes) == 1

    def _duplicate(self, task: TaskRecord) -> bool:
        return content_identity(task) not in self.seen

    def report(self) -> dict[str, Any]:
        """Counts: tasks checked and kept, removed by each check, mutants that failed, the constant player's luck."""
        return {
            "checked": self.checked,
            "kept": self.checked - sum(self.removed.values()),
            "removed": dict(self.removed),
            "mutants_failed_share": self.mutants_failed / max(1, self.mutants_played),
            "mutants_played": self.mutants_played,
            # the constant player's value is right this often; it fails all the same, because it never looked it up
            "constant_value_right_share": {
                operator: self.constant_value_right[operator] / number
                for operator, number in sorted(self.operators.items())
            },
        }


def constant_submissions(tasks: Sequence[TaskRecord]) -> dict[str, ToolCall]:
    """Per operator the last call (the submission) that is most often the right one among `tasks`."""
    by_operator: dict[str, Counter[str]] = {}
    calls: dict[str, ToolCall] = {}
    for task in tasks:
        key = _key(task.solution[-1:])
        calls[key] = task.solution[-1]
        by_operator.setdefault(str(task.difficulty["operator"]), Counter())[key] += 1
    return {operator: calls[counts.most_common(1)[0][0]] for operator, counts in by_operator.items()}
