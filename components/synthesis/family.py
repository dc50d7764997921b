"""What synthesis needs of an environment beyond the protocol: teachers that demonstrate it, perhaps documents."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal, Protocol, cast

from components.environments.protocol import Environment, environment
from components.runtime.contracts import Demonstration, Document, TaskRecord
from components.runtime.errors import InputError

Split = Literal["train", "validation", "test"]
CAREFUL = "careful"  # the one teacher that every family has and that is always right


class Family(Environment, Protocol):
    def describe(self, template: str) -> dict[str, int | str]:
        """Operator and hops of a template: splits hold out templates of each kind. A `group`, where there is one, is
        held out as a whole (an environment of the grammar, with all its templates)."""
        ...

    def long_templates(self) -> list[str]: ...
    def wrong_kinds(self, task: TaskRecord) -> list[str]:
        """Teachers other than `careful` that apply to this task."""
        ...

    def play(self, task: TaskRecord, kind: str, rng: random.Random) -> Demonstration: ...


def shortcut_of(family: Family, template: str) -> str | None:
    """The wrong teacher that most demonstrations of this template follow; None where the careful ones are the majority.

    Optional method `shortcut` of a family. Imitation alone learns the shortcut there; only reward can unlearn it.
    """
    find: Callable[[str], str | None] | None = getattr(family, "shortcut", None)
    return find(template) if find else None


def document_of(family: Family) -> Callable[[int, Split, int], Document] | None:
    """The family's optional method `document(seed, split, words)`: a long text with questions at its end."""
    return getattr(family, "document", None)


def load_family(name: str) -> Family:
    """The installed family `name`. Raises InputError that lists what is installed."""
    try:
        found = environment(name)
    except ValueError as error:
        raise InputError(f"synthesis: {error}") from error
    needed = ("describe", "long_templates", "wrong_kinds", "play")
    missing = [part for part in needed if not hasattr(found, part)]
    if missing:
        raise InputError(f"the environment {name!r} cannot be synthesised from: it lacks {', '.join(missing)}")
    return cast(Family, found)
