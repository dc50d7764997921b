"""evaluation.json: every estimate with its interval and n. The gate decides from this file alone.

All rates are shares of episodes (0 to 1), cross-entropies nats per token, recalls shares of evidence words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from components.runtime.contracts import Contract, Interval, Pointer

FILE = "evaluation.json"
ITEMS_FILE = "items.parquet"


class Rate(Contract):
    """Macro mean over families of pass@1, with its template-clustered interval."""

    macro: float
    low: float
    high: float
    n: int = Field(ge=1, description="episodes")


class FamilyRates(Contract):
    """One family: its own rates and their paired difference (after - before)."""

    before: Interval
    after: Interval
    difference: Interval
    before_wilson: Interval = Field(description="Wilson interval: as if the tasks were independent of each other")
    after_wilson: Interval
    p_value: float = Field(ge=0, le=1, description="of no difference; signs of whole templates flipped")
    p_adjusted: float = Field(ge=0, le=1, description="Holm over the families")


class UnseenEnvironments(Contract):
    """Families whose environments were held out whole: not in the macro mean. Whole environments are resampled."""

    before: Rate
    after: Rate
    difference: Interval = Field(description="after - before, paired")
    n: int = Field(ge=1, description="tasks")
    environments: int = Field(ge=1)


class CurvePoint(Contract):
    """pass@1 within a budget of `x` tokens, or pass@x."""

    x: int
    rate: Interval


class ComputeCurves(Contract):
    """What more test-time compute buys, each model at temperature 1; macro over the families of the main measure."""

    budget: dict[str, list[CurvePoint]] = Field(
        description="by player: share of episodes that passed with at most x tokens, prompt and replies included"
    )
    pass_at_k: dict[str, list[CurvePoint]] = Field(description="by player: unbiased pass@k on a subset of the tasks")
    tasks: int = Field(description="tasks behind pass@k")
    samples: int = Field(description="episodes of each of them")


class BestTemperature(Contract):
    """The model before RL at the sampling temperature that was best on the validation split."""

    temperature: float
    validation: dict[str, Interval] = Field(description="pass@1 on the validation split by temperature")
    test: Rate
    difference: Interval = Field(description="after at temperature 1 minus before at this temperature, paired")


class Champion(Contract):
    """The candidate against the champion, on the same tasks with the same seeds."""

    pointer: Pointer
    rate: Rate
    difference: Interval = Field(description="candidate - champion, paired, macro over families")
    smallest_difference: float = Field(ge=0, description="that the sample can see: 80% power, paired, clustered")
    families: dict[str, Interval] = Field(description="candidate - champion by family")


class PassAt1(Contract):
    before: Rate
    after: Rate
    difference: Interval = Field(description="after - before, same tasks, same seeds, templates resampled")
    smallest_difference: float = Field(ge=0, description="that the sample can see: 80% power, paired, clustered")
    families: dict[str, FamilyRates] = Field(description="every family, those that are reported separately too")
    unseen_environments: UnseenEnvironments | None = None
    before_best_temperature: BestTemperature


class Sides(Contract):
    """Both models on the same tasks."""

    before: Rate
    after: Rate
    difference: Interval = Field(description="after - before, paired")


class CrossEntropy(Contract):
    """Nats per token of the candidate on held-out documents, one number for each way to select top-k positions."""

    dense: float
    sparse: float
    window: float
    random: float
    gap: Interval = Field(description="sparse - dense; documents resampled; n is documents")
    window_gap: Interval
    random_gap: Interval
    tokens: int = Field(ge=1, description="predicted tokens in all")


class DepthBin(Contract):
    """Recall where the nearest evidence word lies `low` to `high` - 1 words before the predicting position."""

    low: int
    high: int
    all_words: float
    answer_word: float
    n: int = Field(ge=1, description="questions")


class IndexerRecall(Contract):
    """Share of the evidence that the indexer selects where the first answer token is predicted."""

    layer: int = Field(description="layer with the best recall of all evidence words on validation documents")
    all_words: Interval = Field(description="evidence at least 2 * top_k back; documents resampled; n is questions")
    answer_layer: int = Field(description="layer with the best recall of the answer's word on validation documents")
    answer_word: Interval = Field(description="the same for the evidence words that the answer repeats")
    by_layer: dict[str, list[float]] = Field(description="test recall by layer: all_words, answer_word")
    validation_by_layer: dict[str, list[float]]
    depth: list[DepthBin]


class EvaluationReport(Contract):
    format: Literal["sparseline-evaluation/2"] = "sparseline-evaluation/2"
    tasks: Pointer
    before: Pointer
    candidate: Pointer
    champion: Champion | None = Field(default=None, description="None: there was none, or the candidate is it")
    code: str = Field(default="", description="digest of the stage's sources, where a pipeline gave it")
    seed: int
    confidence: float = Field(gt=0, lt=1)
    resamples: int
    max_sequences: int = Field(ge=1, description="episodes that the engine played at once")
    separate: list[str] = Field(description="families that are not in the macro means")
    faults: list[str] = Field(description="task and reason of every faulty episode; it counts as failed")
    templates: int = Field(ge=2, description="held-out programs in the main measure")
    top_k: int
    document_words: int = Field(description="length of the longest held-out document, in words")
    pass_at_1: PassAt1
    compute: ComputeCurves | None = None
    pass_at_1_long: Sides | None = Field(default=None, description="sampled, on tasks longer than training's")
    greedy: Sides
    ce: CrossEntropy
    ce_answers: CrossEntropy
    indexer_recall: IndexerRecall
    logprob_gap: float = Field(description="largest |log-probability of the engine - of a full forward|, nats")

    def write(self, directory: Path) -> None:
        """Write evaluation.json into `directory`. Raises ValueError when a number is not finite."""
        refuse_non_finite(self.model_dump(), "evaluation")
        (directory / FILE).write_text(self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def read(directory: Path) -> EvaluationReport:
        """The report in `directory`. Raises ValueError when a number is missing, null or not finite."""
        report = EvaluationReport.model_validate_json((directory / FILE).read_bytes())
        refuse_non_finite(report.model_dump(), "evaluation")
        return report


def refuse_non_finite(value: object, where: str) -> None:
    """Raise ValueError that names the first NaN or infinity inside `value`."""
    if isinstance(value, float) and value - value != 0.0:
        raise ValueError(f"{where} is {value}; every estimate of an evaluation is a number")
    if isinstance(value, dict):
        for key, inner in value.items():
            refuse_non_finite(inner, f"{where}.{key}")
    if isinstance(value, (list, tuple)):
        for position, inner in enumerate(value):
            refuse_non_finite(inner, f"{where}[{position}]")
