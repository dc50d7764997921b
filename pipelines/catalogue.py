"""The pipelines by name. Cheap to import: a pipeline's own module, and KFP with it, is imported when it is compiled."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components.runtime.errors import InputError
from pipelines.code_digest import ROOT, code_digest
from pipelines.stages import STAGES

PREFIX = "sparseline-"
JUDGED = ("evaluation", "champion", "gate", "promotion", "rejected", "serving")


@dataclass(frozen=True)
class Pipeline:
    """`build` is `module:function`; `stages` in the order of the DAG; `ends` have to be done when a run is."""

    name: str
    title: str
    build: str
    stages: tuple[str, ...]
    ends: tuple[str, ...]

    def function(
        self,
        configurations: dict[str, dict[str, Any]],
        baked: dict[str, dict[str, str]] | None = None,
        prepare: Callable[[str, Any], None] = lambda stage, task: None,
    ) -> Any:
        """The KFP pipeline for these resolved configurations (`profiles.resolve`).

        `baked`: the constants of the tasks, where they are not those of `constants`. `prepare(stage, task)` is called
        for every task, to give it what it needs on a cluster.
        """
        module, name = self.build.split(":")
        build = getattr(importlib.import_module(module), name)
        return build(baked or constants(configurations, self.stages), prepare)

    def compile(self, configurations: dict[str, dict[str, Any]], path: Path) -> Path:
        """Write the pipeline as KFP v2 YAML to `path`."""
        from kfp import compiler

        path.parent.mkdir(parents=True, exist_ok=True)
        compiler.Compiler().compile(self.function(configurations), str(path))
        return path


PIPELINES = {
    one.name: one
    for one in (
        Pipeline(
            "training",
            "training",
            "pipelines.training:training_pipeline",
            ("synthesis", "pretraining", "post_training", *JUDGED),
            ("gate", "promotion", "serving"),
        ),
        Pipeline(
            "retraining",
            "retraining of the champion",
            "pipelines.retraining:retraining_pipeline",
            ("origin", "synthesis", "post_training", *JUDGED),
            ("gate", "promotion", "serving"),
        ),
        Pipeline(
            "evaluation",
            "evaluation on fresh tasks",
            "pipelines.evaluation:evaluation_pipeline",
            ("origin", "synthesis", "evaluation", "champion"),
            ("champion",),
        ),
        Pipeline("synthesis", "a task set", "pipelines.synthesis:synthesis_pipeline", ("synthesis",), ("synthesis",)),
    )
}


def constants(
    configurations: dict[str, dict[str, Any]], stages: tuple[str, ...], root: Path = ROOT
) -> dict[str, dict[str, str]]:
    """For each of the stages the two constants of its task: its configuration as JSON, the digest of its sources."""
    return {
        name: {
            "config": json.dumps(configurations[name], sort_keys=True),
            "code": code_digest(STAGES[name].modules, root),
        }
        for name in stages
    }


def named(name: str) -> Pipeline:
    """The pipeline of this name. Raises InputError that lists the known ones."""
    if name not in PIPELINES:
        raise InputError(f"unknown pipeline {name!r}; there are {', '.join(PIPELINES)}")
    return PIPELINES[name]


def of_file(path: Path) -> Pipeline:
    """The pipeline that a compiled file is one of, by the name in it. Raises InputError when it is none of ours."""
    if not path.is_file():
        raise InputError(
            f"the compiled pipeline {path} does not exist; write it with `sparseline compile`, "
            f"or name one of {', '.join(PIPELINES)}"
        )
    try:
        document: Any = next(iter(yaml.load_all(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))), None)
        told = str(document["pipelineInfo"]["name"])
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no compiled pipeline; write one with `sparseline compile`") from error
    kind = told.removeprefix(PREFIX).split("-")[0]
    if not told.startswith(PREFIX) or kind not in PIPELINES:
        raise InputError(f"{path} holds the pipeline {told!r}, which is none of {', '.join(PIPELINES)}")
    return PIPELINES[kind]
