"""The gate: each verdict by its numbers, and faults that must never look like a rejection."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from components.evaluation import gate, rejected
from components.evaluation.gate import GateConfig, decide
from components.evaluation.report import (
    BestTemperature,
    Champion,
    CrossEntropy,
    DepthBin,
    EvaluationReport,
    FamilyRates,
    IndexerRecall,
    PassAt1,
    Rate,
    Sides,
)
from components.runtime.contracts import Interval, Pointer
from components.runtime.errors import GateRejected, exit_code
from components.runtime.object_store import open_store
from components.runtime.progress import Progress
from components.runtime.stage import StageContext
from components.runtime.tracking import Tracker


def pointer(letter: str) -> Pointer:
    return Pointer(kind="checkpoint", uri=f"file:///{letter}", sha256=letter * 64)


def interval(mean: float, low: float, high: float) -> Interval:
    return Interval(mean=mean, low=low, high=high, n=500)


def family_rates(difference: Interval) -> FamilyRates:
    flat = interval(0.5, 0.4, 0.6)
    return FamilyRates(
        before=flat, after=flat, difference=difference, before_wilson=flat, after_wilson=flat, p_value=0.1,
        p_adjusted=0.2,
    )  # fmt: skip


def make_report(
    difference: Interval, families: dict[str, Interval] | None = None, champion: Champion | None = None
) -> EvaluationReport:
    rate = Rate(macro=0.5, low=0.4, high=0.6, n=500)
    flat = interval(0.5, 0.4, 0.6)
    sides = Sides(before=rate, after=rate, difference=difference)
    families = {"kg_query": difference} if families is None else families
    ce = CrossEntropy(dense=1, sparse=1.01, window=2, random=2, gap=flat, window_gap=flat, random_gap=flat, tokens=5)
    return EvaluationReport(
        tasks=pointer("0").model_copy(update={"kind": "task-set"}),
        before=pointer("a"),
        candidate=pointer("b"),
        champion=champion,
        seed=0,
        max_sequences=256,
        separate=["compiled"],
        faults=[],
        confidence=0.95,
        resamples=10_000,
        templates=24,
        top_k=32,
        document_words=272,
        pass_at_1=PassAt1(
            before=rate,
            after=rate,
            difference=difference,
            smallest_difference=0.0625,
            families={n: family_rates(d) for n, d in families.items()},
            before_best_temperature=BestTemperature(
                temperature=0.5, validation={"0.5": flat}, test=rate, difference=difference
            ),
        ),
        greedy=sides,
        ce=ce,
        ce_answers=ce,
        indexer_recall=IndexerRecall(
            layer=1,
            all_words=flat,
            answer_layer=1,
            answer_word=flat,
            by_layer={"all_words": [0.1, 0.9], "answer_word": [0.1, 0.9]},
            validation_by_layer={"all_words": [0.1, 0.9], "answer_word": [0.1, 0.9]},
            depth=[DepthBin(low=64, high=128, all_words=1.0, answer_word=1.0, n=3)],
        ),
        logprob_gap=1e-6,
    )


GOOD, DOUBTFUL = interval(0.3, 0.2, 0.4), interval(0.3, -0.001, 0.6)


def test_promotes_when_the_lower_bound_is_above_zero() -> None:
    verdict = decide(make_report(GOOD), None, GateConfig())
    assert verdict.verdict == "promoted"
    assert (verdict.candidate, verdict.baseline) == (pointer("b"), pointer("a"))
    assert [(rule.value, rule.bound, rule.holds) for rule in verdict.rules] == [(0.2, 0.0, True), (0.2, -0.05, True)]
    assert "80% power is 0.062" in verdict.rules[0].explanation


@pytest.mark.parametrize("low", [-0.001, 0.0])
def test_rejects_when_the_interval_touches_zero(low: float) -> None:
    verdict = decide(make_report(interval(0.3, low, 0.6)), None, GateConfig())
    assert verdict.verdict == "rejected"
    assert [rule.holds for rule in verdict.rules] == [False, True]


@pytest.mark.parametrize("low, verdict", [(-0.049, "promoted"), (-0.05, "promoted"), (-0.051, "rejected")])
def test_one_family_that_may_be_worse_rejects(low: float, verdict: str) -> None:
    families = {"good": GOOD, "weak": interval(low + 0.1, low, low + 0.2)}
    found = decide(make_report(GOOD, families), None, GateConfig(family_margin=0.05))
    assert found.verdict == verdict
    assert [rule.name for rule in found.rules] == ["pass@1 is better", "good is not worse", "weak is not worse"]
    assert found.rules[2].holds == (verdict == "promoted")


def test_the_champion_is_the_baseline_where_there_is_one() -> None:
    rate = Rate(macro=0.5, low=0.4, high=0.6, n=500)
    champion = Champion(
        pointer=pointer("c"), rate=rate, difference=DOUBTFUL, smallest_difference=0.25, families={"kg_query": DOUBTFUL}
    )
    verdict = decide(make_report(GOOD, champion=champion), pointer("c"), GateConfig())
    assert (verdict.verdict, verdict.baseline) == ("rejected", pointer("c"))
    assert decide(make_report(GOOD, champion=champion), None, GateConfig()).verdict == "promoted"


def test_the_champion_itself_is_unchanged_whatever_the_numbers_say() -> None:
    verdict = decide(make_report(DOUBTFUL), pointer("b"), GateConfig())
    assert (verdict.verdict, verdict.baseline) == ("unchanged", pointer("b"))


def test_a_champion_that_was_not_compared_is_a_fault() -> None:
    with pytest.raises(ValueError, match="run the evaluation with this champion") as caught:
        decide(make_report(GOOD), pointer("c"), GateConfig())
    assert exit_code(caught.value) == 1


def test_no_family_is_a_fault() -> None:
    with pytest.raises(ValueError, match="no family"):
        decide(make_report(GOOD, families={}), None, GateConfig())


def test_nan_is_not_written(tmp_path: Path) -> None:
    broken = make_report(interval(0.3, math.nan, 0.4))
    with pytest.raises(ValueError, match=r"evaluation.pass_at_1.difference.low is nan"):
        broken.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["NaN", "null", "Infinity", '"high"', None])
def test_nan_missing_or_wrong_numbers_are_faults_when_read(tmp_path: Path, text: str | None) -> None:
    make_report(GOOD).write(tmp_path)
    path = tmp_path / "evaluation.json"
    document = json.loads(path.read_text())
    del document["pass_at_1"]["difference"]["low"]
    if text is not None:
        document["pass_at_1"]["difference"]["low"] = "@"
    path.write_text(json.dumps(document).replace('"@"', text or ""))
    with pytest.raises((ValidationError, ValueError), match="low") as caught:
        EvaluationReport.read(tmp_path)
    assert exit_code(caught.value) == 1


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    work = tmp_path / "work"
    work.mkdir()
    return StageContext("gate", "test", 0, work, open_store(str(tmp_path / "store")), Tracker(), Progress())


def publish(context: StageContext, report: EvaluationReport) -> Pointer:
    directory = context.work_dir / "evaluation"
    directory.mkdir()
    report.write(directory)
    return context.publish("evaluation", directory)


def test_stage_publishes_the_verdict_and_rejected_fails_by_name(context: StageContext) -> None:
    evaluation = publish(context, make_report(DOUBTFUL))
    result = gate.run(GateConfig(), context, {"evaluation": evaluation})
    assert result.summary["verdict"] == "rejected"
    assert gate.read_verdict(context, result.outputs["verdict"]).rules[0].value == -0.001
    with pytest.raises(GateRejected, match=r"pass@1 is better: .*\+0.300") as caught:
        rejected.run(rejected.RejectedConfig(), context, {"verdict": result.outputs["verdict"]})
    assert exit_code(caught.value) == 3


def test_rejected_refuses_a_verdict_that_is_none(context: StageContext) -> None:
    result = gate.run(GateConfig(), context, {"evaluation": publish(context, make_report(GOOD))})
    with pytest.raises(ValueError, match="promoted"):
        rejected.run(rejected.RejectedConfig(), context, result.outputs)


@pytest.mark.parametrize(
    ("low", "gain", "verdict"), [(0.05, 0.0, "promoted"), (0.05, 0.1, "rejected"), (-0.9, -1.0, "promoted")]
)
def test_the_gain_that_is_asked_for_is_a_bound_of_the_configuration(low: float, gain: float, verdict: str) -> None:
    config = GateConfig(gain=gain, family_margin=1.0)
    decided = decide(make_report(interval(low + 0.05, low, low + 0.1)), None, config)
    assert decided.verdict == verdict
    assert decided.rules[0].bound == gain
    assert f"must be above {gain:g}" in decided.rules[0].explanation
