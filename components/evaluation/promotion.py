"""Moves the registry's aliases after the gate said yes: the candidate becomes champion, the champion `previous`.

python -m components.evaluation promotion --config promotion.yaml
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from components.evaluation.gate import read_verdict
from components.runtime.contracts import Pointer
from components.runtime.registry import Registry
from components.runtime.settings import Settings
from components.runtime.stage import StageContext, StageResult


class PromotionConfig(BaseModel):
    """Nothing to set: the name of the registered model is a setting of the surroundings."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def run(config: PromotionConfig, context: StageContext, inputs: dict[str, Pointer]) -> StageResult:
    """Stage `promotion`. inputs: verdict; outputs: champion (the checkpoint that serves from now on).

    With the verdict `unchanged` the candidate is the champion already and no alias moves. Raises ValueError for a
    rejected candidate, InputError when the registry cannot be reached.
    """
    verdict = read_verdict(context, inputs["verdict"])
    if verdict.verdict == "rejected":
        raise ValueError(f"the gate rejected {verdict.candidate.uri}; a rejected candidate is never promoted")
    version = Registry(Settings.read()).promote(verdict.candidate)
    context.progress.note(f"models:/{version.name}@champion is version {version.version} ({verdict.verdict})")
    summary = {
        "model": version.name,
        "version": version.version,
        "moved": verdict.verdict == "promoted",
        "champion_sha256": version.pointer.sha256,
    }
    return StageResult({"champion": version.pointer}, summary)
