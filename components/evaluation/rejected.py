"""The task in which a run with a rejected candidate ends: it fails by name, with the rules that did not hold."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from components.evaluation.gate import read_verdict
from components.runtime.contracts import Pointer
from components.runtime.errors import GateRejected
from components.runtime.stage import StageContext, StageResult


class RejectedConfig(BaseModel):
    """Nothing to set."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def run(config: RejectedConfig, context: StageContext, inputs: dict[str, Pointer]) -> StageResult:
    """Stage `rejected`. inputs: verdict. Raises GateRejected; ValueError when the verdict is no rejection."""
    verdict = read_verdict(context, inputs["verdict"])
    if verdict.verdict != "rejected":
        raise ValueError(f"the verdict is {verdict.verdict!r}; this task is for rejected candidates only")
    broken = "; ".join(f"{rule.name}: {rule.explanation}" for rule in verdict.rules if not rule.holds)
    raise GateRejected(f"the gate rejected {verdict.candidate.uri}: {broken}")
