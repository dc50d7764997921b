"""Configuration of the post-training stage."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class AlarmConfig(BaseModel):
    """When a run counts as collapsed and is stopped. Means over the last `patience` steps are compared."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    patience: int = Field(5, ge=1, description="steps whose mean is compared with a threshold")
    entropy_low: float = Field(1e-4, ge=0, description="nats per sampled token; the mean entropy must not fall below")
    entropy_rise: float = Field(
        1.5, gt=0, description="nats per sampled token; largest rise above the first mean entropy"
    )
    kl_high: float = Field(1.0, gt=0, description="nats per sampled token; the mean KL to the reference may not exceed")
    reward_drop: float = Field(
        0.3, gt=0, le=1, description="largest fall of the mean reward below its best mean so far, in units of reward"
    )


class PostTrainingConfig(BaseModel):
    """GRPO as in arXiv 2512.02556, section 3.1. The paper publishes no values; these are ours for the nano profile."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    families: list[str] = Field(
        [], description="environments whose tasks are trained and validated on; empty: all in the task set"
    )
    token_budget: float = Field(
        1.0, ge=1, description="factor on the tasks' own limits of turns and tokens, in training and validation"
    )
    steps: int = Field(90, ge=0, description="rollout batches")
    prompts: int = Field(16, ge=1, description="prompts (groups) per rollout batch")
    group_size: int = Field(12, ge=2, description="rollouts per prompt; the advantage is relative to their mean reward")
    refills: int = Field(
        0,
        ge=0,
        description="rounds per batch in which new prompts take the place of groups that teach nothing; each costs the "
        "time of its rollouts",
    )
    empty_batches: int = Field(
        25, ge=1, description="consecutive batches without a group to learn from after which the stage gives up"
    )
    mini_batches: int = Field(2, ge=1, description="optimiser steps per rollout batch")
    objective: Literal["grpo", "rft"] = Field(
        "grpo",
        description="rft: rejection-sampling fine-tuning on the passed rollouts of the same groups",
    )
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate of AdamW")
    final_share: float = Field(0.3, ge=0, le=1, description="learning rate at the end, as a share of the peak (linear)")
    clip_low: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped below at 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="the ratio is clipped above at 1 + clip_high")
    kl_weight: float = Field(0.005, ge=0, description="beta, weight of the unbiased KL to the reference policy")
    kl_weights: dict[str, float] = Field({}, description="beta of single environments, where it is not kl_weight")
    kl_estimator: Literal["unbiased", "biased"] = Field(
        "unbiased", description="biased: plain K3, without the ratio pi / pi_old; for comparison only"
    )
    sequence_mask_threshold: float | None = Field(
        0.05,
        ge=0,
        description="delta in nats per token: a sequence of negative advantage whose mean log(pi_old / pi) exceeds it "
        "is masked (off-policy sequence mask), pi_old being what the engine returned; null: no mask",
    )
    importance_cap: float | None = Field(
        None,
        gt=0,
        description="truncated importance sampling: the policy term of a token is weighed by pi / pi_engine before the "
        "batch's first update, at most this, and the clip counts from there; null: the clip counts from pi_engine",
    )
    length_penalty: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="taken off the reward of a passed rollout that uses all its tokens; in proportion to those sampled",
    )
    temperature: float = Field(1.0, gt=0, description="sampling temperature of rollouts, used by the learner as well")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of rollouts; below 1 the sampling masks are kept")
    keep_routing: bool = Field(True, description="train on the expert choices that the rollout made")
    keep_sampling_masks: bool = Field(True, description="cut from the learner's distribution what top-p cut")
    keep_selection: bool = Field(False, description="train on the keys that the rollout's lightning indexer selected")
    freeze_indexer: bool = Field(True, description="the lightning indexer does not change during RL")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    micro_batch_tokens: int = Field(6144, ge=64, description="tokens per forward of the learner; bounds its memory")
    alarms: AlarmConfig = Field(AlarmConfig(), description="when a run counts as collapsed and is stopped")
    validation_tasks: int = Field(
        120, ge=1, description="tasks per environment of the validation split, which choose the checkpoint"
    )
    validation_every: int = Field(15, ge=1, description="steps between validations; the first is before step 0")
    state_seconds: float = Field(20.0, ge=0, description="seconds between two saves of the training state")
    record_every: int = Field(
        50,
        ge=0,
        description="steps between two that are recorded (and the first), for `sparseline replay` to execute again; "
        "a record is about as large as a training state; 0 = none",
    )
    turn_tokens: int = Field(40, ge=1, description="tokens of one assistant turn")
    max_sequences: int = Field(0, ge=0, description="rollouts that an engine plays at once; 0 = a whole batch")
    cache_tokens: int = Field(262_144, ge=1, description="tokens of the key-value cache of an engine, at most")
    rollout_dtype: Literal["float32", "bfloat16"] = Field("float32", description="number format of the rollout engine")
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="data-parallel processes, each of which plays and learns on its share of a batch",
    )
    threads: int = Field(0, ge=0, description="CPU threads of each process; 0 = its share of the cores")
    schedule: Literal["synchronous", "one_step_off", "asynchronous"] = Field(
        "synchronous",
        description="synchronous: a batch is played with the newest weights; one_step_off: the next batch is played "
        "while the learner trains on this one; asynchronous: workers play on, within the bound on staleness",
    )
    staleness: int = Field(
        2, ge=0, description="asynchronous: weight versions (rollout batches) that a trained token may be old, at most"
    )
    groups_in_flight: int = Field(
        0, ge=0, description="asynchronous: groups issued and not yet trained, at most; 0 = prompts * (staleness + 1)"
    )
    rollout_workers: int = Field(0, ge=0, description="Ray actors that play; 0 = this process (synchronous only)")
    worker_threads: int = Field(1, ge=1, description="CPU threads of a rollout worker")
    environment_workers: int = Field(
        0, ge=0, description="Ray actors of each rollout worker in which its environments run; 0 = in the worker itself"
    )
    environment_seconds: float = Field(
        60.0, gt=0, description="time that an environment worker may take for one call, before its episodes are faulty"
    )

    @field_validator("kl_weights")
    @classmethod
    def _not_negative(cls, values: dict[str, float]) -> dict[str, float]:
        if any(not value >= 0 for value in values.values()):
            raise ValueError("a weight of the KL must be at least 0")
        return values

    @model_validator(mode="after")
    def _consistent(self) -> PostTrainingConfig:
        if self.rollout_workers == 0 and self.schedule != "synchronous":
            raise ValueError(f"the schedule {self.schedule} needs rollout_workers of at least 1")
        if 0 < self.groups_in_flight < self.prompts:
            raise ValueError("groups_in_flight must be at least prompts, or no batch would ever be complete")
        if self.rollout_workers and self.processes > 1:
            raise ValueError("processes above 1 play for themselves: they need rollout_workers of 0")
        if self.rollout_workers == 0 and self.environment_workers:
            raise ValueError("environment_workers needs rollout_workers of at least 1")
        unknown = set(self.kl_weights) - set(self.families) if self.families else set()
        if unknown:
            raise ValueError(f"kl_weights names {', '.join(sorted(unknown))}, which families leaves out")
        return self

    def kl_weight_of(self, family: str) -> float:
        """beta of an environment."""
        return self.kl_weights.get(family, self.kl_weight)
