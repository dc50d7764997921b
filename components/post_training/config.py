"""Configuration of the post-training stage."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class PostTrainingConfig(BaseModel):
    """GRPO as in arXiv 2512.02556, section 3.1. The paper publishes no values; these are ours for the nano profile."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(90, ge=0, description="rollout batches")
    prompts: int = Field(16, ge=1, description="prompts (groups) per rollout batch")
    group_size: int = Field(12, ge=2, description="rollouts per prompt; the advantage is relative to their mean reward")
    mini_batches: int = Field(2, ge=1, description="optimiser steps per rollout batch")
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate of AdamW")
    final_share: float = Field(0.3, ge=0, le=1, description="learning rate at the end, as a share of the peak (linear)")
    clip_low: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped below at 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="the ratio is clipped above at 1 + clip_high")
    kl_weight: float = Field(0.005, ge=0, description="beta, weight of the unbiased KL to the reference policy")
    sequence_mask_threshold: float = Field(
        0.05,
        ge=0,
        description="delta in nats per token: a sequence of negative advantage whose mean log(pi_old / pi) exceeds it "
        "is masked (off-policy sequence mask)",
    )
    temperature: float = Field(1.0, gt=0, description="sampling temperature of rollouts, used by the learner as well")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of rollouts; below 1 the sampling masks are kept")
    keep_routing: bool = Field(True, description="train on the expert choices that the rollout made")
    freeze_indexer: bool = Field(True, description="the lightning indexer does not change during RL")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    micro_batch_tokens: int = Field(6144, ge=64, description="tokens per forward of the learner; bounds its memory")
    validation_tasks: int = Field(120, ge=1, description="tasks of the validation split that choose the checkpoint")
    validation_every: int = Field(15, ge=1, description="steps between validations; the first is before step 0")
    turn_tokens: int = Field(40, ge=1, description="tokens of one assistant turn")
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0 = all cores of the process")
