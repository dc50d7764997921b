"""Moves the registry's aliases after the gate said yes: the candidate becomes champion, the champion `previous`.

python -m components.evaluation promotion --config promotion.yaml
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from components.evaluation.gate import read_verdict
from components.runtime.contracts import GateVerdict, Pointer
from components.runtime.errors import InputError
from components.runtime.registry import CHAMPION, Registry
from components.runtime.settings import Settings
from components.runtime.stage import StageContext, StageResult


class PromotionConfig(BaseModel):
    """Nothing to set: the name of the registered model is a setting of the surroundings."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def run(config: PromotionConfig, context: StageContext, inputs: dict[str, Pointer]) -> StageResult:
    """Stage `promotion`. inputs: verdict; outputs: champion (the checkpoint that serves from now on).

    With the verdict `unchanged` the candidate is the champion already and no alias moves. Raises ValueError for a
    rejected candidate, InputError when the registry cannot be reached or its champion is another than the gate knew.
    """
    verdict = read_verdict(context, inputs["verdict"])
    if verdict.verdict == "rejected":
        raise ValueError(f"the gate rejected {verdict.candidate.uri}; a rejected candidate is never promoted")
    registry = Registry(Settings.read())
    check_champion(registry, verdict)
    version = registry.promote(verdict.candidate)
    context.progress.note(f"models:/{version.name}@champion is version {version.version} ({verdict.verdict})")
    summary = {
        "model": version.name,
        "version": version.version,
        "moved": verdict.verdict == "promoted",
        "champion_sha256": version.pointer.sha256,
    }
    return StageResult({"champion": version.pointer}, summary)


def check_champion(registry: Registry, verdict: GateVerdict) -> None:
    """Raises InputError when what serves now is not what the gate compared the candidate with.

    That is so when another run was faster, and when a training was started without naming the champion.
    """
    champion = registry.alias(CHAMPION)
    if champion and champion.pointer.sha256 not in (verdict.candidate.sha256, verdict.baseline.sha256):
        raise InputError(
            f"{registry.uri(CHAMPION)} is version {champion.version} ({champion.pointer.sha256[:12]}), but the gate "
            f"compared the candidate with {verdict.baseline.uri} ({verdict.baseline.sha256[:12]}): give this champion "
            "as `champion` and `champion_version`, as `sparseline submit` does, and run again; only the comparison, "
            "the gate and what follows are repeated"
        )
