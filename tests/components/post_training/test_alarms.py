"""Alarms of a collapsing run, on curves written by hand."""

import pytest

from components.post_training.alarms import StepSigns, alarm
from components.post_training.config import AlarmConfig

CONFIG = AlarmConfig(patience=2, entropy_low=0.01, entropy_rise=1.0, kl_high=0.5, reward_drop=0.3)


def steps(reward=(0.5,), entropy=(0.2,), kl=(0.01,)):
    length = max(len(reward), len(entropy), len(kl))

    def pad(values):
        return [*values, *[values[-1]] * (length - len(values))]

    return [StepSigns(*values) for values in zip(pad(reward), pad(entropy), pad(kl), strict=True)]


@pytest.mark.parametrize(
    "curves,expected",
    [
        ({"reward": (0.5, 0.5, 0.5)}, ""),
        ({"entropy": (0.2, 0.2, 0.005, 0.01)}, "entropy_low"),
        ({"entropy": (0.2, 0.2, 0.005, 0.02)}, ""),  # the mean of the window counts
        ({"entropy": (0.2, 0.2, 1.3, 1.3)}, "entropy_rise"),
        ({"entropy": (0.2, 0.2, 1.1, 1.1)}, ""),
        ({"kl": (0.01, 0.6, 0.5)}, "kl"),
        ({"kl": (9.0,)}, ""),  # one step is no window
        ({"reward": (0.5, 0.7, 0.3, 0.29)}, "reward"),  # best window 0.6, last 0.295
        ({"reward": (0.5, 0.7, 0.3, 0.31)}, ""),
    ],
)
def test_alarm(curves, expected):
    assert alarm(steps(**curves), CONFIG) == expected


def test_the_reward_is_compared_with_its_best_mean_not_its_first():
    rising = (0.1, 0.1, 0.8, 0.8, 0.4, 0.4)
    assert alarm(steps(reward=rising), CONFIG) == "reward"
    assert alarm(steps(reward=rising[:-1]), CONFIG) == ""
