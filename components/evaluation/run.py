"""Evaluation: held-out tasks with the models before and after RL, and the sparse attention on held-out documents.

python -m components.evaluation --config evaluation.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from components.evaluation import long_context
from components.evaluation.compare import Bootstrap
from components.evaluation.config import EvaluationConfig
from components.evaluation.games import Game, Games, Reading
from components.evaluation.measures import SAMPLED, best_temperature, measure
from components.evaluation.page import write_evaluation_page
from components.evaluation.play import write_items
from components.evaluation.report import ITEMS_FILE, CrossEntropy, EvaluationReport
from components.runtime.contracts import Pointer, TaskRecord
from components.runtime.stage import StageContext, StageResult
from components.runtime.task_set import read_documents, read_long_tasks, read_tasks


def run(config: EvaluationConfig, context: StageContext, inputs: dict[str, Pointer]) -> StageResult:
    """Stage `evaluation`. inputs: tasks, before, after; outputs: evaluation (evaluation.json, items.parquet).

    Raises InputError when the task set has too little for what the configuration asks, or a checkpoint is damaged.
    """
    task_set = context.fetch(inputs["tasks"])
    checkpoints = {name: (context.fetch(inputs[name]), inputs[name].sha256) for name in ("before", "after")}
    bootstrap = Bootstrap(config.resamples, config.confidence, context.seed)
    tasks = first_of_each_family(read_tasks(task_set, "test"), config.pairs)
    few = first_of_each_family(of_main_measure(tasks, config.separate), config.curve_tasks)
    long = first_of_each_family(read_long_tasks(task_set), config.long_tasks)
    reading = Reading(
        read_documents(task_set, "test")[: config.documents],
        read_documents(task_set, "validation")[: config.validation_documents],
    )

    with Games(config, context, inputs["tasks"].sha256, checkpoints) as games:
        # the model before RL at its best validation temperature, so that RL is not credited for a sharper distribution
        validation = of_main_measure(read_tasks(task_set, "validation"), config.separate)
        validation = first_of_each_family(validation, config.validation_tasks)
        temperatures = dict.fromkeys(config.temperatures)
        tried, _ = games.play("validation plays", [Game("before", validation, "validation", t) for t in temperatures])
        items = [item for played in tried for item in played.items]
        best = best_temperature(items, bootstrap, config.separate)
        held_out = [Game(player, tasks, "sampled", SAMPLED) for player in checkpoints]
        if best != SAMPLED:
            held_out.append(Game("before", tasks, "sampled", best))
        for player in checkpoints:
            held_out += [
                Game(player, tasks, "greedy", 0.0),
                Game(player, few, "samples", SAMPLED, config.curve_samples),
                Game(player, long, "long", SAMPLED),
            ]
        played, found = games.play("held-out plays", held_out, reading)
    assert found is not None
    items += [item for one in played for item in one.items]
    recall = long_context.indexer_recall(found.validation, found.test, bootstrap, top_k=found.top_k)

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
        top_k=found.top_k,
        document_words=max(len(document.words) for document in reading.documents),
        **measure(items, bootstrap, config.separate),
        ce=long_context.cross_entropy(found.by_kind, bootstrap, answers_only=False),
        ce_answers=long_context.cross_entropy(found.by_kind, bootstrap, answers_only=True),
        indexer_recall=recall,
        logprob_gap=max(one.logprob_gap for one in played),
    )
    directory = context.work_dir / "evaluation"
    directory.mkdir(exist_ok=True)
    report.write(directory)
    write_items(items, directory / ITEMS_FILE)
    page = write_evaluation_page(context.work_dir, report, items)
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
