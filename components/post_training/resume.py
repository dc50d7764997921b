"""Goes on where a killed post-training stopped: weights, optimiser, prompts, ledger, validations, random numbers.

With the synchronous schedule what follows is bitwise what the undisturbed training would have done. With the others
groups that were under way are played again, with the weights of now and their own seeds: no prompt is lost, and none is
trained on twice.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from components.post_training.alarms import StepSigns
from components.post_training.curation import PromptSampler
from components.post_training.ledger import Ledger, LedgerError, check_ledger
from components.post_training.records import StepRecorder
from components.post_training.trainer import Learner
from components.post_training.validation import Validation
from components.runtime.errors import InputError
from components.runtime.stage import StageContext
from components.runtime.training_state import TrainingState

LAYOUT = 3  # of what is saved; counted up whenever that changes
_FILE = "state.pt"


@dataclass
class Course:
    """How far the training has come, between two steps. `best` is the validation that chose `best_weights`."""

    step: int = 0
    first: Validation | None = None
    best: Validation | None = None
    best_step: int = 0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    rollouts: int = 0
    trained_rollouts: int = 0
    empty: int = 0  # batches in a row without a group to learn from
    staleness_max: int = 0
    gap_max: float = 0.0
    signs: list[StepSigns] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As tensors and plain values."""
        return {
            **vars(self),
            "first": asdict(self.first) if self.first else None,
            "best": asdict(self.best) if self.best else None,
            "best_weights": {name: tensor.clone() for name, tensor in self.best_weights.items()},
            "signs": [asdict(signs) for signs in self.signs],
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Course:
        validations = {name: Validation(**plain[name]) if plain[name] else None for name in ("first", "best")}
        return cls(**{**plain, **validations, "signs": [StepSigns(**signs) for signs in plain["signs"]]})


class Resume:
    """Saves the training now and then, and takes up what an earlier try left."""

    def __init__(self, context: StageContext, identity: Mapping[str, Any], interval_seconds: float) -> None:
        self.context = context
        self.states = TrainingState(
            context.store,
            "post_training",
            {**identity, "layout": LAYOUT},
            context.work_dir,
            interval_seconds,
            saved=context.progress.saved,
        )
        self._found: dict[str, Any] | None = None
        latest = self.states.latest(context.work_dir)
        if latest:
            # written by us, under a hash that was checked; tensors and plain values only
            self._found = torch.load(latest[1] / _FILE, weights_only=True)
            context.tracker.restore(self._found["history"])

    def load(
        self, learner: Learner, sampler: PromptSampler, ledger: Ledger, recorder: StepRecorder, rng: random.Random
    ) -> Course:
        """Put everything where the earlier try was, and return how far it had come; the beginning without one.

        Raises InputError when the ledger of the state is damaged.
        """
        found = self._found
        if found is None:
            if why := self.states.why_anew():
                self.context.progress.note(f"begins anew, because {why}")
            return Course()
        try:
            check_ledger(found["ledger"], ended=False)
        except LedgerError as error:
            place = f"{self.states.store.uri}/{self.states.prefix}"
            raise InputError(
                f"the ledger in the training state {place}: {error}; remove {place} to begin anew"
            ) from error
        learner.load_state(found["learner"])
        sampler.load_state(found["sampler"])
        lost = ledger.go_on(found["ledger"])
        sampler.again(lost)
        recorder.load_state(found["records"])
        rng.setstate(found["rng"])
        self._found = None
        course = Course.of(found["course"])
        told = f"; {len(lost)} groups that were under way are played again" if lost else ""
        self.context.progress.note(f"goes on after step {course.step}{told}")
        return course

    def save_if_due(
        self,
        course: Course,
        learner: Learner,
        sampler: PromptSampler,
        ledger: Ledger,
        recorder: StepRecorder,
        rng: random.Random,
    ) -> None:
        """Save in the background, once the interval is over."""
        if not self.states.due():
            return
        state = {
            "course": course.plain(),
            "learner": copy.deepcopy(learner.state()),
            "sampler": sampler.state(),
            "ledger": list(ledger.records),
            "records": recorder.state(),
            "rng": rng.getstate(),
            "history": self.context.tracker.history(),
        }
        self.states.save(course.step, lambda folder: torch.save(state, folder / _FILE))

    def finish(self) -> None:
        """The checkpoint is published: no state is needed any more."""
        self.states.clear()
        self.context.tracker.metrics(self.states.costs(), 0)
