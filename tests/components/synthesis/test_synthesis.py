"""The stage from its configuration to the published task set, and what reads it."""

import json
import random
from collections import Counter

import pytest
from pydantic import ValidationError

from components.environments.kg_query import KnowledgeGraphQuery
from components.runtime import task_set
from components.runtime.errors import InputError
from components.runtime.object_store import open_store
from components.runtime.progress import Progress
from components.runtime.stage import StageContext
from components.runtime.tracking import Tracker
from components.synthesis.battery import Battery, content_identity, replay
from components.synthesis.config import SynthesisConfig
from components.synthesis.demonstrations import make_demonstrations
from components.synthesis.run import run
from components.synthesis.splits import split_templates
from components.synthesis.tasks import make_tasks

FAMILY = KnowledgeGraphQuery()
SMALL = SynthesisConfig(
    train_tasks=40,
    validation_tasks=12,
    test_tasks=54,
    long_tasks=3,
    demonstrations=61,
    validation_demonstrations=10,
    documents=5,
    validation_documents=3,
    test_documents=4,
)


def synthesise(directory, seed=0, config=SMALL):
    directory.mkdir(parents=True, exist_ok=True)
    store = open_store(str(directory / "store"))
    (directory / "work").mkdir(exist_ok=True)
    context = StageContext("synthesis", "test", seed, directory / "work", store, Tracker(), Progress())
    result = run(config, context, {})
    return result, context.fetch(result.outputs["tasks"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return synthesise(tmp_path_factory.mktemp("synthesis"))


def all_tasks(folder):
    return [task for split in task_set.SPLITS for task in task_set.read_tasks(folder, split)]


def test_sizes_are_what_was_asked_for(made):
    result, folder = made
    sizes = [len(task_set.read_tasks(folder, split)) for split in task_set.SPLITS]
    assert sizes == [40, 12, 54]
    assert len(task_set.read_long_tasks(folder)) == 3
    assert [len(task_set.read_demonstrations(folder, split)) for split in ("train", "validation")] == [61, 10]
    assert [len(task_set.read_documents(folder, split)) for split in task_set.SPLITS] == [5, 3, 4]
    assert result.summary["train_tasks"] == 40
    assert result.summary["test_templates"] == 27
    assert result.summary["mutants_failed_share"] >= 0.9


def test_records_are_sound_and_solvable(made):
    _, folder = made
    tasks = all_tasks(folder) + task_set.read_long_tasks(folder)
    assert len({task.id for task in tasks}) == len({content_identity(task) for task in tasks}) == len(tasks)
    for task in tasks:
        assert task.id == task.identity()
        assert replay(FAMILY, task, task.solution).passed


def test_templates_are_held_out(made):
    _, folder = made
    templates = {split: {task.template for task in task_set.read_tasks(folder, split)} for split in task_set.SPLITS}
    templates["long"] = {task.template for task in task_set.read_long_tasks(folder)}
    for split in ("train", "validation"):
        played = {demonstration.template for demonstration in task_set.read_demonstrations(folder, split)}
        for other in set(templates) - {split}:
            assert not played & templates[other]
            assert not templates[split] & templates[other]
    assert not templates["test"] & templates["long"]
    assert len(templates["test"]) == 27
    assert len({task.template for task in all_tasks(folder) if task.split == "test"}) >= 24


def test_test_tasks_are_spread_evenly(made):
    _, folder = made
    per_template = Counter(task.template for task in task_set.read_tasks(folder, "test"))
    assert set(per_template.values()) == {2}
    kinds = Counter(
        (task.difficulty["operator"], task.difficulty["hops"]) for task in task_set.read_tasks(folder, "test")
    )
    assert set(kinds) == {(operator, hops) for operator in ("name", "count", "list") for hops in (1, 2, 3)}
    assert set(kinds.values()) == {6}


def test_at_most_half_of_the_demonstrations_are_wrong(made):
    _, folder = made
    played = task_set.read_demonstrations(folder, "train")
    assert 0.4 * 61 < sum(not demonstration.passed for demonstration in played) <= 0.5 * 61
    assert all(demonstration.passed == (demonstration.kind == "careful") for demonstration in played)
    assert {demonstration.kind for demonstration in played} > {"careful", "stops_early", "guesses", "wrong_relation"}


NO_SHORTCUT = [template for template in FAMILY.templates() if not template.endswith("/count")]


@pytest.mark.parametrize("share, expected", [(0.0, 0), (0.25, 5), (0.5, 10)])
def test_wrong_share(share, expected):
    played = make_demonstrations(FAMILY, NO_SHORTCUT, 20, share, 0.0, "train", seed=4)
    assert sum(not demonstration.passed for demonstration in played) == expected


def test_the_shortcut_is_the_majority_where_there_is_one():
    """A third of the templates count; there most demonstrations read the first page only, on tasks with more pages."""
    played = make_demonstrations(FAMILY, FAMILY.templates(), 300, 0.4, 0.6, "train", seed=4)
    counting = [demonstration for demonstration in played if demonstration.template.endswith("/count")]
    others = [demonstration for demonstration in played if not demonstration.template.endswith("/count")]
    assert 70 < len(counting) < 130
    shortcuts = [demonstration for demonstration in counting if demonstration.kind == "first_page_only"]
    assert abs(len(shortcuts) - 0.6 * len(counting)) <= 1
    assert {demonstration.kind for demonstration in counting} == {"first_page_only", "careful"}
    assert abs(sum(not demonstration.passed for demonstration in others) - 0.4 * len(others)) <= 1


class Environments(KnowledgeGraphQuery):
    """The same programs, as if those that begin with one relation were one environment."""

    def describe(self, template):
        return {**super().describe(template), "group": template.split("/")[0]}


def test_environments_are_held_out_whole():
    splits = split_templates(Environments(), 0, 3, 5)
    owners = {split: {template.split("/")[0] for template in templates} for split, templates in splits.items()}
    assert len(owners["validation"]) == 3
    assert len(owners["test"]) == 5
    assert not owners["train"] & owners["test"]
    assert not owners["train"] & owners["validation"]
    assert not owners["validation"] & owners["test"]
    assert sorted(template for part in splits.values() for template in part) == sorted(FAMILY.templates())


class Lucky(KnowledgeGraphQuery):
    """Every second wrong demonstration is right by luck."""

    plays = 0

    def play(self, task, kind, rng):
        if kind == "careful":
            return super().play(task, kind, rng)
        self.plays += 1
        played = super().play(task, "careful" if self.plays % 2 else "guesses", rng)
        return played.model_copy(update={"kind": kind})


def test_wrong_teachers_that_pass_by_luck_are_drawn_again():
    family = Lucky()
    played = make_demonstrations(family, NO_SHORTCUT, 20, 0.5, 0.0, "train", seed=4)
    assert family.plays == 20
    assert all(demonstration.passed == (demonstration.kind == "careful") for demonstration in played)
    assert sum(not demonstration.passed for demonstration in played) == 10


def test_a_careful_teacher_that_fails_is_a_fault():
    class Broken(KnowledgeGraphQuery):
        def play(self, task, kind, rng):
            return super().play(task, kind, rng).model_copy(update={"passed": False})

    with pytest.raises(RuntimeError, match="careful teacher fails on template"):
        make_demonstrations(Broken(), FAMILY.templates(), 4, 0.5, 0.0, "train", seed=0)


def test_removed_tasks_are_replaced_until_there_are_no_more():
    """One program of one hop has 10 x 9 facts in 3 wordings: 150 draws repeat some, 150 + 121 tasks cannot exist."""
    battery = Battery(FAMILY, {}, mutants=4, random_plays=1)
    tasks = make_tasks(FAMILY, ["replaces/name"], 150, "validation", 0, battery)
    assert len({content_identity(task) for task in tasks}) == len(tasks) == 150
    assert battery.removed["duplicate"] > 10
    with pytest.raises(InputError, match=r"of 121 test tasks of kg_query passed the battery .*'duplicate': \d+"):
        make_tasks(FAMILY, ["replaces/name"], 121, "test", 0, battery)


def test_demonstrations_are_not_on_the_tasks_of_rl(made):
    _, folder = made
    assert not {task.id for task in all_tasks(folder)} & {d.task for d in task_set.read_demonstrations(folder, "train")}


def test_every_word_is_in_the_vocabulary(made):
    _, folder = made
    words = task_set.read_vocabulary(folder)
    assert words == sorted(set(words)) == FAMILY.vocabulary()
    for split in task_set.SPLITS:
        for document in task_set.read_documents(folder, split):
            assert set(document.words) <= set(words)


def test_battery_report(made):
    result, folder = made
    report = task_set.read_battery(folder)["kg_query"]
    assert report["kept"] == 40 + 12 + 54 + 3
    assert report["checked"] == report["kept"] + sum(report["removed"].values())
    assert report["templates_in_two_splits"] == []
    assert result.summary["battery_removed"] == report["removed"]


def test_same_seed_same_bytes_and_another_seed_other_tasks(made, tmp_path):
    result, folder = made
    again, folder_again = synthesise(tmp_path / "again", config=SMALL.model_copy(update={"workers": 1}))
    for file in folder.iterdir():
        if file.name != "manifest.json":
            assert (folder_again / file.name).read_bytes() == file.read_bytes()
    assert again.summary == result.summary
    other, folder_other = synthesise(tmp_path / "other", seed=1)
    assert not {task.id for task in all_tasks(folder)} & {task.id for task in all_tasks(folder_other)}
    assert other.summary["train_tasks"] == 40


def test_split_depends_on_the_seed_and_keeps_every_kind_for_training():
    first, second = split_templates(FAMILY, 0, 12, 27), split_templates(FAMILY, 1, 12, 27)
    assert first == split_templates(FAMILY, 0, 12, 27)
    assert first["test"] != second["test"]
    for splits in (first, second, split_templates(FAMILY, 0, 100, 200)):
        assert sorted(splits["train"] + splits["validation"] + splits["test"]) == sorted(FAMILY.templates())
        kinds = {(t.count("/"), t.rsplit("/", 1)[1]) for t in splits["train"]}
        assert len(kinds) == 9


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"environments": ["no_such_family"]}, "no_such_family.*kg_query"),
        ({"test_templates": 400}, "leave too few of the 408"),
        ({"document_words": 120}, "172 to 768 words"),
    ],
)
def test_what_cannot_be_made_is_bad_input(tmp_path, changes, complaint):
    config = SMALL.model_copy(update={"train_tasks": 2, "demonstrations": 2, **changes})
    with pytest.raises(InputError, match=complaint):
        synthesise(tmp_path, config=config)
    assert not list((tmp_path / "store").rglob("manifest.json"))


