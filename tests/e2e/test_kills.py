"""Three of the kills of `python -m tests.e2e.kills`."""

import random

import pytest

from tests.e2e import kills

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    return kills.undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("number", range(3))
def test_a_killed_run_ends_as_if_nothing_had_been(tmp_path, quiet, number):
    expected, length = quiet
    assert kills.one(tmp_path, expected, length, random.Random(f"suite/{number}"))["wrong"] == ""
