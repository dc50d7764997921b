"""The compiled pipeline: what is in it, and what its caches depend on."""

import json

import pytest
import yaml

from pipelines import catalogue, profiles
from pipelines.code_digest import code_digest
from pipelines.stages import STAGES

TRAINING = catalogue.PIPELINES["training"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    TRAINING.compile(profiles.resolve(profiles.load("micro")), path)
    return yaml.safe_load(path.read_text())


def tasks_of(compiled):
    """Every task by name, those of the conditions among them."""
    found = dict(compiled["root"]["dag"]["tasks"])
    for component in compiled["components"].values():
        found.update(component.get("dag", {}).get("tasks", {}))
    return found


def constant(task, name):
    return task["inputs"]["parameters"][name]["runtimeValue"]["constant"]


def test_every_stage_is_a_task_and_nothing_else_is(compiled):
    leaves = {name for name, task in tasks_of(compiled).items() if not name.startswith(("rejected-", "accepted-"))}
    conditions = {name for name in leaves if "triggerPolicy" in tasks_of(compiled)[name]}
    assert {name.replace("-", "_") for name in leaves - conditions} >= set(TRAINING.stages) - {"rejected"}
    executors = compiled["deploymentSpec"]["executors"]
    assert {name.removeprefix("exec-").replace("-", "_") for name in executors} == set(TRAINING.stages)


def test_the_parameters_are_few_and_read_alone(compiled):
    parameters = compiled["root"]["inputDefinitions"]["parameters"]
    assert sorted(parameters) == ["base_checkpoint", "champion", "champion_version", "seed"]
    for name in parameters:
        assert f"`{name}`" in compiled["pipelineInfo"]["description"]


def test_a_task_carries_its_configuration_and_the_digest_of_its_sources(compiled):
    resolved = profiles.resolve(profiles.load("micro"))
    for name, task in tasks_of(compiled).items():
        stage = name.replace("-", "_")
        if stage in STAGES and "config" in task.get("inputs", {}).get("parameters", {}):
            assert json.loads(constant(task, "config")) == resolved[stage]
            assert constant(task, "code") == code_digest(STAGES[stage].modules)


def test_what_acts_is_not_cached_and_what_computes_is(compiled):
    for name, task in tasks_of(compiled).items():
        stage = name.replace("-", "_")
        if stage in STAGES and "config" in task.get("inputs", {}).get("parameters", {}):
            cached = task.get("cachingOptions", {}).get("enableCache", False)
            assert cached == (stage not in ("promotion", "rejected")), name


def test_gate_and_comparison_depend_on_the_champion_and_evaluation_does_not(compiled):
    tasks = tasks_of(compiled)
    for name in ("champion", "gate"):
        parameters = tasks[name]["inputs"]["parameters"]
        assert parameters["champion"]["componentInputParameter"] == "champion"
        assert parameters["champion_version"]["componentInputParameter"] == "champion_version"
    for name in ("synthesis", "pretraining", "post-training", "evaluation"):
        assert "champion" not in json.dumps(tasks[name])


def test_data_flows_as_the_picture_says(compiled):
    tasks = tasks_of(compiled)

    def producer(task, artifact):
        return tasks[task]["inputs"]["artifacts"][artifact]["taskOutputArtifact"]["producerTask"]

    assert producer("pretraining", "tasks") == "synthesis"
    assert producer("post-training", "pretrained") == "pretraining"
    assert (producer("evaluation", "before"), producer("evaluation", "after")) == ("pretraining", "post-training")
    assert producer("champion", "evaluated") == "evaluation"
    assert producer("gate", "evaluation") == "champion"
    assert tasks["serving"]["dependentTasks"] == ["promotion"]


def test_stages_and_components_agree_on_where_the_code_is(compiled):
    executors = compiled["deploymentSpec"]["executors"]
    for name in TRAINING.stages:
        stage = STAGES[name]
        source = json.dumps(executors[f"exec-{name.replace('_', '-')}"])
        camel = "".join(part.capitalize() for part in name.split("_"))
        by_name = (f"components.{name}.run:run", f"components.{name}.config:{camel}Config")
        if (stage.run, stage.config) != by_name:
            assert stage.run in source
            assert stage.config in source


def test_compiling_twice_gives_the_same_file(compiled, tmp_path):
    again = TRAINING.compile(profiles.resolve(profiles.load("micro")), tmp_path / "again.yaml")
    assert yaml.safe_load(again.read_text()) == compiled
