"""Evaluation: held-out tasks with the models before and after RL, and the sparse attention on held-out documents.

python -m components.evaluation --config evaluation.yaml
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from components.evaluation import long_context
from components.evaluation.compare import Bootstrap
from components.evaluation.config import EvaluationConfig
from components.evaluation.measures import SAMPLED, best_temperature, measure
from components.evaluation.page import write_evaluation_page
from components.evaluation.play import Item, Player, logprob_gap, play, write_items
from components.evaluation.report import ITEMS_FILE, CrossEntropy, EvaluationReport, IndexerRecall
from components.rollouts import EpisodeResult
from components.rollouts.loop import episode_trace, transcript
from components.runtime.contracts import Document, Pointer, TaskRecord
from components.runtime.stage import StageContext, StageResult
from components.runtime.task_set import read_documents, read_long_tasks, read_tasks
from model.engine import Trajectory


def run(config: EvaluationConfig, context: StageContext, inputs: dict[str, Pointer]) -> StageResult:
    """Stage `evaluation`. inputs: tasks, before, after; outputs: evaluation (evaluation.json, items.parquet).

    Raises InputError when the task set has too little for what the configuration asks, or a checkpoint is damaged.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    task_set = context.fetch(inputs["tasks"])
    before = Player.load("before", context.fetch(inputs["before"]), inputs["before"].sha256)
    after = Player.load("after", context.fetch(inputs["after"]), inputs["after"].sha256)
    bootstrap = Bootstrap(config.resamples, config.confidence, context.seed)
    tasks = first_of_each_family(read_tasks(task_set, "test"), config.pairs)

    games = _Games(config, context, inputs["tasks"].sha256)
    for name, temperature in (("sampled", SAMPLED), ("greedy", 0.0)):
        for player in (before, after):
            games.play(player, tasks, name, temperature)
    _best_temperature(games, before, task_set, tasks, bootstrap)
    few = first_of_each_family(of_main_measure(tasks, config.separate), config.curve_tasks)
    long = first_of_each_family(read_long_tasks(task_set), config.long_tasks)
    for player in (before, after):
        games.play(player, few, "samples", SAMPLED, config.curve_samples)
        games.play(player, long, "long", SAMPLED)
    ce, ce_answers, recall, documents = _long_context(after, task_set, config, context, bootstrap)

    report = EvaluationReport(
        tasks=inputs["tasks"],
        before=inputs["before"],
        candidate=inputs["after"],
        code=context.code,
        seed=context.seed,
        max_sequences=config.max_sequences,
        separate=config.separate,
        confidence=config.confidence,
        resamples=config.resamples,
        top_k=after.model.config.index_topk,
        document_words=max(len(document.words) for document in documents),
        **measure(games.items, bootstrap, config.separate),
        ce=ce,
        ce_answers=ce_answers,
        indexer_recall=recall,
        logprob_gap=max(logprob_gap(player.model, games.trajectories[player.name]) for player in (before, after)),
    )
    directory = context.work_dir / "evaluation"
    directory.mkdir(exist_ok=True)
    report.write(directory)
    write_items(games.items, directory / ITEMS_FILE)
    page = write_evaluation_page(context.work_dir, report, games.items)
    for file in (directory / "evaluation.json", page):
        context.tracker.artifact(file)
    summary = summarise(report)
    context.tracker.metrics(_numbers(summary), 0)
    pointer = context.publish("evaluation", directory, parents=list(inputs.values()))
    return StageResult({"evaluation": pointer}, summary)


def first_of_each_family(tasks: Sequence[TaskRecord], number: int) -> list[TaskRecord]:
    """The first `number` tasks of each family. Synthesis deals templates in turn, so they share alike."""
    taken: dict[str, list[TaskRecord]] = {}
    for task in tasks:
        of_family = taken.setdefault(task.environment, [])
        if len(of_family) < number:
            of_family.append(task)
    return [task for family in sorted(taken) for task in taken[family]]


def of_main_measure(tasks: Sequence[TaskRecord], separate: Sequence[str]) -> list[TaskRecord]:
    """The tasks of the families that the macro mean is over; all of them where there are no others."""
    return [task for task in tasks if task.environment not in separate] or list(tasks)


