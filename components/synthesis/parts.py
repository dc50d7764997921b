"""What is made of one family: tasks past the battery, demonstrations, documents. Each part on its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from components.runtime.contracts import Demonstration, Document, TaskRecord
from components.runtime.errors import InputError
from components.synthesis.battery import Battery, constant_submissions
from components.synthesis.config import SynthesisConfig
from components.synthesis.demonstrations import make_demonstrations
from components.synthesis.family import Family, Split, document_of
from components.synthesis.near_duplicates import ngram_overlap, remove_near_duplicates
from components.synthesis.players import play_all
from components.synthesis.splits import draw_template, groups_of_templates, kinds_of_template, split_templates
from components.synthesis.tasks import make_tasks

_PROBE_TASKS = 500  # tasks from which the constant player learns its answers


@dataclass
class Made:
    """What one family gave, or one part of its work."""

    tasks: list[TaskRecord] = field(default_factory=list)
    long_tasks: list[TaskRecord] = field(default_factory=list)
    demonstrations: list[Demonstration] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Made) -> None:
        self.tasks += other.tasks
        self.long_tasks += other.long_tasks
        self.demonstrations += other.demonstrations
        self.documents += other.documents
        self.report.update(other.report)


def splits_of(family: Family, config: SynthesisConfig, seed: int) -> dict[Split, list[str]]:
    """The family's templates by split."""
    held_out = (config.validation_templates, config.test_templates)
    if len(groups_of_templates(family, family.templates())) < len(family.templates()):
        held_out = (config.validation_environments, config.test_environments)
    return split_templates(family, seed if config.split_seed is None else config.split_seed, *held_out)


def make_tasks_of(family: Family, config: SynthesisConfig, seed: int, tick: Callable[[], None]) -> Made:
    """Tasks past the battery and its report. Raises InputError when the family cannot give what is asked for."""
    made = Made()
    splits = splits_of(family, config, seed)
    battery = battery_of(family, splits["train"], config, seed)
    sizes: dict[Split, int] = {
        "train": config.train_tasks,
        "validation": config.validation_tasks,
        "test": config.test_tasks,
    }
    for split, size in sizes.items():
        made.tasks += make_tasks(family, splits[split], size, split, seed, battery, tick)
    long_templates = family.long_templates()
    if config.long_tasks and long_templates:
        made.long_tasks = make_tasks(family, long_templates, config.long_tasks, "test", seed, battery, tick)

    overlap = ngram_overlap(made.tasks)
    made.tasks, lost = remove_near_duplicates(made.tasks, config.near_duplicate)
    made.report = battery.report()
    made.report["near_duplicates"] = {"removed": lost, "test_sharing_13_words_with_train": overlap}
    made.report["players"] = play_all(
        family, [task for task in made.tasks if task.split == "test"][: config.player_tasks]
    )
    made.report["templates"] = {split: len(names) for split, names in splits.items()}
    made.report["templates_in_two_splits"] = _shared_templates(made.tasks + made.long_tasks)
    if made.report["templates_in_two_splits"]:
        raise RuntimeError(f"{family.name}: the splits share templates: {made.report['templates_in_two_splits']}")
    return made


def make_demonstrations_of(family: Family, config: SynthesisConfig, seed: int, tick: Callable[[], None]) -> Made:
    made = Made()
    splits = splits_of(family, config, seed)
    numbers: dict[Split, int] = {"train": config.demonstrations, "validation": config.validation_demonstrations}
    for split, number in numbers.items():
        made.demonstrations += make_demonstrations(
            family, splits[split], number, config.wrong_share, config.shortcut_share, split, seed, tick
        )
    return made


def make_documents_of(family: Family, config: SynthesisConfig, seed: int, tick: Callable[[], None]) -> Made:
    made = Made()
    document = document_of(family)
    if document is None:
        return made
    rng = random.Random(f"synthesis/{family.name}/documents/{seed}")
    texts: dict[Split, int] = {
        "train": config.documents,
        "validation": config.validation_documents,
        "test": config.test_documents,
    }
    for split, size in texts.items():
        lengths = [config.document_words, *(config.short_document_words if split == "train" else [])]
        for index in range(size):
            try:
                words = lengths[index % len(lengths)]
                made.documents.append(document(rng.getrandbits(48), split, words))
            except ValueError as error:
                raise InputError(f"synthesis: document_words: {error}") from error
            tick()
    return made


def battery_of(family: Family, train_templates: list[str], config: SynthesisConfig, seed: int) -> Battery:
    """The validation battery; its constant player has seen tasks of `train_templates`."""
    constant = _constant_player(family, train_templates, seed)
    return Battery(family, constant, config.mutants, config.random_plays)


def _constant_player(family: Family, templates: list[str], seed: int) -> Any:
    rng = random.Random(f"synthesis/{family.name}/constant/{seed}")
    groups = kinds_of_template(family, templates)
    drawn = [family.generate(draw_template(groups, rng), rng.getrandbits(48), "train") for _ in range(_PROBE_TASKS)]
    return constant_submissions(drawn)


def _shared_templates(tasks: list[TaskRecord]) -> list[str]:
    splits: dict[str, set[str]] = {}
    for task in tasks:
        splits.setdefault(task.template, set()).add(task.split)
    return sorted(template for template, found in splits.items() if len(found) > 1)


# What a family's work falls into. Each part has its own random numbers and needs none of the others, so that a family
# that runs code, the slowest by far, does not leave the other cores idle.
Part = Callable[[Family, SynthesisConfig, int, Callable[[], None]], Made]
PARTS: tuple[Part, ...] = (make_tasks_of, make_demonstrations_of, make_documents_of)
