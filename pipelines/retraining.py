"""The retraining pipeline: from the registered champion, RL on fresh tasks, gate against the champion.

    sparseline run --pipeline retraining --profile nano --seed 7
    sparseline schedule set nightly --pipeline retraining --profile nano --cron "0 0 3 * * *"

The first task looks the champion up and draws a seed that no other run has, so that no two retrainings see the same
tasks; the templates that were held out from the champion's training stay held out.
"""

# No `from __future__ import annotations` here: KFP reads the annotations of the pipeline function as types.
from collections.abc import Callable
from typing import Any

from kfp import dsl

from components.evaluation.component import origin
from components.post_training.component import post_training
from components.synthesis.component import synthesis
from pipelines.judgement import judge

NAME = "sparseline-retraining"
DESCRIPTION = """Trains the model that serves now further, by reinforcement learning on tasks that it never saw, and
makes the result champion when it is better.

Parameter: `occasion` (text that the seed of the fresh tasks follows from; empty: the run's id, so that every run has
other tasks)."""


def retraining_pipeline(baked: dict[str, dict[str, str]], prepare: Callable[[str, Any], None]) -> Any:
    """The pipeline with these constants by stage. `prepare(stage, task)` is called for every task."""

    @dsl.pipeline(name=NAME, description=DESCRIPTION)
    def retraining(occasion: str = "") -> None:
        begun = origin(**baked["origin"], occasion=occasion, model="")
        begun.set_display_name("Origin")
        begun.set_caching_options(False)  # it reads the registry
        seed, champion = begun.outputs["fresh_seed"], begun.outputs["checkpoint"]

        made = synthesis(**baked["synthesis"], seed=seed, split_seed=begun.outputs["split_seed"])
        made.set_display_name("Synthesis")
        tasks = made.outputs["tasks"]

        trained = post_training(**baked["post_training"], seed=seed, tasks=tasks, pretrained=champion)
        trained.set_display_name("Post-training")

        judged = judge(
            baked,
            seed=seed,
            tasks=tasks,
            before=champion,
            after=trained.outputs["checkpoint"],
            champion=begun.outputs["champion"],
            champion_version=begun.outputs["champion_version"],
        )
        for stage, task in {"origin": begun, "synthesis": made, "post_training": trained, **judged}.items():
            prepare(stage, task)

    return retraining
