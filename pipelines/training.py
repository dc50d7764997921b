"""The training pipeline: synthesis, pre-training, post-training, evaluation, gate, promotion, serving check.

    sparseline compile --profile nano      # writes this as KFP v2 YAML
    sparseline run --profile nano          # executes that YAML on this machine

What travels between tasks are pointers. A profile's configuration and the digest of each stage's sources are constants
of the compiled file, so both are part of every task's cache key; what differs from run to run is a parameter.
"""

# No `from __future__ import annotations` here: KFP reads the annotations of the pipeline function as types.
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from components.evaluation.component import champion as champion_task
from components.evaluation.component import evaluation, gate, promotion, rejected
from components.post_training.component import post_training
from components.pretraining.component import pretraining
from components.serving.component import serving
from components.synthesis.component import synthesis
from pipelines.code_digest import ROOT, code_digest
from pipelines.stages import STAGES

NAME = "sparseline-training"
DESCRIPTION = """Turns synthesised agentic tasks into a better long-context agent model with DeepSeek Sparse Attention.

Parameters: `base_checkpoint` (pointer to a checkpoint to start from, JSON; empty: train a small base first);
`champion` (pointer to the model that serves now, JSON; empty: there is none); `champion_version` (its version in the
model registry); `seed` (of everything random)."""


def constants(configurations: dict[str, dict[str, Any]], root: Path = ROOT) -> dict[str, dict[str, str]]:
    """For every stage the two constants of its task: its configuration as JSON, and the digest of its sources."""
    return {
        name: {
            "config": json.dumps(configurations[name], sort_keys=True),
            "code": code_digest(stage.modules, root),
        }
        for name, stage in STAGES.items()
    }


def training_pipeline(
    configurations: dict[str, dict[str, Any]],
    baked: dict[str, dict[str, str]] | None = None,
    prepare: Callable[[str, Any], None] = lambda stage, task: None,
) -> Any:
    """The pipeline for these resolved configurations (`profiles.resolve`).

    `baked`: the constants of the tasks, where they are not those of `constants`. `prepare(stage, task)` is called for
    every task, to give it what it needs on a cluster.
    """
    baked = baked or constants(configurations)

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
        after = trained.outputs["checkpoint"]

        judged = evaluation(**baked["evaluation"], seed=seed, tasks=tasks, before=before, after=after)
        judged.set_display_name("Evaluation")

        compared = champion_task(
            **baked["champion"],
            seed=seed,
            champion=champion,
            champion_version=champion_version,
            tasks=tasks,
            evaluated=judged.outputs["evaluation"],
        )
        compared.set_display_name("Against the champion")

        decided = gate(
            **baked["gate"],
            seed=seed,
            champion=champion,
            champion_version=champion_version,
            evaluation=compared.outputs["evaluation"],
        )
        decided.set_display_name("Gate")

        with dsl.If(decided.outputs["decision"] == "rejected", name="rejected"):
            # Fails by name: a skipped branch would leave a rejected run looking like a good one.
            ended = rejected(**baked["rejected"], seed=seed, verdict=decided.outputs["verdict"])
            ended.set_display_name("Rejected")
            ended.set_caching_options(False)
        with dsl.Else(name="accepted"):
            moved = promotion(**baked["promotion"], seed=seed, verdict=decided.outputs["verdict"])
            moved.set_display_name("Promotion")
            moved.set_caching_options(False)  # it acts on the registry
            # Promoted or unchanged, the candidate is the champion here, so the check's result is the candidate's.
            served = serving(**baked["serving"], seed=seed, tasks=tasks, checkpoint=after)
            served.set_display_name("Serving check")
            served.after(moved)

        tasks_of = {
            "synthesis": made,
            "pretraining": pretrained,
            "post_training": trained,
            "evaluation": judged,
            "champion": compared,
            "gate": decided,
            "rejected": ended,
            "promotion": moved,
            "serving": served,
        }
        for stage, task in tasks_of.items():
            prepare(stage, task)

    return training


def compile_pipeline(configurations: dict[str, dict[str, Any]], path: Path) -> Path:
    """Write the pipeline as KFP v2 YAML to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(training_pipeline(configurations), str(path))
    return path