# one worker, so that what a test puts in place of a part is seen
TINY = SMALL.model_copy(update={"train_tasks": 4, "demonstrations": 4, "test_tasks": 4, "long_tasks": 0, "workers": 1})


def test_a_template_in_two_splits_is_a_fault(tmp_path, monkeypatch):
    shared = {"train": ["works_in/name", "uses/list"], "validation": ["based_in/name"], "test": ["works_in/name"]}
    monkeypatch.setattr("components.synthesis.parts.split_templates", lambda *arguments: shared)
    with pytest.raises(RuntimeError, match=r"share templates: \['works_in/name'\]"):
        synthesise(tmp_path, config=TINY)


def test_a_word_that_the_vocabulary_lacks_is_a_fault(tmp_path, monkeypatch):
    class Forgetful(KnowledgeGraphQuery):
        def vocabulary(self):
            return [word for word in super().vocabulary() if word not in ("more", "twinned_with")]

    monkeypatch.setattr("components.synthesis.family.environment", lambda name: Forgetful())
    with pytest.raises(RuntimeError, match=r"outside the environments' vocabulary\(\): more twinned_with"):
        synthesise(tmp_path, config=TINY.model_copy(update={"demonstrations": 60}))


@pytest.mark.parametrize("changes", [{"wrong_share": 0.6}, {"train_tasks": 0}, {"colour": "red"}, {"environments": []}])
def test_wrong_configuration(changes):
    with pytest.raises(ValidationError):
        SynthesisConfig(**changes)


