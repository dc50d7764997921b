"""Synthesis: environments -> a validated task set, demonstrations and long documents.

    python -m components.synthesis --config synthesis.yaml

Everything follows from the run's seed: the same seed, configuration and code give the same files, byte for byte.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from components.environments.chat_format import conversation_words
from components.runtime.contracts import Demonstration, Document, Pointer, TaskRecord
from components.runtime.errors import InputError
from components.runtime.processes import die_with_parent
from components.runtime.stage import StageContext, StageResult
from components.runtime.task_set import BATTERY, write_task_set
from components.synthesis.battery import Battery, constant_submissions
from components.synthesis.config import SynthesisConfig
from components.synthesis.demonstrations import make_demonstrations
from components.synthesis.family import Family, Split, document_of, load_family
from components.synthesis.near_duplicates import ngram_overlap, remove_near_duplicates
from components.synthesis.players import play_all
from components.synthesis.report import write_report
from components.synthesis.splits import draw_template, groups_of_templates, kinds_of_template, split_templates
from components.synthesis.tasks import make_tasks

_PROGRESS_SECONDS = 0.25
_PROBE_TASKS = 500  # tasks from which the constant player learns its answers


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


@dataclass
class Made:
    """What one family gave."""

    tasks: list[TaskRecord] = field(default_factory=list)
    long_tasks: list[TaskRecord] = field(default_factory=list)
    demonstrations: list[Demonstration] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


def work_of(family: Family, config: SynthesisConfig) -> int:
    """How many records the family shall give."""
    played = config.demonstrations + config.validation_demonstrations
    texts = config.documents + config.validation_documents + config.test_documents
    tasks = config.train_tasks + config.validation_tasks + config.test_tasks
    return (
        tasks + played + (config.long_tasks if family.long_templates() else 0) + (texts if document_of(family) else 0)
    )


def make_families(families: Sequence[Family], config: SynthesisConfig, context: StageContext) -> list[Made]:
    """What each family gives, in their order. Families are made side by side; the number of workers changes nothing."""
    total = sum(work_of(family, config) for family in families)
    workers = min(config.workers or len(os.sched_getaffinity(0)), len(families))
    if workers == 1:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            context.progress.update(done, total, {})

        return [make_family(family, config, context.seed, tick) for family in families]
    spawn = multiprocessing.get_context("spawn")
    counter = spawn.Value("L", 0)
    with ProcessPoolExecutor(workers, spawn, _begin_worker, (counter,)) as pool:
        waiting = {pool.submit(_make_in_worker, family.name, config, context.seed): family.name for family in families}
        results: dict[str, Made] = {}
        while waiting:
            ended, _ = wait(waiting, timeout=_PROGRESS_SECONDS, return_when=FIRST_COMPLETED)
            context.progress.update(counter.value, total, {})
            for future in ended:
                try:
                    results[waiting.pop(future)] = future.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return [results[family.name] for family in families]


_counter: Any = None  # of a worker process: records made by all of them


def _begin_worker(counter: Any) -> None:
    global _counter
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's decision
    _counter = counter


def _make_in_worker(name: str, config: SynthesisConfig, seed: int) -> Made:
    def tick() -> None:
        with _counter.get_lock():
            _counter.value += 1

    return make_family(load_family(name), config, seed, tick)


def make_family(family: Family, config: SynthesisConfig, seed: int, tick: Callable[[], None]) -> Made:
    """All records of one family. Raises InputError when it cannot give what the configuration asks for."""
    made = Made()
    held_out = (config.validation_templates, config.test_templates)
    if len(groups_of_templates(family, family.templates())) < len(family.templates()):
        held_out = (config.validation_environments, config.test_environments)
    splits = split_templates(family, seed if config.split_seed is None else config.split_seed, *held_out)
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

    numbers: dict[Split, int] = {"train": config.demonstrations, "validation": config.validation_demonstrations}
    for split, number in numbers.items():
        made.demonstrations += make_demonstrations(
            family, splits[split], number, config.wrong_share, config.shortcut_share, split, seed, tick
        )
    document = document_of(family)
    if document:
        made.documents = _make_documents(family.name, document, config, seed, tick)

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


def _make_documents(
    name: str,
    document: Callable[[int, Split, int], Document],
    config: SynthesisConfig,
    seed: int,
    tick: Callable[[], None],
) -> list[Document]:
    made = []

    rng = random.Random(f"synthesis/{name}/documents/{seed}")
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
                made.append(document(rng.getrandbits(48), split, words))
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
