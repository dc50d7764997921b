"""Three of the kills of `python -m tests.e2e.kills`."""

import random

import pytest

from pipelines.faults import campaign, recovery
from pipelines.faults.case import Case

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PLAN = campaign.Plan("micro", 0, {"kill": 3})


@pytest.fixture(scope="module")
def place():
    with campaign.scratch() as folder:
        yield folder


@pytest.fixture(scope="module")
def quiet(place):
    return campaign.undisturbed(place / "undisturbed", PLAN.profile, PLAN.limit_seconds)


@pytest.mark.parametrize("number", range(3))
def test_a_killed_run_ends_as_if_nothing_had_been(place, quiet, number):
    rng = random.Random(f"suite/{number}")
    assert campaign.one("kill", place / f"kill-{number}", PLAN, *quiet, rng)["wrong"] == ""


def test_recovery_is_measured_in_each_training_stage(place):
    settings = [f"{stage}.state_seconds=0" for stage in recovery.STAGES] + ["post_training.steps=12"]
    case = Case(place / "recovery", "micro", settings=settings)
    try:
        rows = recovery.measure(case, 2, 0.5, random.Random(0), 800.0)
    finally:
        case.end()
    assert [row["stage"] for row in rows] == ["pretraining", "post_training"]
    assert all(row["seconds"] > 1 for row in rows)
    cost = recovery.overhead(case)
    assert set(cost) == set(recovery.STAGES)
    assert all(0 < one["share_waited"] <= one["share_all"] for one in cost.values())
