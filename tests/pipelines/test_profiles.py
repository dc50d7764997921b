"""Profiles and overrides, good and bad."""

import pytest

from components.runtime.errors import InputError
from pipelines import profiles
from pipelines.stages import STAGES


@pytest.mark.parametrize("name", profiles.names())
def test_every_profile_resolves_to_complete_configurations(name):
    resolved = profiles.resolve(profiles.load(name))
    assert list(resolved) == list(STAGES)
    assert "kg_query" in resolved["synthesis"]["environments"]  # evaluation needs a family that makes documents


def test_a_value_of_the_profile_wins_over_the_default_and_an_override_over_both():
    profile = profiles.load("micro")
    assert profiles.resolve(profile)["pretraining"]["dense"]["steps"] != 77
    changed = profiles.override(profile, ["pretraining.dense.steps=77", "synthesis.wrong_share=0.25"])
    resolved = profiles.resolve(changed)
    assert resolved["pretraining"]["dense"]["steps"] == 77
    before = profiles.resolve(profile)
    before["pretraining"]["dense"]["steps"], before["synthesis"]["wrong_share"] = 77, 0.25
    assert resolved == before  # and nothing else changed
    assert resolved["synthesis"]["wrong_share"] == 0.25
    assert profiles.resolve(profiles.load("micro")) == profiles.resolve(profile)  # the original is as it was


@pytest.mark.parametrize(
    "setting, told",
    [
        ("pretraining.dense.steps", "write STAGE.KEY=VALUE"),
        ("steps=3", "write STAGE.KEY=VALUE"),
        ("training.steps=3", "unknown stage 'training'"),
        ("synthesis.train_tasks=[", "is no YAML value"),
    ],
)
def test_bad_overrides_are_told(setting, told):
    with pytest.raises(InputError, match=told):
        profiles.override(profiles.load("micro"), [setting])


@pytest.mark.parametrize(
    "setting, told",
    [
        ("synthesis.trian_tasks=3", "trian_tasks: Extra inputs are not permitted"),
        ("synthesis.train_tasks=many", "train_tasks: Input should be a valid integer"),
        ("synthesis.wrong_share=0.9", "wrong_share: Input should be less than or equal to 0.5"),
        ("pretraining.dense.steps=-1", "dense.steps: Input should be greater than or equal to 0"),
    ],
)
def test_bad_values_are_told_with_their_stage(setting, told):
    stage = setting.split(".")[0]
    with pytest.raises(InputError, match=f"the configuration of {stage} is wrong(.|\n)*{told}"):
        profiles.resolve(profiles.override(profiles.load("micro"), [setting]))


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(InputError, match="unknown profile 'giant'; there are distributed, micro, nano, speciale"):
        profiles.load("giant")


@pytest.mark.parametrize(
    "text, told",
    [
        ("model: m\ndescription: d\nstagez: {}", "stagez: Extra inputs"),
        ("model: m\ndescription: d\nstages: {training: {}}", "unknown stage training"),
        ("model: m\ndescription: d\nstages: [a]", "stages: Input should be a valid dictionary"),
        ("model: Not A Name\ndescription: d", "model: String should match pattern"),
        ("just words", "must hold a mapping"),
    ],
)
def test_a_bad_file_is_told(tmp_path, text, told):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=told):
        profiles.load(str(tmp_path / "mine.yaml"))
