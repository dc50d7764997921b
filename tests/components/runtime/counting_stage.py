"""A stage that takes a while and can go on: it counts, keeps where it is in the store, and publishes the count."""

import os
import time

from pydantic import BaseModel, ConfigDict

from components.runtime.errors import InputError
from components.runtime.stage import StageResult
from components.runtime.training_state import TrainingState


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")

    steps: int = 10
    seconds: float = 0.5  # of a step
    refuse: bool = False


def run(config, context, inputs):
    if config.refuse:
        raise InputError("these inputs are refused: give others")
    context.progress.note(f"Ray is at {os.environ['RAY_ADDRESS']}")
    states = TrainingState(context.store, "example", context.identity(config, inputs), context.work_dir, 0.0)
    found = states.latest(context.work_dir)
    done = found[0] if found else 0
    context.progress.note(f"goes on after step {done}" if done else "begins")
    for step in range(done + 1, config.steps + 1):
        time.sleep(config.seconds)
        context.progress.note(f"step {step}")
        states.save(step, lambda folder, step=step: (folder / "step").write_text(str(step)))
    folder = context.work_dir / "out"
    folder.mkdir(exist_ok=True)
    (folder / "count").write_text(str(config.steps))
    pointer = context.publish("checkpoint", folder, facts={"steps": config.steps})
    states.clear()
    return StageResult({"count": pointer}, {"steps": config.steps, "resumed": done})
