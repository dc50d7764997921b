"""Demonstrations: played tasks to continue pre-training on, some of them wrong on purpose.

The tasks are drawn anew (train templates, other seeds than the RL tasks'), one per demonstration: nothing in the text
before the first move tells a right demonstration from a wrong one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from components.runtime.contracts import Demonstration
from components.synthesis.family import CAREFUL, Family, Split, shortcut_of
from components.synthesis.splits import draw_template, kinds_of_template

_DRAWS = 300  # tasks drawn for one demonstration


@dataclass
class _Share:
    """Deals wrong demonstrations evenly: of n, within one of n times the share."""

    share: float
    owed: float = 0.5

    def next(self) -> bool:
        self.owed += self.share
        wrong = self.owed >= 1
        self.owed -= wrong
        return wrong


def make_demonstrations(
    family: Family,
    templates: Sequence[str],
    number: int,
    wrong_share: float,
    shortcut_share: float,
    split: Split,
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> list[Demonstration]:
    """`number` demonstrations in random order, right or wrong by the verifier.

    Of a template with a shortcut, the share `shortcut_share` follows it; of the others, `wrong_share` are by a wrong
    teacher that applies to the task, chosen at random. The rest are careful.
    Raises RuntimeError when the careful teacher fails, or a shortcut never applies: the family is broken.
    """
    rng = random.Random(f"synthesis/{family.name}/demonstrations/{split}/{seed}")
    groups = kinds_of_template(family, templates)
    wrong, shortcuts = _Share(wrong_share), _Share(shortcut_share)
    made: list[Demonstration] = []
    while len(made) < number:
        template = draw_template(groups, rng)
        shortcut = shortcut_of(family, template)
        is_wrong = shortcuts.next() if shortcut else wrong.next()
        made.append(_demonstration(family, template, split, rng, is_wrong, shortcut))
        tick()
    return made


def _demonstration(
    family: Family, template: str, split: Split, rng: random.Random, is_wrong: bool, shortcut: str | None
) -> Demonstration:
    for _ in range(_DRAWS):
        task = family.generate(template, rng.getrandbits(48), split)
        applicable = family.wrong_kinds(task) if is_wrong else []
        if shortcut:
            applicable = [kind for kind in applicable if kind == shortcut]
        if is_wrong and not applicable:
            continue  # the shortcut is right on this task: another one shows it
        kind = rng.choice(applicable) if is_wrong else CAREFUL
        played = family.play(task, kind, rng)
        if kind == CAREFUL and not played.passed:
            raise RuntimeError(f"{family.name}: the careful teacher fails on template {task.template} seed {task.seed}")
        if played.passed == (kind == CAREFUL):  # a wrong teacher that hit the answer by luck shows nothing: drawn again
            return played
    raise RuntimeError(f"{family.name}: no task of template {template!r} shows the teacher {shortcut or 'wrong'!r}")
