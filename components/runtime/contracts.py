"""The contracts between stages: what is written by one and read by another.

Every type forbids unknown keys, so that a typo is an error where it is made and not three stages later.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Contract(BaseModel):
    """Base of all contracts: unknown keys are errors, instances are immutable values."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN. The basis of every identity hash."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


class Pointer(Contract):
    """What travels through KFP in place of the data: where an artifact lies and the hash of its manifest."""

    kind: Literal["task-set", "checkpoint", "evaluation", "gate", "report", "step-record"]
    uri: str = Field(description="prefix that holds manifest.json, e.g. s3://bucket/prefix or file:///dir")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="sha256 of manifest.json")


class ManifestFile(Contract):
    path: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(Contract):
    """manifest.json of every published artifact; written last, so that its presence means the artifact is whole."""

    format: Literal["sparseline/1"] = "sparseline/1"
    kind: str
    stage: str
    files: list[ManifestFile]
    parents: list[Pointer] = Field(default_factory=list)
    run: dict[str, str] = Field(default_factory=dict, description="run ids: sparseline, mlflow, kfp")
    facts: dict[str, Any] = Field(default_factory=dict, description="small facts a reader wants without the data")


class ToolDefinition(Contract):
    """One definition of a tool, rendered to OpenAI `tools`, to MCP and to the chat template."""

    name: str
    description: str
    input_schema: dict[str, Any] = Field(description="JSON Schema 2020-12 of the arguments object")

    def openai(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": function}


class ToolCall(Contract):
    name: str
    arguments: dict[str, Any]


class Message(Contract):
    """One chat message. An assistant message has content, tool_calls, or both; a tool message answers a call."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    tool_calls: list[ToolCall] = Field(default_factory=list)


class Limits(Contract):
    turns: int = Field(ge=1, description="assistant turns in an episode")
    tokens: int = Field(ge=1, description="tokens of the whole trajectory, prompt included")


class TaskRecord(Contract):
    """A verifiable task: everything needed to play it and to judge the play."""

    id: str = Field(description="sha256 of the canonical JSON of all fields but id and stats")
    environment: str
    environment_version: str
    generator_version: str
    seed: int
    template: str = Field(description="program behind the wording (operators, hops, relations): the unit of a split")
    difficulty: dict[str, int | float | str]
    messages: list[Message]
    tools: list[ToolDefinition]
    initial_state: dict[str, Any] = Field(description="the value that `reset` turns into the hidden state")
    solution: list[ToolCall] = Field(description="tool calls of the reference solver")
    verifier: dict[str, Any] = Field(description="kind and arguments of the verifier, on canonical values")
    limits: Limits
    split: Literal["train", "validation", "test"]
    provenance: dict[str, str] = Field(default_factory=dict)
    stats: dict[str, float] = Field(default_factory=dict)

    @staticmethod
    def make(**fields: Any) -> TaskRecord:
        """Build a record and give it its id."""
        record = TaskRecord(id="", **fields)
        return record.model_copy(update={"id": record.identity()})

    def identity(self) -> str:
        return digest(self.model_dump(mode="json", exclude={"id", "stats"}))


class Demonstration(Contract):
    """A played task, by a scripted teacher; text to continue pre-training on, right or wrong."""

    task: str = Field(description="id of the task record")
    template: str
    kind: str = Field(description="the teacher's behaviour, e.g. careful, stops_early")
    passed: bool
    messages: list[Message] = Field(description="the whole conversation, the task's own messages first")
    tools: list[ToolDefinition]
    split: Literal["train", "validation"]


class Question(Contract):
    """A question at the end of a document, as word positions into `Document.words`."""

    answer_start: int = Field(ge=1, description="position of the first answer word")
    answer_end: int = Field(description="one past the last answer word")
    evidence: list[int] = Field(description="positions of the words of the evidence")


class Document(Contract):
    """A long text whose last questions can only be answered from facts far before them."""

    id: str
    words: list[str]
    questions: list[Question]
    split: Literal["train", "validation", "test"]


class Interval(Contract):
    mean: float
    low: float
    high: float
    n: int = Field(ge=0)


class GateRule(Contract):
    name: str
    holds: bool
    value: float
    bound: float
    explanation: str


class GateVerdict(Contract):
    verdict: Literal["promoted", "rejected", "unchanged"]
    candidate: Pointer
    baseline: Pointer
    rules: list[GateRule]
