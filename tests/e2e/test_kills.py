"""Three of the kills of `python -m tests.e2e.kills`."""

import random

import pytest

from pipelines.faults import campaign

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
