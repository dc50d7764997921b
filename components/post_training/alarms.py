"""When a run has collapsed: entropy, KL and reward, each a mean over the last steps against a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from components.post_training.config import AlarmConfig


@dataclass(frozen=True)
class StepSigns:
    """What one trained step showed. entropy and kl in nats per sampled token, reward in [0, 1]."""

    reward: float
    entropy: float
    kl: float


def alarm(steps: Sequence[StepSigns], config: AlarmConfig) -> str:
    """The name of the alarm that the steps so far raise: entropy_low, entropy_rise, kl, reward; or "" for none.

    Nothing is raised before `patience` steps, and only the last window is judged: call it after every step.
    """
    window = config.patience
    if len(steps) < window:
        return ""

    def mean(name: str, end: int) -> float:
        return sum(getattr(step, name) for step in steps[end - window : end]) / window

    last = len(steps)
    if mean("entropy", last) < config.entropy_low:
        return "entropy_low"
    if mean("entropy", last) > mean("entropy", window) + config.entropy_rise:
        return "entropy_rise"
    if mean("kl", last) > config.kl_high:
        return "kl"
    best = max(mean("reward", end) for end in range(window, last + 1))
    if mean("reward", last) < best - config.reward_drop:
        return "reward"
    return ""
