"""Profiles: one YAML file that says how large a run is. Everything is validated before anything starts."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.runtime.errors import InputError
from components.runtime.stage import parse_config, read_yaml
from pipelines.stages import STAGES

FOLDER = Path(__file__).resolve().parent


class Profile(BaseModel):
    """What a profile file holds. Keys that are left out have the defaults of the stage's configuration class."""

    model_config = ConfigDict(extra="forbid")

    description: str = Field(description="one sentence: what the profile is for, and how long it takes where")
    model: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="name of the registered model")
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict, description="configuration by stage")
    cluster: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="resources on a cluster: `default`, and by stage (`pipelines.cluster`)"
    )


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Profile:
    """The profile `name`, or the file `name` when it ends in .yaml.

    Raises InputError for an unknown name, an unknown key or a wrong type.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    elif name in names():
        path = FOLDER / f"{name}.yaml"
    else:
        raise InputError(f"unknown profile {name!r}; there are {', '.join(names())}, or give a .yaml file")
    try:
        profile = Profile.model_validate(read_yaml(path))
    except ValidationError as error:
        problems = "\n".join(f"  {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise InputError(f"the profile {path} is wrong:\n{problems}") from error
    unknown = set(profile.stages) - set(STAGES)
    if unknown:
        raise InputError(f"{path}: unknown stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    return profile


def rehearsal(profile: Profile) -> Profile:
    """The smallest run of the same tasks: micro's stages, this profile's environments and resources on a cluster.

    Its registered model is one of its own, so that it never touches the real one.
    """
    small = load("micro")
    stages = {name: dict(values) for name, values in small.stages.items()}
    environments = profile.stages.get("synthesis", {}).get("environments")
    if environments:
        stages["synthesis"]["environments"] = environments
    stages["gate"] = {"gain": -1.0, "family_margin": 1.0}  # so that promotion and serving are rehearsed too
    return Profile(
        description=f"rehearsal of: {profile.description}",
        model=f"{profile.model}-rehearsal",
        stages=stages,
        cluster=profile.cluster,
    )


def override(profile: Profile, settings: Sequence[str]) -> Profile:
    """The profile with `STAGE.KEY[.KEY...]=VALUE` settings applied; values are YAML. Raises InputError on bad ones."""
    stages: dict[str, dict[str, Any]] = {name: dict(values) for name, values in profile.stages.items()}
    for setting in settings:
        name, equals, text = setting.partition("=")
        stage, *keys = name.split(".")
        if not equals or not keys:
            raise InputError(f"--set {setting!r}: write STAGE.KEY=VALUE, e.g. --set synthesis.train_tasks=100")
        if stage not in STAGES:
            raise InputError(f"--set {setting!r}: unknown stage {stage!r}; there are {', '.join(STAGES)}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"--set {setting!r}: {text!r} is no YAML value") from error
        target = stages.setdefault(stage, {})
        for key in keys[:-1]:
            inner = target.get(key)
            target[key] = dict(inner) if isinstance(inner, dict) else {}
            target = target[key]
        target[keys[-1]] = value
    return profile.model_copy(update={"stages": stages})


def resolve(profile: Profile) -> dict[str, dict[str, Any]]:
    """The complete configuration of every stage, defaults filled in, as plain JSON values.

    Raises InputError that names the stage and every wrong key or value.
    """
    resolved: dict[str, dict[str, Any]] = {}
    for name, stage in STAGES.items():
        module, class_name = stage.config.split(":")
        config_class = getattr(importlib.import_module(module), class_name)
        values: Mapping[str, Any] = profile.stages.get(name, {})
        parsed = parse_config(config_class, values, f"the configuration of {name}")
        resolved[name] = parsed.model_dump(mode="json")
    return resolved
