"""The evaluation pipeline: a checkpoint, or the champion, on a fresh held-out task set.

    sparseline run --pipeline evaluation --profile nano --model champion

The checkpoint is played beside the one that it was trained from, and beside the champion where it is another.
"""

# No `from __future__ import annotations` here: KFP reads the annotations of the pipeline function as types.
from collections.abc import Callable
from typing import Any

from kfp import dsl

from components.evaluation.component import champion as champion_task
from components.evaluation.component import evaluation, origin
from components.synthesis.component import synthesis

NAME = "sparseline-evaluation"
DESCRIPTION = """Plays a model on held-out tasks that were made for this run, beside the model that it was trained from
and the one that serves now.

Parameters: `checkpoint` (pointer to the model, JSON; empty: the one that serves now); `occasion` (text that the seed of
the tasks follows from; empty: the run's id)."""


def evaluation_pipeline(baked: dict[str, dict[str, str]], prepare: Callable[[str, Any], None]) -> Any:
    """The pipeline with these constants by stage. `prepare(stage, task)` is called for every task."""

    @dsl.pipeline(name=NAME, description=DESCRIPTION)
    def evaluate(checkpoint: str = "", occasion: str = "") -> None:
        begun = origin(
            **baked["origin"],
            occasion=occasion,
            model=checkpoint,
        )
        begun.set_display_name("Origin")
        begun.set_caching_options(False)  # it reads the registry
        seed = begun.outputs["fresh_seed"]

        made = synthesis(**baked["synthesis"], seed=seed, split_seed=begun.outputs["split_seed"])
        made.set_display_name("Synthesis")

        judged = evaluation(
            **baked["evaluation"],
            seed=seed,
            tasks=made.outputs["tasks"],
            before=begun.outputs["trained_from"],
            after=begun.outputs["checkpoint"],
        )
        judged.set_display_name("Evaluation")

        compared = champion_task(
            **baked["champion"],
            seed=seed,
            champion=begun.outputs["champion"],
            champion_version=begun.outputs["champion_version"],
            tasks=made.outputs["tasks"],
            evaluated=judged.outputs["evaluation"],
        )
        compared.set_display_name("Against the champion")
        for stage, task in {"origin": begun, "synthesis": made, "evaluation": judged, "champion": compared}.items():
            prepare(stage, task)

    return evaluate
