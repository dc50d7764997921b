"""Post-training by reinforcement learning (GRPO, arXiv 2512.02556, section 3.1): rollouts in real environments.

    python -m components.post_training --config post_training.yaml

Prompt groups are played, judged by the environments' verifiers, and trained on in a few mini-batches. The published
checkpoint is the best one on a validation split, and the ledger beside it tells what became of every group.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer

from components.environments.chat_format import UNKNOWN
from components.environments.protocol import Environment, environment
from components.post_training.config import PostTrainingConfig
from components.post_training.curation import PromptSampler, balanced, by_family
from components.post_training.flow import Flow
from components.post_training.ledger import Ledger
from components.post_training.records import StepRecorder
from components.post_training.report import write_report
from components.post_training.resume import Resume
from components.post_training.schedule import SCHEDULES, LocalPool, Pool
from components.post_training.trainer import Learner
from components.post_training.training import train
from components.post_training.worker import RolloutWorker
from components.runtime.contracts import Limits, Pointer, TaskRecord
from components.runtime.errors import InputError
from components.runtime.processes import threads_of_each
from components.runtime.ranks import Ranks, open_ranks
from components.runtime.stage import StageContext, StageResult
from components.runtime.task_set import read_tasks, read_vocabulary
from components.runtime.tracking import read_metrics
from model.checkpoint import CheckpointError, copy_tokenizer, load_model, load_tokenizer, save_model


def run(config: PostTrainingConfig, context: StageContext, inputs: dict[str, Pointer]) -> StageResult:
    """Inputs: `tasks`, `checkpoint`. Outputs: `checkpoint`, and `step_N` for each step that was recorded."""
    _set_threads(config)
    tasks_directory, start = context.fetch(inputs["tasks"]), context.fetch(inputs["checkpoint"])
    tasks, validation = chosen_tasks(tasks_directory, config)
    names = sorted({task.environment for task in [*tasks, *validation]})
    longest = max(task.limits.tokens for task in [*tasks, *validation])
    try:
        tokenizer = load_tokenizer(start)
        check_words(read_vocabulary(tasks_directory), tokenizer, inputs["checkpoint"].uri)
        model, environments = load_model(start), installed(names)
    except CheckpointError as error:
        raise InputError(f"checkpoint {inputs['checkpoint'].uri}: {error}") from error
    ledger_path = context.work_dir / "ledger.jsonl"
    ledger_path.unlink(missing_ok=True)
    ledger = Ledger(ledger_path)
    sampler = PromptSampler(tasks, config.group_size, f"{context.seed}/post_training")
    flow, rng = Flow(config, sampler, ledger), random.Random(f"{context.seed}/post_training")
    recorder = StepRecorder(context, config, inputs)
    resume = Resume(context, context.identity(config, inputs), config.state_seconds)
    try:
        with open_ranks(config.processes, context.work_dir, follow, config, start, names, longest) as ranks:
            learner = Learner(config, model, ranks)
            worker = RolloutWorker(config, model, tokenizer, environments, longest, ranks)
            course = resume.load(learner, sampler, ledger, recorder, rng)
            worker.load(learner.version)

            def after_step() -> None:
                resume.save_if_due(course, learner, sampler, ledger, recorder, rng)

            with open_pool(config, context.work_dir / "ray", worker, tokenizer, environments, longest) as pool:
                pool.publish(learner.version)
                batches = SCHEDULES[config.schedule](config, pool, flow, lambda: learner.version, course.step)
                playing = (flow, pool, batches, worker, validation)
                summary = train(config, context, learner, *playing, course, recorder, after_step, rng)
            ranks.deal([None] * ranks.size)
    except BaseException as error:
        ledger.close(f"stopped: {type(error).__name__}")
        raise
    summary["ledger"] = ledger.close(f"stopped: {summary['stopped_by']}" if summary["stopped_by"] else "not needed")
    assert course.first is not None
    assert course.best is not None
    curves = read_metrics(context.tracker.directory) if context.tracker.directory else {}
    page = write_report(context.work_dir, summary, curves, course.first, course.best)
    for file in (ledger_path, page):
        context.tracker.artifact(file)
    checkpoint = context.work_dir / "checkpoint"
    save_model(model, checkpoint)
    copy_tokenizer(start, checkpoint)
    parents = [inputs["tasks"], inputs["checkpoint"]]
    pointer = context.publish("checkpoint", checkpoint, parents=parents, facts=summary)
    records = recorder.finish()
    resume.finish()
    return StageResult({"checkpoint": pointer, **records}, summary)


def _set_threads(config: PostTrainingConfig) -> None:
    torch.set_num_threads(threads_of_each(config.threads, config.processes))


def follow(ranks: Ranks, config: PostTrainingConfig, start: Path, names: list[str], longest: int) -> None:
    """What the ranks above 0 do: play and learn on their shares, as rank 0 orders, until it has no order left."""
    _set_threads(config)
    model = load_model(start)
    learner = Learner(config, model, ranks)
    worker = RolloutWorker(config, model, load_tokenizer(start), installed(names), longest, ranks)
    while order := ranks.deal(None):
        if order[0] == "play":
            _, share, version = order
            worker.load(version)
            ranks.to_first(worker.play_share(share))
        elif order[0] == "load":
            learner.take_state(*order[1:])
        else:
            with contextlib.suppress(FloatingPointError):  # rank 0 meets the same one, and stops
                learner.take_step(*order[1:])


@contextmanager
def open_pool(
    config: PostTrainingConfig,
    directory: Path,
    worker: RolloutWorker,
    tokenizer: Tokenizer,
    environments: dict[str, Environment],
    sequence_tokens: int,
) -> Iterator[Pool]:
    """Who plays the prompts: `worker`, whose engine reads the learner's own weights, or Ray actors."""
    if config.rollout_workers == 0:
        yield LocalPool(worker)
        return
    from components.post_training.ray_cluster import cluster, resources

    with cluster(directory, resources(config)):
        from components.post_training.ray_pool import RayPool

        yield RayPool(config, worker.source, tokenizer, environments, sequence_tokens)


