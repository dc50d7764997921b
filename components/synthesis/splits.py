"""Which templates belong to which split. A template is a program, so a held-out one was never seen in any wording."""

from __future__ import annotations

import random
from collections.abc import Sequence

from components.runtime.errors import InputError
from components.synthesis.family import Family, Split


def kinds_of_template(family: Family, templates: Sequence[str]) -> list[list[str]]:
    """Templates grouped by operator and number of hops, in a fixed order of the kinds."""
    groups: dict[str, list[str]] = {}
    for template in templates:
        about = family.describe(template)
        groups.setdefault(f"{about['operator']}/{about['hops']}", []).append(template)
    return [groups[kind] for kind in sorted(groups)]


def groups_of_templates(family: Family, templates: Sequence[str]) -> dict[str, list[str]]:
    """Group -> templates that are held out together: those of one environment, or, without groups, each by itself."""
    groups: dict[str, list[str]] = {}
    for template in templates:
        groups.setdefault(str(family.describe(template).get("group", template)), []).append(template)
    return groups


def split_templates(family: Family, seed: int, validation: int, test: int) -> dict[Split, list[str]]:
    """A seeded split of all templates: `test` and `validation` many groups of them, the rest for training.

    Held-out groups are dealt in turn from each kind (operator and hops), so that every kind is among them when there
    are at least as many as kinds; environments, which have templates of several kinds, are dealt from one shuffled
    pile. Raises InputError when nothing would be left for training.
    """
    groups = groups_of_templates(family, family.templates())
    singles = all(len(members) == 1 for members in groups.values())
    kinds = kinds_of_template(family, list(groups)) if singles else [list(groups)]
    rng = random.Random(f"synthesis/{family.name}/split/{seed}")
    for kind in kinds:
        rng.shuffle(kind)
    if validation + test + len(kinds) > len(groups):
        what = "templates" if singles else "environments"
        raise InputError(
            f"synthesis: {test} test and {validation} validation {what} leave too few of the {len(groups)} {what} of "
            f"{family.name} for training; lower test_{what} or validation_{what}"
        )
    dealt: list[str] = []
    turn = 0
    while len(dealt) < test + validation:
        kind = kinds[turn % len(kinds)]
        if len(kind) > 1:  # one of each kind stays for training
            dealt.append(kind.pop())
        turn += 1

    def templates(names: Sequence[str]) -> list[str]:
        return sorted(template for name in names for template in groups[name])

    return {
        "train": templates([name for kind in kinds for name in kind]),
        "validation": templates(dealt[test:]),
        "test": templates(dealt[:test]),
    }


def draw_template(groups: Sequence[Sequence[str]], rng: random.Random) -> str:
    """A template at random, each kind equally often (there are far more programs of 3 hops than of 1)."""
    return rng.choice(rng.choice(groups))