def test_damaged_task_sets_are_refused_by_name(made, tmp_path):
    _, folder = made
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="unknown split"):
        task_set.read_tasks(tmp_path, "dev")
    with pytest.raises(InputError, match=r"demonstrations.parquet has no record in the split test"):
        task_set.read_demonstrations(tmp_path, "test")
    content = (tmp_path / task_set.TASKS).read_bytes()
    (tmp_path / task_set.TASKS).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"tasks.parquet is damaged"):
        task_set.read_tasks(tmp_path, "train")
    (tmp_path / task_set.TASKS).write_bytes((folder / task_set.DOCUMENTS).read_bytes())
    with pytest.raises(InputError, match=r"holds a record that is no TaskRecord"):
        task_set.read_tasks(tmp_path, "train")
    (tmp_path / task_set.DOCUMENTS).unlink()
    with pytest.raises(InputError, match=r"documents.parquet does not exist"):
        task_set.read_documents(tmp_path, "train")
    (tmp_path / task_set.VOCABULARY).write_text(json.dumps({"a": 1}))
    with pytest.raises(InputError, match=r"no(t)? a? ?list of words"):
        task_set.read_vocabulary(tmp_path)
    (tmp_path / task_set.VOCABULARY).write_text("[")
    with pytest.raises(InputError, match=r"vocabulary.json is damaged"):
        task_set.read_vocabulary(tmp_path)


def test_wrong_kinds_stay_wrong_on_the_tasks_that_were_kept(made):
    _, folder = made
    for task in task_set.read_tasks(folder, "validation"):
        for kind in set(FAMILY.wrong_kinds(task)) - {"guesses"}:
            assert not FAMILY.play(task, kind, random.Random(0)).passed