class _Games:
    """Plays, and keeps every record; the display shows an episode now and then."""

    def __init__(self, config: EvaluationConfig, context: StageContext, task_set: str) -> None:
        self.config, self.context, self.task_set = config, context, task_set
        self.items: list[Item] = []
        self.trajectories: dict[str, list[Trajectory]] = {}

    def play(
        self, player: Player, tasks: Sequence[TaskRecord], measure: str, temperature: float, samples: int = 1
    ) -> None:
        if not tasks:
            return
        self.context.progress.phase(f"{measure} play, {player.name}, temperature {temperature:g}")
        items, trajectories = play(
            player,
            tasks,
            measure=measure,
            temperature=temperature,
            seed=self.context.seed,
            max_sequences=self.config.max_sequences,
            samples=samples,
            task_set=self.task_set,
            code=self.context.code,
            on_episode=self._shower(len(tasks) * samples),
        )
        if measure == "sampled" and temperature == SAMPLED:
            self.trajectories[player.name] = trajectories[: self.config.logprob_trajectories]
        self.items += items

    def _shower(self, total: int) -> Callable[[EpisodeResult], None]:
        done, passed = 0, 0

        def show(result: EpisodeResult) -> None:
            nonlocal done, passed
            done, passed = done + 1, passed + result.verdict.passed
            self.context.progress.update(done, total, {"pass@1": passed / done})
            if done % 50 == 1:
                self.context.progress.episode(transcript(result))
            if done % 500 == 1:
                self.context.tracker.trace(episode_trace(result))

        return show


def _best_temperature(
    games: _Games, before: Player, task_set: Path, tasks: Sequence[TaskRecord], bootstrap: Bootstrap
) -> None:
    """The model before RL at its best validation temperature, so that RL is not credited for a sharper distribution."""
    validation = first_of_each_family(
        of_main_measure(read_tasks(task_set, "validation"), games.config.separate), games.config.validation_tasks
    )
    for temperature in dict.fromkeys(games.config.temperatures):
        games.play(before, validation, "validation", temperature)
    best = best_temperature(games.items, bootstrap, games.config.separate)
    if best != SAMPLED:
        games.play(before, tasks, "sampled", best)


def _long_context(
    after: Player, task_set: Path, config: EvaluationConfig, context: StageContext, bootstrap: Bootstrap
) -> tuple[CrossEntropy, CrossEntropy, IndexerRecall, list[Document]]:
    """Cross-entropy by kind of attention (all words, answers), and the indexer's recall."""
    documents = read_documents(task_set, "test")[: config.documents]
    validation = read_documents(task_set, "validation")[: config.validation_documents]
    context.progress.phase("long documents")
    total, done = (len(long_context.KINDS) + 1) * len(documents) + len(validation), 0

    def tick(number: int) -> None:
        nonlocal done
        done += number
        context.progress.update(done, total)

    by_kind = {
        kind: long_context.losses(
            after.model, after.tokenizer, documents, kind, batch=config.document_batch, seed=context.seed, tick=tick
        )
        for kind in long_context.KINDS
    }
    found = {
        split: long_context.evidence_found(after.model, after.tokenizer, group, batch=config.document_batch, tick=tick)
        for split, group in (("validation", validation), ("test", documents))
    }
    recall = long_context.indexer_recall(
        found["validation"], found["test"], bootstrap, top_k=after.model.config.index_topk
    )
    return (
        long_context.cross_entropy(by_kind, bootstrap, answers_only=False),
        long_context.cross_entropy(by_kind, bootstrap, answers_only=True),
        recall,
        documents,
    )


def summarise(report: EvaluationReport) -> dict[str, Any]:
    """The key numbers; evaluation.json has the rest."""

    def numbers(ce: CrossEntropy) -> dict[str, Any]:
        means = {kind: getattr(ce, kind) for kind in long_context.KINDS}
        return means | {"gap": ce.gap.mean, "window_gap": ce.window_gap.mean, "random_gap": ce.random_gap.mean}

    recall = report.indexer_recall
    rates = report.pass_at_1.model_dump(exclude_none=True)
    over = report.pass_at_1.before_best_temperature.difference
    rates["over_best_temperature"] = over.model_dump()
    summary: dict[str, Any] = {
        "pass_at_1": rates,
        "faults": len(report.faults),
        "greedy": {
            "before": report.greedy.before.macro,
            "after": report.greedy.after.macro,
            "difference": report.greedy.difference.model_dump(),
        },
        "ce": numbers(report.ce) | {"answers": numbers(report.ce_answers)},
        # the evidence is the word that states the answer: the fact's subject and relation stand in the question too
        "indexer_recall": recall.answer_word.mean,
        "indexer_recall_whole_fact": recall.all_words.mean,
        "indexer_layer": recall.answer_layer,
        "logprob_gap": report.logprob_gap,
        "templates": report.templates,
        "top_k": report.top_k,
        "document_words": report.document_words,
    }
    if report.pass_at_1_long:
        summary["pass_at_1_long"] = report.pass_at_1_long.model_dump()
    return summary


def _numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a nested summary under a dotted name."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)):
            found[f"{prefix}{name}"] = float(value)
    return found