def chosen_tasks(directory: Path, config: PostTrainingConfig) -> tuple[list[TaskRecord], list[TaskRecord]]:
    """Training tasks, and the validation tasks of each family. Raises InputError when a family asked for has none."""
    found = {split: read_tasks(directory, split) for split in ("train", "validation")}
    if config.families:
        for split, tasks in found.items():
            missing = set(config.families) - set(by_family(tasks))
            if missing:
                raise InputError(
                    f"{directory} has no task of {', '.join(sorted(missing))} in the split {split}; "
                    "change post_training.families or synthesis.environments"
                )
            found[split] = [task for task in tasks if task.environment in config.families]
    train, validation = found["train"], balanced(found["validation"], config.validation_tasks)
    return [with_budget(t, config.token_budget) for t in train], [
        with_budget(t, config.token_budget) for t in validation
    ]


def with_budget(task: TaskRecord, factor: float) -> TaskRecord:
    """The task with `factor` times its turns and tokens."""
    limits = Limits(turns=int(task.limits.turns * factor), tokens=int(task.limits.tokens * factor))
    return task if factor == 1 else task.model_copy(update={"limits": limits})


def installed(names: Iterable[str]) -> dict[str, Environment]:
    """The environments of the tasks. Raises InputError for one that is not installed here."""
    try:
        return {name: environment(name) for name in sorted(names)}
    except ValueError as error:
        raise InputError(f"the task set needs an environment that is not installed: {error}") from error


def check_words(words: list[str], tokenizer: Tokenizer, uri: str) -> None:
    """Raises InputError when the tokenizer cannot write a word of the task set."""
    known = tokenizer.get_vocab()
    unknown_id = known.get(UNKNOWN, -1)
    for word in words:
        if word in known:
            continue
        ids = tokenizer.encode(word, add_special_tokens=False).ids
        if not ids or unknown_id in ids:
            raise InputError(
                f"the tokenizer of the checkpoint {uri} does not know the word {word!r} of the task set; "
                "give the checkpoint that was trained on this task set, or make the task set again"
            )
