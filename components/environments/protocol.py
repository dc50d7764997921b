"""What an environment is. A family of tasks is one class with these methods, named by an entry point.

[project.entry-points."sparseline.environments"]
my_family = "my_package.my_module:MyFamily"
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

from components.runtime.contracts import TaskRecord, ToolCall, ToolDefinition


@dataclass(frozen=True)
class Observation:
    """What a tool call gave back. Errors are data (`is_error`), never exceptions."""

    content: str
    done: bool = False
    is_error: bool = False


@dataclass(frozen=True)
class Verdict:
    """The verifier's judgement of an episode: reward is 0.0 or 1.0, reason says why in a few words."""

    reward: float
    reason: str

    @property
    def passed(self) -> bool:
        return self.reward == 1.0


class Episode(Protocol):
    """One play of one task. State is a value: equal states have equal hashes."""

    def step(self, call: ToolCall) -> Observation: ...
    def state_hash(self) -> str: ...
    def verdict(self) -> Verdict: ...


class Environment(Protocol):
    """A family of tasks."""

    name: str
    version: str

    def tools(self) -> list[ToolDefinition]: ...
    def vocabulary(self) -> list[str]:
        """Every word that prompts, tool results and right answers of this family can contain."""
        ...

    def templates(self) -> list[str]:
        """Every program (operators, hops, relations) that the generator can make, in a fixed order."""
        ...

    def generate(self, template: str, seed: int, split: str) -> TaskRecord: ...
    def reset(self, task: TaskRecord) -> Episode: ...
    def random_call(self, task: TaskRecord, rng: random.Random) -> ToolCall:
        """A call as a player without knowledge would make it (the validation battery plays it)."""
        ...


def environments() -> dict[str, EntryPoint]:
    """Entry points of all installed families by name. Raises ValueError when two packages claim one name."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group="sparseline.environments"):
        if entry.name in found:
            raise ValueError(f"two installed packages define the environment {entry.name!r}; uninstall one of them")
        found[entry.name] = entry
    return found


def environment(name: str) -> Environment:
    """The family `name`. Raises ValueError that lists what is installed; a broken one breaks nothing but itself."""
    found = environments()
    if name not in found:
        raise ValueError(f"unknown environment {name!r}; installed: {', '.join(sorted(found)) or 'none'}")
    made: Environment = found[name].load()()
    return made
