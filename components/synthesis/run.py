"""Synthesis: environments -> a validated task set, demonstrations and long documents.

    python -m components.synthesis --config synthesis.yaml

Everything follows from the run's seed: the same seed, configuration and code give the same files, byte for byte.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from components.environments.chat_format import conversation_words
from components.runtime.contracts import Demonstration, Document, Pointer, TaskRecord
from components.runtime.stage import StageContext, StageResult
from components.runtime.task_set import BATTERY, write_task_set
from components.runtime.workers import Workers, tell
from components.synthesis.config import SynthesisConfig
from components.synthesis.family import Family, document_of, load_family
from components.synthesis.parts import PARTS, Made, Part
from components.synthesis.report import write_report


def run(config: SynthesisConfig, context: StageContext, inputs: dict[str, Pointer]) -> StageResult:
    """Make and publish the task set. Outputs: `tasks`.

    Raises InputError when a family is not installed, or cannot give what the configuration asks for.
    """
    families = [load_family(name) for name in config.environments]
    tasks: list[TaskRecord] = []
    long_tasks: list[TaskRecord] = []
    demonstrations: list[Demonstration] = []
    documents: list[Document] = []
    vocabulary: set[str] = set()
    reports: dict[str, Any] = {}
    for family, made in zip(families, make_families(families, config, context), strict=True):
        vocabulary.update(family.vocabulary())
        tasks += made.tasks
        long_tasks += made.long_tasks
        demonstrations += made.demonstrations
        documents += made.documents
        reports[family.name] = made.report
    _check_words(vocabulary, tasks + long_tasks, demonstrations, documents)

    directory = context.work_dir / "task-set"
    write_task_set(
        directory,
        tasks=tasks,
        long_tasks=long_tasks,
        demonstrations=demonstrations,
        documents=documents,
        vocabulary=vocabulary,
        battery=reports,
    )
    summary = _summary(tasks, long_tasks, demonstrations, documents, reports)
    context.tracker.metrics({name: value for name, value in summary.items() if isinstance(value, (int, float))}, 0)
    page = write_report(context.work_dir, summary, reports, families, tasks)
    for file in (directory / BATTERY, page):
        context.tracker.artifact(file)
    # A later run that starts from a model of this one holds the same templates out.
    split_seed = context.seed if config.split_seed is None else config.split_seed
    pointer = context.publish("task-set", directory, facts={**summary, "split_seed": split_seed})
    return StageResult({"tasks": pointer}, summary)


def work_of(family: Family, config: SynthesisConfig) -> int:
    """How many records the family shall give."""
    played = config.demonstrations + config.validation_demonstrations
    texts = config.documents + config.validation_documents + config.test_documents
    tasks = config.train_tasks + config.validation_tasks + config.test_tasks
    return (
        tasks + played + (config.long_tasks if family.long_templates() else 0) + (texts if document_of(family) else 0)
    )


def make_families(families: Sequence[Family], config: SynthesisConfig, context: StageContext) -> list[Made]:
    """What each family gives, in their order. Parts are made side by side; the number of workers changes nothing."""
    total, done = sum(work_of(family, config) for family in families), 0

    def hear(records: int) -> None:
        nonlocal done
        done += records
        context.progress.update(done, total, {})

    made = {family.name: Made() for family in families}
    jobs = [(family.name, part) for part in PARTS for family in families]
    workers = min(config.workers or len(os.sched_getaffinity(0)), len(jobs))
    with Workers(workers) as pool:
        results = pool.run([partial(_make, name, part, config, context.seed) for name, part in jobs], hear)
    for (name, _), result in zip(jobs, results, strict=True):
        made[name].add(result)
    return list(made.values())


def _make(name: str, part: Part, config: SynthesisConfig, seed: int) -> Made:
    return part(load_family(name), config, seed, lambda: tell(1))


def _check_words(
    vocabulary: set[str], tasks: list[TaskRecord], demonstrations: list[Demonstration], documents: list[Document]
) -> None:
    """Every word that a model will read is in the vocabulary; a missing one would silently become <|unknown|>."""
    words = {word for task in tasks for message in task.messages for word in message.content.split()}
    for demonstration in demonstrations:
        words.update(conversation_words(demonstration.messages, demonstration.tools)[0])
    for document in documents:
        words.update(document.words)
    missing = sorted(word for word in words - vocabulary if not word.startswith("<|"))
    if missing:
        raise RuntimeError(f"words outside the environments' vocabulary(): {' '.join(missing[:20])}")


def _summary(
    tasks: list[TaskRecord],
    long_tasks: list[TaskRecord],
    demonstrations: list[Demonstration],
    documents: list[Document],
    reports: dict[str, Any],
) -> dict[str, Any]:
    splits = Counter(task.split for task in tasks)
    return {
        **{f"{split}_tasks": splits[split] for split in ("train", "validation", "test")},
        "long_tasks": len(long_tasks),
        "test_templates": len({task.template for task in tasks if task.split == "test"}),
        "demonstrations": len(demonstrations),
        "wrong_share": sum(not demonstration.passed for demonstration in demonstrations) / len(demonstrations),
        "demonstration_kinds": dict(sorted(Counter(demonstration.kind for demonstration in demonstrations).items())),
        "documents": len(documents),
        "battery_checked": sum(report["checked"] for report in reports.values()),
        "battery_removed": {
            check: sum(report["removed"][check] for report in reports.values())
            for check in next(iter(reports.values()))["removed"]
        },
        "near_duplicates": {
            split: sum(report["near_duplicates"]["removed"][split] for report in reports.values())
            for split in ("test", "validation", "train")
        },
        "families": {
            name: {player: numbers["pass_at_1"] for player, numbers in report["players"].items()}
            for name, report in reports.items()
        },
        "mutants_failed_share": min(report["mutants_failed_share"] for report in reports.values()),
    }
