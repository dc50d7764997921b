"""What families with look-up tools share: an episode over a hidden world, task records, and scripted conversations.

A family gives a world that is built from a seed, a function that answers look-ups in it, and problems: a message, the
reference's calls and the answer. The verifier is the same for all: the answer is right, and every look-up that the
answer follows from was made; a lucky guess earns nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from components.environments.chat_format import conversation_words
from components.environments.protocol import Observation, Verdict
from components.runtime.contracts import (
    Demonstration,
    Limits,
    Message,
    TaskRecord,
    ToolCall,
    ToolDefinition,
    digest,
)

Split = Literal["train", "validation", "test"]
Lookup = tuple[str, tuple[str, ...]]
STANDARD, LONG = Limits(turns=14, tokens=160), Limits(turns=24, tokens=320)
ERROR_WORDS = ("error", "unknown", "tool", "arguments", "answer", "was", "given")


def tool(name: str, description: str, *parameters: str) -> ToolDefinition:
    """A look-up tool whose parameters are words; one named `page` is a page number, one named `program` a list."""
    special: dict[str, dict[str, Any]] = {
        "page": {"type": "integer", "minimum": 1},
        "program": {"type": "array", "items": {"type": "string"}},
    }
    kinds = {one: special.get(one, {"type": "string"}) for one in parameters}
    return ToolDefinition(name=name, description=description, input_schema=_schema(kinds))


def submit_tool(description: str) -> ToolDefinition:
    """The tool that ends an episode: `answer` is a list of words."""
    return ToolDefinition(
        name="submit",
        description=description,
        input_schema=_schema({"answer": {"type": "array", "items": {"type": "string"}}}),
    )


def _schema(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def call_of(definition: ToolDefinition, values: Sequence[str]) -> ToolCall:
    """The call of a look-up tool with `values` in the order of its parameters."""
    properties = definition.input_schema["properties"]
    read: dict[str, Callable[[str], Any]] = {"integer": int, "array": str.split, "string": str}
    arguments = {
        name: read[schema["type"]](value) for (name, schema), value in zip(properties.items(), values, strict=True)
    }
    return ToolCall(name=definition.name, arguments=arguments)


def submission(answer: Sequence[str]) -> ToolCall:
    return ToolCall(name="submit", arguments={"answer": list(answer)})


class LookupEpisode:
    """One play. `look` answers a look-up in words, "error ..." for what the world does not know.

    State: the world (by its digest), the calls made and the submission. Look-ups that were answered are remembered.
    """

    def __init__(self, task: TaskRecord, world: str, look: Callable[[str, tuple[str, ...]], str]) -> None:
        self.task, self.world, self.look = task, world, look
        self.schemas = {one.name: one.input_schema["properties"] for one in task.tools}
        self.calls: list[ToolCall] = []
        self.seen: set[Lookup] = set()
        self.submission: list[str] | None = None

    def step(self, call: ToolCall) -> Observation:
        """Answer a call. What is wrong with it comes back as an observation `error ...`; nothing is raised."""
        if self.submission is not None:
            return _error("answer was given")
        self.calls.append(call)
        if call.name not in self.schemas:
            return _error("unknown tool")
        if set(call.arguments) != set(self.schemas[call.name]):
            return _error("unknown arguments")
        if call.name == "submit":
            answer = call.arguments["answer"]
            self.submission = [str(word) for word in answer] if isinstance(answer, list) else str(answer).split()
            return Observation("", done=True)
        values = []
        for name, schema in self.schemas[call.name].items():
            value = call.arguments[name]
            expected = {"integer": int, "array": list}.get(schema["type"], str)
            # bool is an int in Python; JSON's true is no page
            if not isinstance(value, expected) or isinstance(value, bool):
                return _error("unknown arguments")
            values.append(" ".join(map(str, value)) if isinstance(value, list) else str(value))
        words = self.look(call.name, tuple(values))
        if words.startswith("error"):
            return Observation(words, is_error=True)
        self.seen.add((call.name, tuple(values)))
        return Observation(words)

    def state_hash(self) -> str:
        calls = [call.model_dump(mode="json") for call in self.calls]
        return digest({"world": self.world, "calls": calls, "submission": self.submission})

    def verdict(self) -> Verdict:
        return judge(self.task.verifier, self.submission, self.seen)


def _error(words: str) -> Observation:
    return Observation(f"error {words}", is_error=True)


def judge(verifier: dict[str, Any], answer: Sequence[str] | None, seen: set[Lookup]) -> Verdict:
    """Whether the answer is right (in any order where `unordered`) and what it follows from was looked up."""
    if answer is None:
        return Verdict(0.0, "no answer")
    expected = list(verifier["answer"])
    if (sorted(answer) if verifier["unordered"] else list(answer)) != (
        sorted(expected) if verifier["unordered"] else expected
    ):
        return Verdict(0.0, "wrong answer")
    missing = [lookup for lookup in verifier["lookups"] if (lookup[0], tuple(lookup[1])) not in seen]
    return Verdict(0.0, "guessed: not all was looked up") if missing else Verdict(1.0, "right")


@dataclass(frozen=True)
class Problem:
    """What a family asks: the user's words, the reference's look-ups in order, the answer, and how hard it is."""

    message: str
    initial_state: dict[str, Any]
    lookups: Sequence[Lookup]
    answer: Sequence[str]
    difficulty: dict[str, int | float | str]
    unordered: bool = False


def make_record(
    family: Any,
    template: str,
    seed: int,
    split: Split,
    problem: Problem,
    tools: Sequence[ToolDefinition],
    limits: Limits = STANDARD,
) -> TaskRecord:
    """The task record of a problem. `lookups` are what the verifier demands, and the reference solution."""
    by_name = {one.name: one for one in tools}
    calls = [call_of(by_name[name], values) for name, values in problem.lookups]
    return TaskRecord.make(
        environment=family.name,
        environment_version=family.version,
        generator_version=family.generator_version,
        seed=seed,
        template=template,
        difficulty=problem.difficulty,
        messages=[Message(role="user", content=problem.message)],
        tools=list(tools),
        initial_state=problem.initial_state,
        solution=[*calls, submission(problem.answer)],
        verifier={
            "kind": "lookups",
            "answer": list(problem.answer),
            "unordered": problem.unordered,
            "lookups": [[name, list(values)] for name, values in problem.lookups],
        },
        limits=limits,
        split=split,
        provenance={"generator": f"components.environments.{family.name}"},
    )


def check_version(family: Any, task: TaskRecord) -> None:
    """Raises ValueError for a task of another family or version."""
    if (task.environment, task.environment_version) != (family.name, family.version):
        raise ValueError(
            f"task {task.id[:12]} is of {task.environment} version {task.environment_version}, "
            f"this is {family.name} version {family.version}; generate the task set again with this version"
        )


class Conversation:
    """A scripted player's conversation in the making, through the episode: every reply is one that the tools gave."""

    def __init__(self, episode: LookupEpisode) -> None:
        self.episode, self.task = episode, episode.task
        self.tools = {one.name: one for one in self.task.tools}
        self.messages = list(self.task.messages)

    def look(self, name: str, *values: str, content: str = "") -> list[str]:
        """Make a look-up; the words of the reply. `content` is written before the call."""
        call = call_of(self.tools[name], values)
        self.messages.append(Message(role="assistant", content=content, tool_calls=[call]))
        reply = self.episode.step(call).content
        self.messages.append(Message(role="tool", content=reply))
        return reply.split()

    def submit(self, answer: Sequence[str], content: str = "") -> None:
        call = submission(answer)
        self.messages.append(Message(role="assistant", content=content, tool_calls=[call]))
        self.episode.step(call)

    def demonstration(self, kind: str) -> Demonstration:
        """The conversation as a demonstration of the teacher `kind`, judged by the verifier."""
        return Demonstration(
            task=self.task.id,
            template=self.task.template,
            kind=kind,
            passed=self.episode.verdict().passed,
            messages=self.messages,
            tools=self.task.tools,
            split="validation" if self.task.split == "validation" else "train",
        )


def fits(demonstration: Demonstration, limits: Limits) -> bool:
    """Whether the conversation stays within the limits of its task."""
    words, _ = conversation_words(demonstration.messages, demonstration.tools)
    turns = sum(message.role == "assistant" for message in demonstration.messages)
    return len(words) <= limits.tokens and turns <= limits.turns


def wording(openers: Sequence[str], askers: Sequence[str], rng: random.Random, **parts: str) -> tuple[str, int]:
    """One surface form of many: an opener and an asker of the family's paraphrase grammar, and its number."""
    number = rng.randrange(len(openers) * len(askers))
    text = f"{openers[number % len(openers)]} {askers[number // len(openers)]}"
    return " ".join(text.format(**parts).split()), number


def words_of(*texts: str) -> set[str]:
    """The words of wordings, without their placeholders."""
    return {word for text in texts for word in text.split() if not word.startswith("{")}


def tool_words(tools: Sequence[ToolDefinition]) -> set[str]:
    return {word for one in tools for word in (one.name, *one.input_schema["properties"])}
