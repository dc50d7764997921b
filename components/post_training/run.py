"""Post-training with GRPO (arXiv 2512.02556, section 3.1): rollouts in real environments, synchronous.

    python -m components.post_training --config post_training.yaml

The engine that samples and the learner hold the same weights; a rollout batch is sampled, judged by the environments'
verifiers, and trained on in a few mini-batches. The published checkpoint is the best one on a validation split.
"""

from __future__ import annotations

import copy
import math
import os
import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from components.environments.chat_format import END
from components.environments.protocol import Environment, environment
from components.post_training.config import PostTrainingConfig
from components.post_training.learner import logprobs, micro_batches, pack_trajectories
from components.post_training.objective import group_advantages, grpo_loss
from components.rollouts import EnginePolicy, EpisodeRequest, EpisodeResult, run_episodes
from components.rollouts.loop import transcript
from components.runtime.contracts import Pointer, TaskRecord
from components.runtime.errors import InputError
from components.runtime.stage import StageContext, StageResult
from components.runtime.task_set import read_tasks
from model import Transformer
from model.checkpoint import CheckpointError, copy_tokenizer, load_model, load_tokenizer, save_model
from model.engine import Engine, SamplingParameters, Trajectory


def run(config: PostTrainingConfig, context: StageContext, inputs: dict[str, Pointer]) -> StageResult:
    """Inputs: `tasks`, `checkpoint`. Outputs: `checkpoint`."""
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    tasks_directory, start = context.fetch(inputs["tasks"]), context.fetch(inputs["checkpoint"])
    train, validation = read_tasks(tasks_directory, "train"), read_tasks(tasks_directory, "validation")
    validation = validation[: config.validation_tasks]
    try:
        model, tokenizer = load_model(start), load_tokenizer(start)
    except CheckpointError as error:
        raise InputError(f"checkpoint {inputs['checkpoint'].uri}: {error}") from error
    families = {task.environment for task in [*train, *validation]}
    longest = max(task.limits.tokens for task in [*train, *validation])
    trainer = Trainer(config, context, model, tokenizer, {name: environment(name) for name in families}, longest)
    summary = trainer.train(train, validation)
    checkpoint = context.work_dir / "checkpoint"
    save_model(model, checkpoint)
    copy_tokenizer(start, checkpoint)
    parents = [inputs["tasks"], inputs["checkpoint"]]
    pointer = context.publish("checkpoint", checkpoint, parents=parents, facts=summary)
    return StageResult({"checkpoint": pointer}, summary)


