"""What synthesis needs of an environment beyond the protocol: teachers that demonstrate it, and documents."""

from __future__ import annotations

import random
from typing import Literal, Protocol, cast

from components.environments.protocol import Environment, environment
from components.runtime.contracts import Demonstration, Document, TaskRecord
from components.runtime.errors import InputError

Split = Literal["train", "validation", "test"]
CAREFUL = "careful"  # the one teacher that every family has and that is always right


class Family(Environment, Protocol):
    def describe(self, template: str) -> dict[str, int | str]:
        """Operator and hops of a template: splits hold out templates of each kind."""
        ...

    def long_templates(self) -> list[str]: ...
    def wrong_kinds(self, task: TaskRecord) -> list[str]:
        """Teachers other than `careful` that apply to this task."""
        ...

    def play(self, task: TaskRecord, kind: str, rng: random.Random) -> Demonstration: ...
    def document(self, seed: int, split: Split, words: int) -> Document: ...


def load_family(name: str) -> Family:
    """The installed family `name`. Raises InputError that lists what is installed."""
    try:
        found = environment(name)
    except ValueError as error:
        raise InputError(f"synthesis: {error}") from error
    needed = ("describe", "long_templates", "wrong_kinds", "play", "document")
    missing = [part for part in needed if not hasattr(found, part)]
    if missing:
        raise InputError(f"the environment {name!r} cannot be synthesised from: it lacks {', '.join(missing)}")
    return cast(Family, found)
