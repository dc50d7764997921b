"""The training pipeline: synthesis, pre-training, post-training, evaluation, gate, promotion, serving check.

    sparseline compile --profile nano      # writes this as KFP v2 YAML
    sparseline run --profile nano          # executes that YAML on this machine

What travels between tasks are pointers. A profile's configuration and the digest of each stage's sources are constants
of the compiled file, so both are part of every task's cache key; what differs from run to run is a parameter.
"""

# No `from __future__ import annotations` here: KFP reads the annotations of the pipeline function as types.
from collections.abc import Callable
from typing import Any

from kfp import dsl

from components.post_training.component import post_training
from components.pretraining.component import pretraining
from components.synthesis.component import synthesis
from pipelines.judgement import judge

NAME = "sparseline-training"
DESCRIPTION = """Turns synthesised agentic tasks into a better long-context agent model with DeepSeek Sparse Attention.

Parameters: `base_checkpoint` (pointer to a checkpoint to start from, JSON; empty: train a small base first);
`champion` (pointer to the model that serves now, JSON; empty: there is none, and promotion refuses where the registry
has one); `champion_version` (its version in the model registry); `seed` (of everything random)."""


def training_pipeline(baked: dict[str, dict[str, str]], prepare: Callable[[str, Any], None]) -> Any:
    """The pipeline with these constants by stage. `prepare(stage, task)` is called for every task."""

    @dsl.pipeline(name=NAME, description=DESCRIPTION)
    def training(seed: int, base_checkpoint: str = "", champion: str = "", champion_version: str = "") -> None:
        made = synthesis(**baked["synthesis"], seed=seed)
        made.set_display_name("Synthesis")
        tasks = made.outputs["tasks"]

        pretrained = pretraining(**baked["pretraining"], seed=seed, base_checkpoint=base_checkpoint, tasks=tasks)
        pretrained.set_display_name("Pre-training")
        before = pretrained.outputs["checkpoint"]

        trained = post_training(**baked["post_training"], seed=seed, tasks=tasks, pretrained=before)
        trained.set_display_name("Post-training")

        judged = judge(
            baked,
            seed=seed,
            tasks=tasks,
            before=before,
            after=trained.outputs["checkpoint"],
            champion=champion,
            champion_version=champion_version,
        )
        for stage, task in {
            "synthesis": made, "pretraining": pretrained, "post_training": trained, **judged
        }.items():  # fmt: skip
            prepare(stage, task)

    return training
