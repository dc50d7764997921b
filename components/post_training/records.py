"""Records of RL steps, from which `components.post_training.replay` executes them again.

A recorded step is an artifact of its own: what the step began with (weights, optimiser, prompts, random numbers), what
was played, and the digests of both results. Between two recorded steps only the digests are kept, in `steps.jsonl`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from components.environments.protocol import Verdict
from components.post_training.config import PostTrainingConfig
from components.post_training.curation import PromptSampler
from components.post_training.flow import Batch
from components.post_training.trainer import Learner
from components.post_training.worker import PlayedGroup
from components.rollouts import EpisodeResult
from components.runtime.contracts import Message, Pointer, TaskRecord
from components.runtime.stage import StageContext
from model import Transformer
from model.engine import Trajectory

LAYOUT = 1  # of a record; counted up whenever it changes
STATE, ABOUT, DIGESTS = "step.pt", "about.json", "steps.jsonl"
_NAME = "step_"  # how the outputs that are records begin
_EXACT = ("token_ids", "sampled", "logprobs", "weight_versions", "routing")


def weights_digest(model: Transformer) -> str:
    """sha256 (hex) of all weights and buffers, by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def rollouts_digest(groups: Iterable[PlayedGroup]) -> str:
    """sha256 (hex) of everything that the engine produced and the environments judged, in the groups' order."""
    found = hashlib.sha256()
    for group in sorted(groups, key=lambda group: group.id):
        found.update(json.dumps([group.id, group.task.id, group.fault]).encode())
        for episode in group.episodes:
            found.update(json.dumps([episode.seed, float(episode.verdict.reward), episode.ended]).encode())
            if episode.trajectory is not None:
                for name in _EXACT:
                    found.update(_bytes(getattr(episode.trajectory, name)))
                for mask in episode.trajectory.sampling_masks or ():
                    found.update(_bytes(mask))
    return found.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class StepRecorder:
    """Writes the records of one training. `steps` are those that were recorded so far, by number, counted from 1.

    digests: of each step that was taken, one mapping a step.
    """

    def __init__(self, context: StageContext, config: PostTrainingConfig, inputs: Mapping[str, Pointer]) -> None:
        self.context, self.config, self.inputs = context, config, dict(inputs)
        self.steps: dict[int, Pointer] = {}
        self.digests: list[dict[str, Any]] = []
        self._before: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """In plain values, for the training state."""
        steps = {number: pointer.model_dump() for number, pointer in self.steps.items()}
        return {"steps": steps, "digests": list(self.digests)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.steps = {number: Pointer(**pointer) for number, pointer in state["steps"].items()}
        self.digests = list(state["digests"])

    def due(self, number: int) -> bool:
        """Whether the step of this number is to be recorded."""
        every = self.config.record_every
        return bool(every) and (number == 1 or number % every == 0)

    def before(self, number: int, learner: Learner, sampler: PromptSampler, rng: random.Random) -> None:
        """The step is about to begin: keep what it begins with, where it is to be recorded."""
        self._before = None
        if self.due(number):
            self._before = {
                "learner": copy.deepcopy(learner.state()),
                "sampler": sampler.state(),
                "rng": rng.getstate(),
            }

    def after(self, number: int, learner: Learner, batch: Batch, learned: Mapping[str, float]) -> None:
        """The step is done: note its digests, and publish its record where it is to have one."""
        if not self.config.record_every:
            return
        digests = {
            "step": number,
            "rollouts": rollouts_digest(batch.played),
            "weights": weights_digest(learner.model),
        }
        self.digests.append(digests)
        if self._before is None:
            return
        folder = self.context.work_dir / f"step-{number:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        played = [group_to_plain(group) for group in batch.played]
        trained = [group.id for group in batch.groups]
        torch.save({"before": self._before, "played": played, "trained": trained}, folder / STATE)
        about = {
            "layout": LAYOUT,
            "step": number,
            "config": self.config.model_dump(mode="json"),
            "seed": self.context.seed,
            "code": self.context.code,
            "inputs": {name: pointer.model_dump() for name, pointer in self.inputs.items()},
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "version": batch.version,
            "learned": dict(learned),
            **{name: digests[name] for name in ("rollouts", "weights")},
        }
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        parents = list(self.inputs.values())
        self.steps[number] = self.context.publish("step-record", folder, parents=parents, facts={"step": number})
        shutil.rmtree(folder)
        self._before = None

    def finish(self) -> dict[str, Pointer]:
        """Keep the digests with the run. Returns the records as outputs of the stage."""
        if self.digests:
            path = self.context.work_dir / DIGESTS
            path.write_text("".join(json.dumps(one) + "\n" for one in self.digests))
            self.context.tracker.artifact(path)
        return {f"{_NAME}{number}": pointer for number, pointer in self.steps.items()}


def recorded(outputs: Mapping[str, Pointer]) -> dict[int, Pointer]:
    """The records among a stage's outputs, by number of the step: the inverse of `StepRecorder.finish`."""
    return {int(name.removeprefix(_NAME)): pointer for name, pointer in outputs.items() if name.startswith(_NAME)}


def group_to_plain(group: PlayedGroup) -> dict[str, Any]:
    """As tensors and plain values; the task is named by its id."""
    return {
        "id": group.id,
        "task": group.task.id,
        "version": group.version,
        "fault": group.fault,
        "episodes": [
            {
                **{name: getattr(episode, name) for name in ("seed", "turns", "tool_errors", "ended", "fault")},
                "messages": [message.model_dump() for message in episode.messages],
                "verdict": {"reward": float(episode.verdict.reward), "reason": episode.verdict.reason},
                "trajectory": vars(episode.trajectory) if episode.trajectory is not None else None,
            }
            for episode in group.episodes
        ],
    }


def group_from_plain(plain: Mapping[str, Any], tasks: Mapping[str, TaskRecord]) -> PlayedGroup:
    """The inverse of `group_to_plain`. Raises KeyError for a task that is not among `tasks` (by id)."""
    task = tasks[plain["task"]]
    episodes = [
        EpisodeResult(
            task=task,
            messages=[Message(**message) for message in one["messages"]],
            verdict=Verdict(**one["verdict"]),
            trajectory=Trajectory(**one["trajectory"]) if one["trajectory"] is not None else None,
            **{name: one[name] for name in ("seed", "turns", "tool_errors", "ended", "fault")},
        )
        for one in plain["episodes"]
    ]
    return PlayedGroup(plain["id"], task, episodes, plain["version"], plain["fault"])
