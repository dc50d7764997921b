"""What the bootstrap resamples as one is what synthesis held out as one."""

from components.environments.protocol import environment
from components.evaluation.play import group_of
from components.synthesis.family import load_family
from components.synthesis.splits import groups_of_templates, split_templates


def test_tasks_of_a_held_out_environment_are_one_group():
    family = load_family("compiled")
    held_out = split_templates(family, 0, 20, 40)["test"]
    tasks = [family.generate(template, 0, "test") for template in held_out]
    assert {group_of(task) for task in tasks} == set(groups_of_templates(family, held_out))
    assert len({group_of(task) for task in tasks}) == 40


def test_other_families_hold_out_templates():
    family = environment("kg_query")
    task = family.generate(family.templates()[3], 0, "test")
    assert group_of(task) == task.template
