"""Calls an environment so that nothing it does ends more than its own episode.

An environment, or its verifier, is other people's code: it may raise, hang, answer with something else than text, judge
the same episode in two ways, or give a reward that is none. Each of these is a fault of the episode, by name; a faulty
episode counts as failed, is not trained on, and says so in the records.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from components.environments.protocol import Environment, Episode, Observation, Verdict
from components.runtime.contracts import TaskRecord, ToolCall

_T = TypeVar("_T")


class _Overdue(BaseException):
    """Not an Exception, so that an environment's own `except Exception` lets it through."""


class GuardedEpisode:
    """An episode of `environment`; `fault` is "" until something goes wrong, and then stays what it was first.

    A call may take `seconds`. The limit is a timer signal, which interrupts Python code and blocking system calls, and
    so holds in the main thread only, where the stages play.
    """

    def __init__(self, environment: Environment, task: TaskRecord, seconds: float) -> None:
        self.fault, self.seconds = "", seconds
        self._episode: Episode | None = self._call("reset", lambda: environment.reset(task))

    def step(self, call: ToolCall) -> Observation:
        """The environment's answer; one that ends the episode where there is none."""
        episode = self._episode
        observation = self._call(f"the call of {call.name}", lambda: episode.step(call)) if episode else None
        if not self.fault and not (isinstance(observation, Observation) and isinstance(observation.content, str)):
            content = getattr(observation, "content", observation)
            self.fault = f"bad_observation: the call of {call.name} gave {type(content).__name__} and no text"
        return Observation("", done=True, is_error=True) if self.fault or observation is None else observation

    def verdict(self) -> Verdict:
        """The verifier's verdict, asked for twice; of a faulty episode reward 0 with the fault as the reason."""
        first, second = self._verdict(), self._verdict()
        if not self.fault and (first.reward, first.reason) != (second.reward, second.reason):
            self.fault = (
                f"verifier_disagrees: it gave {first.reward} ({first.reason}), and asked again "
                f"{second.reward} ({second.reason})"
            )
        return Verdict(0.0, self.fault) if self.fault else first

    def _verdict(self) -> Verdict:
        nothing = Verdict(0.0, "")
        episode = self._episode
        if episode is None or self.fault:
            return nothing
        verdict = self._call("the verifier", episode.verdict)
        if not self.fault:
            self.fault = _bad_reward(verdict)
        return nothing if self.fault or verdict is None else verdict

    def _call(self, what: str, function: Callable[[], _T]) -> _T | None:
        if self.fault:
            return None
        try:
            with _deadline(self.seconds):
                return function()
        except _Overdue:
            self.fault = f"environment_hangs: {what} took more than {self.seconds:g} s"
        except TimeoutError as error:  # of an environment in another process, which has its own deadline
            self.fault = f"environment_hangs: {error}"
        except Exception as error:
            self.fault = f"environment_raised: {what}: {type(error).__name__}: {error}"
        return None


def _bad_reward(verdict: object) -> str:
    if not isinstance(verdict, Verdict):
        return f"bad_reward: the verifier gave {type(verdict).__name__} and no verdict"
    reward = verdict.reward
    if isinstance(reward, bool) or not isinstance(reward, (int, float)):
        return f"bad_reward: {reward!r} is no number"
    if not math.isfinite(reward) or not 0 <= reward <= 1:
        return f"bad_reward: {reward} lies outside [0, 1]"
    return ""


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise _Overdue in the main thread after `seconds`. A timer that ran before goes on afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def overdue(number: int, frame: FrameType | None) -> None:
        raise _Overdue

    handler, started = signal.signal(signal.SIGALRM, overdue), time.monotonic()
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if remaining:
            left = remaining - (time.monotonic() - started)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001), interval)
