"""Decides from evaluation.json alone whether a candidate becomes champion; every rule is kept with its numbers.

    python -m components.evaluation gate --config gate.yaml

The baseline is the champion where there is one, else the candidate's own checkpoint before RL. A missing or non-finite
number is a fault: it raises, and is never a rejection.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.evaluation.report import EvaluationReport
from components.runtime.contracts import GateRule, GateVerdict, Interval, Pointer
from components.runtime.stage import StageContext, StageResult

VERDICT_FILE = "verdict.json"


class GateConfig(BaseModel):
    """The gate's bounds."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    gain: float = Field(
        0.0,
        ge=-1,
        lt=1,
        description="what the lower bound of the difference over all families has to exceed; -1: anything passes, for "
        "a rehearsal",
    )
    family_margin: float = Field(
        0.05,
        ge=0,
        le=1,
        description="how much worse (share of episodes, 0 to 1) the lower bound of a family's difference may be",
    )


def decide(report: EvaluationReport, champion: Pointer | None, config: GateConfig) -> GateVerdict:
    """The verdict on `report.candidate`.

    Raises ValueError when there is a champion that the evaluation did not compare the candidate with.
    """
    if champion is not None and champion.sha256 == report.candidate.sha256:
        rule = GateRule(
            name="candidate is not the champion",
            holds=False,
            value=0.0,
            bound=1.0,
            explanation=f"the candidate's sha256 is the champion's ({champion.sha256[:12]}): nothing to promote",
        )
        return GateVerdict(verdict="unchanged", candidate=report.candidate, baseline=champion, rules=[rule])

    if champion is None:
        baseline, name = report.before, "its own checkpoint before RL"
        difference, smallest = report.pass_at_1.difference, report.pass_at_1.smallest_difference
        families = {family: rates.difference for family, rates in report.pass_at_1.families.items()}
    elif report.champion is not None and report.champion.pointer.sha256 == champion.sha256:
        baseline, name = champion, "the champion"
        difference, smallest = report.champion.difference, report.champion.smallest_difference
        families = report.champion.families
    else:
        compared = report.champion.pointer.sha256[:12] if report.champion else "none"
        raise ValueError(
            f"the champion is {champion.sha256[:12]} ({champion.uri}), but the evaluation compared the candidate with "
            f"{compared}; run the evaluation with this champion"
        )
    if not families:
        raise ValueError("the evaluation has no family: nothing was played")
    rules = [
        _main_rule(difference, smallest, name, report, config),
        *(_family_rule(f, d, config) for f, d in sorted(families.items())),
    ]
    verdict = "promoted" if all(rule.holds for rule in rules) else "rejected"
    return GateVerdict.model_validate(
        {"verdict": verdict, "candidate": report.candidate, "baseline": baseline, "rules": rules}
    )


def _main_rule(
    difference: Interval, smallest: float, baseline: str, report: EvaluationReport, config: GateConfig
) -> GateRule:
    return GateRule(
        name="pass@1 is better",
        holds=difference.low > config.gain,
        value=difference.low,
        bound=config.gain,
        explanation=(
            f"sampled pass@1 against {baseline}: {difference.mean:+.3f}, {report.confidence:.0%} interval "
            f"{difference.low:+.3f} to {difference.high:+.3f} over {difference.n} pairs of {report.templates} held-out "
            f"templates; the lower bound must be above {config.gain:g}; the smallest difference that such a sample "
            f"shows with 80% power is {smallest:.3f}"
        ),
    )


def _family_rule(family: str, difference: Interval, config: GateConfig) -> GateRule:
    return GateRule(
        name=f"{family} is not worse",
        holds=difference.low >= -config.family_margin,
        value=difference.low,
        bound=-config.family_margin,
        explanation=(
            f"pass@1 of {family}: {difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f}, "
            f"{difference.n} pairs); the lower bound must not be below {-config.family_margin:g}"
        ),
    )


def run(config: GateConfig, context: StageContext, inputs: dict[str, Pointer]) -> StageResult:
    """Stage `gate`. inputs: evaluation, and champion where there is one; outputs: verdict."""
    report = EvaluationReport.read(context.fetch(inputs["evaluation"]))
    verdict = decide(report, inputs.get("champion"), config)
    directory = context.work_dir / "gate"
    directory.mkdir(exist_ok=True)
    (directory / VERDICT_FILE).write_text(verdict.model_dump_json(indent=1) + "\n")
    pointer = context.publish(
        "gate",
        directory,
        parents=[inputs["evaluation"]],
        facts={"verdict": verdict.verdict, "config": config.model_dump()},
    )
    for rule in verdict.rules:
        context.progress.note(f"{'holds' if rule.holds else 'FAILS'}: {rule.name}: {rule.explanation}")
    summary = {"verdict": verdict.verdict, "rules": [rule.model_dump() for rule in verdict.rules]}
    return StageResult({"verdict": pointer}, summary)


def read_verdict(context: StageContext, pointer: Pointer) -> GateVerdict:
    """The verdict behind a `gate` pointer, verified by hash."""
    return GateVerdict.model_validate_json((context.fetch(pointer) / VERDICT_FILE).read_bytes())
