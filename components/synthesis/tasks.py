"""Tasks of a split, each past the validation battery; what a check removes is replaced by another draw."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from components.runtime.contracts import TaskRecord
from components.runtime.errors import InputError
from components.synthesis.battery import Battery
from components.synthesis.family import Family, Split
from components.synthesis.splits import draw_template, kinds_of_template

_DRAWS_PER_TASK = 10


def make_tasks(
    family: Family,
    templates: Sequence[str],
    number: int,
    split: Split,
    seed: int,
    battery: Battery,
    tick: Callable[[], None] = lambda: None,
) -> list[TaskRecord]:
    """`number` tasks of `templates` that pass the battery, the same for the same arguments.

    Training tasks draw each kind of template equally often; the other splits take their templates in turn, so that
    each has the same number of tasks. Raises InputError when the battery leaves too few.
    """
    rng = random.Random(f"synthesis/{family.name}/tasks/{split}/{seed}")
    groups = kinds_of_template(family, templates)
    kept: list[TaskRecord] = []
    for _ in range(number * _DRAWS_PER_TASK):
        if len(kept) == number:
            return kept
        template = draw_template(groups, rng) if split == "train" else templates[len(kept) % len(templates)]
        task = family.generate(template, rng.getrandbits(48), split)
        if battery.keeps(task):
            kept.append(task)
            tick()
    if len(kept) == number:
        return kept
    raise InputError(
        f"synthesis: only {len(kept)} of {number} {split} tasks of {family.name} passed the battery in "
        f"{number * _DRAWS_PER_TASK} draws (removed: {battery.removed}); ask for fewer tasks or more templates"
    )
