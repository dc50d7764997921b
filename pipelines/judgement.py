"""The end of training and retraining: evaluation, comparison with the champion, gate, promotion, serving check."""

# No `from __future__ import annotations` here: see pipelines/training.py.
from typing import Any

from kfp import dsl

from components.evaluation.component import champion as champion_task
from components.evaluation.component import evaluation, gate, promotion, rejected
from components.serving.component import serving


def judge(
    baked: dict[str, dict[str, str]],
    *,
    seed: Any,
    tasks: Any,
    before: Any,
    after: Any,
    champion: Any,
    champion_version: Any,
) -> dict[str, Any]:
    """Adds the tasks to the pipeline that is being built, and returns them by stage. Arguments are KFP channels."""
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
    return {
        "evaluation": judged,
        "champion": compared,
        "gate": decided,
        "rejected": ended,
        "promotion": moved,
        "serving": served,
    }
