"""The synthesis pipeline: a task set and nothing else.

sparseline run --pipeline synthesis --profile nano --seed 7
"""

# No `from __future__ import annotations` here: KFP reads the annotations of the pipeline function as types.
from collections.abc import Callable
from typing import Any

from kfp import dsl

from components.synthesis.component import synthesis

NAME = "sparseline-synthesis"
DESCRIPTION = """Makes a task set: tasks that can be checked, demonstrations and long documents.

Parameter: `seed` (of everything random)."""


def synthesis_pipeline(baked: dict[str, dict[str, str]], prepare: Callable[[str, Any], None]) -> Any:
    """The pipeline with these constants by stage. `prepare(stage, task)` is called for every task."""

    @dsl.pipeline(name=NAME, description=DESCRIPTION)
    def synthesise(seed: int) -> None:
        made = synthesis(**baked["synthesis"], seed=seed)
        made.set_display_name("Synthesis")
        prepare("synthesis", made)

    return synthesise