class Trainer:
    """Holds what a step needs. `model` is changed in place; sequences have at most `sequence_tokens` tokens."""

    def __init__(
        self,
        config: PostTrainingConfig,
        context: StageContext,
        model: Transformer,
        tokenizer: Any,
        environments: dict[str, Environment],
        sequence_tokens: int,
    ) -> None:
        self.config, self.context, self.model, self.environments = config, context, model, environments
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        stop = tokenizer.token_to_id(END)
        if stop is None:
            raise InputError(f"the checkpoint's tokenizer has no {END}; it was not made for this chat format")
        self.engine = Engine(
            model,
            stop_token_id=stop,
            max_sequences=max(config.prompts * config.group_size, 1),
            max_sequence_tokens=sequence_tokens,
        )
        self.tokenizer = tokenizer
        model.requires_grad_(True)
        if config.freeze_indexer:
            for parameter in model.indexer_parameters():
                parameter.requires_grad_(False)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def policy(self) -> EnginePolicy:
        config = self.config
        sampling = SamplingParameters(config.temperature, config.top_p, max_new_tokens=config.turn_tokens)
        return EnginePolicy(self.engine, self.tokenizer, sampling)

    def play(self, tasks: Sequence[TaskRecord], seeds: Sequence[int]) -> list[EpisodeResult]:
        requests = [
            EpisodeRequest(self.environments[task.environment], task, seed)
            for task, seed in zip(tasks, seeds, strict=True)
        ]
        return run_episodes(self.policy(), requests)

    def validate(self, tasks: Sequence[TaskRecord]) -> float:
        """Sampled pass@1 on the validation split; the same seeds each time, so that checkpoints compare."""
        results = self.play(tasks, [1_000_003 + index for index in range(len(tasks))])
        return sum(result.verdict.reward for result in results) / len(results)

    def train(self, tasks: Sequence[TaskRecord], validation: Sequence[TaskRecord]) -> dict[str, Any]:
        """Run all steps; leaves the best weights in the model. Returns the stage's key numbers."""
        config, context = self.config, self.context
        context.progress.phase("GRPO")
        rng = random.Random(f"{context.seed}/post_training")
        best = start = self.validate(validation)
        best_step, best_state = 0, copy.deepcopy(self.model.state_dict())
        context.tracker.metric("rl/validation_pass_at_1", start, 0)
        gap_max, rollouts, trained_rollouts = 0.0, 0, 0
        for step in range(config.steps):
            share = 1 - (1 - config.final_share) * step / max(1, config.steps - 1)
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate * share
            values, results = self.step(tasks, rng)
            rollouts += len(results)
            trained_rollouts += int(values["rl/trained_rollouts"])
            gap_max = max(gap_max, values["rl/logprob_gap"])
            if (step + 1) % config.validation_every == 0 or step + 1 == config.steps:
                passed = self.validate(validation)
                values["rl/validation_pass_at_1"] = passed
                if passed > best:
                    best, best_step, best_state = passed, step + 1, copy.deepcopy(self.model.state_dict())
            context.tracker.metrics(values, step + 1)
            shown = {key.removeprefix("rl/"): values[key] for key in ("rl/reward", "rl/kl", "rl/entropy")}
            context.progress.update(step + 1, config.steps, {**shown, "best_validation": best})
            context.progress.episode(transcript(rng.choice(results)))
        self.model.load_state_dict(best_state)
        self.model.requires_grad_(True).eval()
        return {
            "validation_pass_at_1_before": start,
            "validation_pass_at_1_best": best,
            "best_step": best_step,
            "rollouts": rollouts,
            "trained_rollouts": trained_rollouts,
            "logprob_gap": gap_max,
        }

    def step(self, tasks: Sequence[TaskRecord], rng: random.Random) -> tuple[dict[str, float], list[EpisodeResult]]:
        """One rollout batch and its gradient steps; metrics and the episodes."""
        config = self.config
        chosen = rng.sample(list(tasks), min(config.prompts, len(tasks)))
        played = [task for task in chosen for _ in range(config.group_size)]
        started = time.monotonic()
        self.model.eval()
        results = self.play(played, [rng.getrandbits(62) for _ in played])
        rollout_seconds = time.monotonic() - started
        reward_N = torch.tensor([result.verdict.reward for result in results])
        if not bool(torch.isfinite(reward_N).all()) or float(reward_N.min()) < 0 or float(reward_N.max()) > 1:
            raise FloatingPointError(f"rewards must lie in [0, 1], got {reward_N.tolist()}")
        group_N = torch.arange(len(chosen)).repeat_interleave(config.group_size)
        advantage_N = group_advantages(reward_N, group_N)
        useful = [index for index in range(len(results)) if float(advantage_N[index].abs()) > 0]
        values = {
            "rl/reward": float(reward_N.mean()),
            "rl/zero_variance_groups": 1 - len(useful) / len(results),
            "rl/trajectory_tokens": sum(len(r.trajectory) for r in results if r.trajectory) / len(results),
            "rl/turns": sum(r.turns for r in results) / len(results),
            "rl/tool_errors": sum(r.tool_errors for r in results) / len(results),
            "rl/malformed_share": sum(r.ended.startswith("malformed") for r in results) / len(results),
            "rl/rollout_seconds": rollout_seconds,
            "rl/trained_rollouts": len(useful),
        }
        started = time.monotonic()
        # whole groups, so that a mini-batch keeps advantages that sum to zero
        groups = list(dict.fromkeys(int(group_N[index]) for index in useful))
        rng.shuffle(groups)
        updates: list[dict[str, float]] = []
        for part in range(config.mini_batches):
            members = set(groups[part :: config.mini_batches])
            indices = [index for index in useful if int(group_N[index]) in members]
            if indices:
                # the engine's policy records a trajectory for every episode
                trajectories = [trajectory for index in indices if (trajectory := results[index].trajectory)]
                updates.append(self.update(trajectories, [float(advantage_N[index]) for index in indices]))
        keys = ("kl", "entropy", "masked_share", "clipped_share", "ratio_max", "gradient_norm")
        for key in keys:
            found = [update[key] for update in updates]
            values[f"rl/{key}"] = sum(found) / len(found) if found else 0.0
        # only before the first update do engine and learner hold the same weights
        values["rl/logprob_gap"] = updates[0]["logprob_gap"] if updates else 0.0
        values["rl/update_seconds"] = time.monotonic() - started
        return values, results

    def update(self, trajectories: Sequence[Trajectory], advantages: Sequence[float]) -> dict[str, float]:
        """One optimiser step on these trajectories. Raises FloatingPointError for a gradient that is not finite."""
        config, vocabulary = self.config, self.model.config.vocab_size
        self.model.train()
        sums: dict[str, float] = dict.fromkeys(("kl", "entropy", "masked_share", "clipped_share"), 0.0)
        gap = ratio_max = 0.0
        for part, part_advantages in micro_batches(trajectories, advantages, config.micro_batch_tokens):
            batch = pack_trajectories(part, part_advantages, vocabulary, keep_routing=config.keep_routing)
            with torch.no_grad():
                reference_R, _ = logprobs(self.reference, batch, keep_routing=False)
            logprob_R, entropy_R = logprobs(self.model, batch, keep_routing=config.keep_routing)
            objective = grpo_loss(
                logprob_R,
                batch.old_logprob_R,
                reference_R,
                batch.sequence_R,
                batch.advantage_N,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                kl_weight=config.kl_weight,
                sequence_mask_threshold=config.sequence_mask_threshold,
                total_sequences=len(trajectories),
            )
            objective.loss.backward()
            weight = len(part) / len(trajectories)
            sums["kl"] += objective.kl * weight
            sums["masked_share"] += objective.masked_share * weight
            sums["clipped_share"] += objective.clipped_share * weight
            sums["entropy"] += float(entropy_R.mean()) * weight
            gap = max(gap, float((logprob_R.detach() - batch.old_logprob_R).abs().max()))
            ratio_max = max(ratio_max, objective.ratio_max)
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, config.gradient_clip))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}; the last good weights are kept")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.engine.weight_version += 1
        return {**sums, "gradient_norm": norm, "logprob_gap": gap, "ratio_max": ratio_max}
