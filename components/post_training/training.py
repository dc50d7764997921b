"""The training loop: batches from a schedule to the learner, validation, alarms, records."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from components.post_training.alarms import StepSigns, alarm
from components.post_training.config import PostTrainingConfig
from components.post_training.flow import Batch, Flow
from components.post_training.records import StepRecorder
from components.post_training.resume import Course
from components.post_training.schedule import Pool
from components.post_training.trainer import Learner
from components.post_training.validation import validate
from components.post_training.worker import PlayedGroup, RolloutWorker
from components.rollouts.loop import episode_trace, transcript
from components.runtime.contracts import TaskRecord
from components.runtime.errors import InputError
from components.runtime.stage import StageContext

LEARNED = ("kl", "entropy", "masked_share", "clipped_share", "ratio_max", "ratio_bias", "gradient_norm", "logprob_gap")


def train(
    config: PostTrainingConfig,
    context: StageContext,
    learner: Learner,
    flow: Flow,
    pool: Pool,
    batches: Iterator[Batch],
    validator: RolloutWorker,
    validation: Sequence[TaskRecord],
    course: Course,
    recorder: StepRecorder,
    after_step: Callable[[], None],
    rng: random.Random,
) -> dict[str, Any]:
    """Run all steps from `course` on, or until an alarm; leaves the best weights in the learner's model.

    `validator` plays with the learner's own weights; `after_step` is called when all of a step is in `course`. Returns
    the key numbers. Raises InputError when there is nothing to learn from.
    """
    context.progress.phase("GRPO" if config.objective == "grpo" else "RFT")
    if course.first is None or course.best is None:
        course.first = course.best = validate(validator, validation)
        course.best_weights = copy.deepcopy(learner.model.state_dict())
        context.tracker.metrics(course.first.metrics(), 0)
    stopped = ""
    for step in range(course.step, config.steps):
        recorder.before(step + 1, learner, flow.sampler, rng)
        started = time.monotonic()
        batch = next(batches)
        rollout_seconds = time.monotonic() - started
        values = batch_metrics(batch)
        course.empty = 0 if batch.groups else course.empty + 1
        refuse_barren(batch, course.empty, config)
        started = time.monotonic()
        learner.set_learning_rate(step)
        try:
            learned = learner.train(batch.groups, rng)
        except FloatingPointError as error:
            stopped = "gradient_not_finite"
            context.progress.note(f"stopped: {error}; the best weights so far are kept")
            break
        flow.trained(batch, step)
        recorder.after(step + 1, learner, batch, learned)
        if learned:
            pool.publish(learner.version)
            validator.load(learner.version)
        values |= {f"rl/{name}": learned.get(name, 0.0) for name in LEARNED}
        values |= {"rl/rollout_seconds": rollout_seconds, "rl/update_seconds": time.monotonic() - started}
        course.rollouts += sum(len(group.episodes) for group in batch.played)
        course.trained_rollouts += int(values["rl/trained_rollouts"])
        if not any(batch.staleness):
            course.gap_max = max(course.gap_max, values["rl/logprob_gap"])
        course.staleness_max = max([course.staleness_max, *batch.staleness])
        if learned:
            course.signs.append(StepSigns(values["rl/reward"], learned["entropy"], learned["kl"]))
            stopped = alarm(course.signs, config.alarms)
        if not stopped and ((step + 1) % config.validation_every == 0 or step + 1 == config.steps):
            passed = validate(validator, validation)
            values |= passed.metrics()
            if passed.macro > course.best.macro:
                course.best, course.best_step = passed, step + 1
                course.best_weights = copy.deepcopy(learner.model.state_dict())
        context.tracker.metrics(values, step + 1)
        shown = {key: values[f"rl/{key}"] for key in ("reward", "kl", "entropy")}
        context.progress.update(step + 1, config.steps, {**shown, "best_validation": course.best.macro})
        if episodes := [episode for group in batch.played if not group.fault for episode in group.episodes]:
            # which one is shown must not move the numbers that training draws
            shown_episode = random.Random(f"{context.seed}/shown/{step}").choice(episodes)
            context.progress.episode(transcript(shown_episode))
            if (step + 1) % config.validation_every == 0 or step + 1 == config.steps:
                context.tracker.trace(episode_trace(shown_episode))
        if stopped:
            context.progress.note(f"stopped by the alarm {stopped}; the best weights so far are kept")
            break
        course.step = step + 1
        after_step()
    learner.model.load_state_dict(course.best_weights)
    learner.model.requires_grad_(True).eval()
    return {
        "validation_pass_at_1_before": course.first.macro,
        "validation_pass_at_1_best": course.best.macro,
        "validation_by_family_before": course.first.by_family,
        "validation_by_family_best": course.best.by_family,
        "best_step": course.best_step,
        "rollouts": course.rollouts,
        "trained_rollouts": course.trained_rollouts,
        "logprob_gap": course.gap_max,
        "staleness_max": course.staleness_max,
        "stopped_by": stopped,
    }


def refuse_barren(batch: Batch, empty: int, config: PostTrainingConfig) -> None:
    """Raises InputError when a whole batch is faulty, or too many batches in a row taught nothing."""
    faults = [group for group in batch.played if group.fault]
    if batch.played and len(faults) == len(batch.played):
        group = faults[0]
        raise InputError(
            f"none of the {len(faults)} prompt groups of a batch can be learned from; the first, of the environment "
            f"{group.task.environment}, task {group.task.id[:12]}: {group.fault}; repair the environment"
        )
    if empty >= config.empty_batches:
        raise InputError(
            f"there is nothing to learn from: in {empty} batches in a row, each with {config.refills} refills, all "
            "rollouts of every prompt were judged alike; give easier or harder tasks, or train the checkpoint longer"
        )


def batch_metrics(batch: Batch) -> dict[str, float]:
    """What the rollouts showed, over all groups that were played whole, and by family where there are several."""
    sound = [group for group in batch.played if not group.fault]
    episodes = [episode for group in sound for episode in group.episodes]
    count = max(1, len(episodes))
    trained = sum(len(group.episodes) for group in batch.groups)
    alike = sum(len({episode.verdict.reward for episode in group.episodes}) == 1 for group in sound)
    values = {
        "rl/reward": _mean_reward(sound),
        "rl/zero_variance_groups": alike / max(1, len(sound)),
        "rl/faulty_groups": len(batch.played) - len(sound),
        "rl/trajectory_tokens": sum(len(e.trajectory) for e in episodes if e.trajectory) / count,
        "rl/turns": sum(episode.turns for episode in episodes) / count,
        "rl/tool_errors": sum(episode.tool_errors for episode in episodes) / count,
        "rl/malformed_share": sum(episode.ended.startswith("malformed") for episode in episodes) / count,
        "rl/trained_rollouts": trained,
        "rl/staleness": sum(batch.staleness) / max(1, len(batch.staleness)),
    }
    families = sorted({group.task.environment for group in sound})
    for family in families if len(families) > 1 else []:
        own = [group for group in sound if group.task.environment == family]
        values[f"rl/reward/{family}"] = _mean_reward(own)
        values[f"rl/pass_rate/{family}"] = sum(e.verdict.passed for g in own for e in g.episodes) / sum(
            len(group.episodes) for group in own
        )
    return values


def _mean_reward(groups: Sequence[PlayedGroup]) -> float:
    rewards = [float(episode.verdict.reward) for group in groups for episode in group.episodes]
    return float(torch.tensor(rewards).mean()) if rewards else 0.0
