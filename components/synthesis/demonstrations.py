"""Demonstrations: played tasks to continue pre-training on, some of them wrong on purpose.

The tasks are drawn anew (train templates, other seeds than the RL tasks'), one per demonstration: nothing in the text
before the first move tells a right demonstration from a wrong one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from components.runtime.contracts import Demonstration
from components.synthesis.family import CAREFUL, Family, Split
from components.synthesis.splits import draw_template, kinds_of_template


def make_demonstrations(
    family: Family,
    templates: Sequence[str],
    number: int,
    wrong_share: float,
    split: Split,
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> list[Demonstration]:
    """`number` demonstrations, int(number * wrong_share) of them wrong by the verifier, the others right.

    Each wrong one is by a teacher that applies to its task, chosen at random. The order is random.
    Raises RuntimeError when the careful teacher fails: the family is broken.
    """
    rng = random.Random(f"synthesis/{family.name}/demonstrations/{split}/{seed}")
    groups = kinds_of_template(family, templates)
    wrong = [index < int(number * wrong_share) for index in range(number)]
    rng.shuffle(wrong)
    made: list[Demonstration] = []
    while len(made) < number:
        task = family.generate(draw_template(groups, rng), rng.getrandbits(48), split)
        kind = rng.choice(family.wrong_kinds(task)) if wrong[len(made)] else CAREFUL
        played = family.play(task, kind, rng)
        if kind == CAREFUL and not played.passed:
            raise RuntimeError(f"{family.name}: the careful teacher fails on template {task.template} seed {task.seed}")
        if played.passed == (kind == CAREFUL):  # a wrong teacher that hit the answer by luck shows nothing: drawn again
            made.append(played)
            tick()
    return made
