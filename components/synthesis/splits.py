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


def split_templates(family: Family, seed: int, validation: int, test: int) -> dict[Split, list[str]]:
    """A seeded split of all templates: `test` and `validation` many, the rest for training.

    Held-out templates are dealt in turn from each kind (operator and hops), so that every kind is among them when there
    are at least as many as kinds. Raises InputError when no template would be left for training.
    """
    templates = family.templates()
    groups = kinds_of_template(family, templates)
    rng = random.Random(f"synthesis/{family.name}/split/{seed}")
    for group in groups:
        rng.shuffle(group)
    if validation + test + len(groups) > len(templates):
        raise InputError(
            f"synthesis: {test} test and {validation} validation templates leave too few of the {len(templates)} "
            f"templates of {family.name} for training; lower test_templates or validation_templates"
        )
    dealt: list[str] = []
    turn = 0
    while len(dealt) < test + validation:
        group = groups[turn % len(groups)]
        if len(group) > 1:  # one of each kind stays for training
            dealt.append(group.pop())
        turn += 1
    held_out = {"test": sorted(dealt[:test]), "validation": sorted(dealt[test:])}
    train = sorted(template for group in groups for template in group)
    return {"train": train, "validation": held_out["validation"], "test": held_out["test"]}


def draw_template(groups: Sequence[Sequence[str]], rng: random.Random) -> str:
    """A template at random, each kind equally often (there are far more programs of 3 hops than of 1)."""
    return rng.choice(rng.choice(groups))
