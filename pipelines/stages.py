"""The stages of all pipelines: which function and which configuration class each one is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """`run` and `config` are `module:name`; `title` is what a person reads."""

    title: str
    run: str
    config: str

    @property
    def modules(self) -> list[str]:
        return [self.run.split(":")[0], self.config.split(":")[0], "components.runtime.stage"]


# In the order of the DAGs; `rejected` takes the place of `promotion` and `serving` when the gate says so.
STAGES: dict[str, Stage] = {
    "origin": Stage("Origin", "components.evaluation.origin:run", "components.evaluation.origin:OriginConfig"),
    "synthesis": Stage("Synthesis", "components.synthesis.run:run", "components.synthesis.config:SynthesisConfig"),
    "pretraining": Stage(
        "Pre-training", "components.pretraining.run:run", "components.pretraining.config:PretrainingConfig"
    ),
    "post_training": Stage(
        "Post-training (RL)", "components.post_training.run:run", "components.post_training.config:PostTrainingConfig"
    ),
    "evaluation": Stage("Evaluation", "components.evaluation.run:run", "components.evaluation.config:EvaluationConfig"),
    "champion": Stage(
        "Against the champion", "components.evaluation.champion:run", "components.evaluation.config:ChampionConfig"
    ),
    "gate": Stage("Gate", "components.evaluation.gate:run", "components.evaluation.gate:GateConfig"),
    "promotion": Stage(
        "Promotion", "components.evaluation.promotion:run", "components.evaluation.promotion:PromotionConfig"
    ),
    "rejected": Stage(
        "Rejected", "components.evaluation.rejected:run", "components.evaluation.rejected:RejectedConfig"
    ),
    "serving": Stage("Serving check", "components.serving.check:run", "components.serving.config:ServingConfig"),
}
