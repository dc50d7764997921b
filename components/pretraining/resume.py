"""Goes on where a killed pre-training stopped: weights, optimisers, random numbers, places in the data, curves.

What follows is bitwise what the undisturbed training would have done.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from components.pretraining.data import Stream
from components.runtime.stage import StageContext
from components.runtime.training_state import TrainingState
from model import Transformer

PHASES = ("dense", "warmup", "sparse")
_PHASE_ORDER = 1_000_000  # orders of a phase's states come after those of the phase before it
LAYOUT = 2  # of what is saved; counted up whenever that changes
_FILE = "state.pt"


class Place:
    """Where an earlier try stopped, or the beginning; every rank goes on from the same one."""

    def __init__(self, found: dict[str, Any] | None = None) -> None:
        self._found = found

    def is_past(self, phase: str) -> bool:
        """Whether the earlier try had finished this phase."""
        return self._found is not None and PHASES.index(phase) < PHASES.index(self._found["phase"])

    def load(
        self,
        phase: str,
        model: Transformer,
        optimizers: Sequence[torch.optim.Optimizer],
        generator: torch.Generator,
        streams: Mapping[str, Stream],
    ) -> int:
        """Put everything where the earlier try was, if it was in this phase. Returns the step to go on with."""
        found = self._found
        if found is None or found["phase"] != phase:
            return 0
        model.load_state_dict(found["model"])
        for optimizer, state in zip(optimizers, found["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for kind, stream in streams.items():
            stream.load_state(found["streams"][kind])
        generator.set_state(found["generator"])
        self._found = None
        return int(found["step"])


class Resume:
    """Saves the training now and then, and knows what an earlier try left (`place`)."""

    def __init__(self, context: StageContext, identity: Mapping[str, Any], interval_seconds: float) -> None:
        self.context = context
        self.states = TrainingState(
            context.store,
            "pretraining",
            {**identity, "layout": LAYOUT},
            context.work_dir,
            interval_seconds,
            saved=context.progress.saved,
        )
        self.place = Place()
        latest = self.states.latest(context.work_dir)
        if latest:
            # written by us, under a hash that was checked; tensors and plain values only
            found = torch.load(latest[1] / _FILE, weights_only=True)
            context.tracker.restore(found.pop("history"))
            self.place = Place(found)
            context.progress.note(f"goes on after step {found['step']} of the phase {found['phase']}")
        elif why := self.states.why_anew():
            context.progress.note(f"begins anew, because {why}")

    def save_if_due(
        self,
        phase: str,
        step: int,
        model: Transformer,
        optimizers: Sequence[torch.optim.Optimizer],
        generator: torch.Generator,
        streams: Mapping[str, Stream],
    ) -> None:
        """Save in the background, once the interval is over. `step` steps of the phase are done."""
        if not self.states.due():
            return
        state = copy.deepcopy(
            {
                "phase": phase,
                "step": step,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "generator": generator.get_state(),
                "streams": {kind: stream.state() for kind, stream in streams.items()},
                "history": self.context.tracker.history(),
            }
        )

        def write(folder: Path) -> None:
            torch.save(state, folder / _FILE)

        self.states.save(PHASES.index(phase) * _PHASE_ORDER + step, write)

    def finish(self) -> None:
        """The checkpoint is published: no state is needed any more."""
        self.states.clear()
        self.context.tracker.metrics(self.states.costs(), 0)
