"""What a stage tells about itself while it runs: steps, rates, notes, episodes.

A stage writes events to `progress.jsonl` in its folder. `sparseline run` follows that file and draws the display; a
stage that is started by hand, or in a pod, prints one line an interval instead.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path

INTERVAL_SECONDS = 0.25  # of events in the file: a display needs no more
LINE_SECONDS = 10.0  # of lines in a pod's log


def rate_and_left(step: int, total: int, seconds: float) -> tuple[float, float]:
    """Steps per second so far, and seconds left at that rate (infinite before the first step)."""
    rate = step / seconds if seconds > 0 else 0.0
    return rate, (total - step) / rate if rate > 0 else float("inf")


class Progress:
    """The progress of one stage. `echo` also prints lines, for a log that a person reads.

    Lines are text, or with `structured` JSON: time (UTC), run, stage, phase, step, total, values or text. `clock` gives
    seconds and only ever grows; tests pass their own.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        stage: str = "",
        echo: bool = False,
        run: str = "",
        structured: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = path.open("a", buffering=1) if path else None
        self._stage, self._echo, self._clock = stage, echo, clock
        self._run, self._structured = run, structured
        self._start = clock()
        self._phase_start = self._start
        self._last_event = self._last_line = float("-inf")
        self._first_step: int | None = None
        self._last_step = self._total = 0
        self._phase = ""

    def _write(self, event: dict[str, object]) -> None:
        if self._file:
            event = {"seconds": round(self._clock() - self._start, 3), **event}
            self._file.write(json.dumps(event) + "\n")

    def _print(self, text: str, values: Mapping[str, float] | None = None) -> None:
        if not self._echo:
            return
        line = f"[{self._stage}] {text}"
        if self._structured:
            phase, step, total = self.place()
            told: dict[str, object] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
            told |= {"run": self._run, "stage": self._stage, "phase": phase, "step": step, "total": total}
            told |= (
                {"text": text}
                if values is None
                else {"values": {name: value if isfinite(value) else str(value) for name, value in values.items()}}
            )
            line = json.dumps(told)
        print(line, file=sys.stderr, flush=True)

    def phase(self, name: str) -> None:
        """A new part of the stage begins; steps count from 0 again."""
        self._phase, self._first_step, self._last_step, self._total = name, None, 0, 0
        self._last_event = self._last_line = float("-inf")
        self._write({"kind": "phase", "name": name})
        self._print(name)

    def update(self, step: int, total: int, values: Mapping[str, float] | None = None) -> None:
        """`step` of `total` is done. Cheap: events are thinned to a few per second, the last one is always kept."""
        now = self._clock()
        if self._first_step is None or step < self._last_step:
            # The rate counts from the first step that is reported: what came before it was preparation.
            self._first_step, self._phase_start = step, now
        self._last_step, self._total = step, total
        rate, left = rate_and_left(step - self._first_step, total - self._first_step, now - self._phase_start)
        last = step >= total
        if last or now - self._last_event >= INTERVAL_SECONDS:
            self._last_event = now
            event: dict[str, object] = {"kind": "step", "step": step, "total": total, "rate": round(rate, 4)}
            if left != float("inf"):
                event["left"] = round(left, 1)
            event["values"] = {name: float(value) for name, value in (values or {}).items()}
            self._write(event)
        if last or now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            shown = " ".join(f"{name}={value:.4g}" for name, value in (values or {}).items())
            remaining = f", {left:.0f} s left" if left != float("inf") else ""
            self._print(f"{self._phase} {step}/{total} ({rate:.3g}/s{remaining}) {shown}".strip(), values or {})

    def place(self) -> tuple[str, int, int]:
        """Phase, steps done in it, and its steps in all. May be called from another thread."""
        return self._phase, self._last_step, self._total

    def episode(self, text: str) -> None:
        """An episode that the model just played, as text."""
        self._write({"kind": "episode", "text": text})

    def saved(self, order: int) -> None:
        """A training state is whole; for whoever follows the file."""
        self._write({"kind": "saved", "order": order})

    def note(self, text: str) -> None:
        """One sentence for the reader of the display or the log."""
        self._write({"kind": "note", "text": text})
        self._print(text)

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
