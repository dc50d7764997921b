"""Configuration of the evaluation stage."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator


class EvaluationConfig(BaseModel):
    """How much is played and read. The tasks, documents and their seeds are the same for every model."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    pairs: int = Field(default=500, ge=2, description="held-out tasks per family, played by both models")
    separate: list[str] = Field(
        default=["compiled"], description="families reported beside the macro mean and not in it: unseen environments"
    )
    curve_tasks: int = Field(default=40, ge=0, description="tasks per family behind pass@k against k; 0: no curve")
    curve_samples: int = Field(default=16, ge=2, description="episodes of each of them")
    validation_tasks: int = Field(
        default=120, ge=1, description="validation tasks per family that choose the temperature before RL"
    )
    temperatures: list[float] = Field(
        default=[0.3, 0.5, 0.7, 1.0], min_length=1, description="sampling temperatures to choose from"
    )
    long_tasks: int = Field(default=48, ge=0, description="tasks beyond the training length, per family; 0: none")
    documents: int = Field(default=200, ge=2, description="held-out documents")
    validation_documents: int = Field(default=50, ge=1, description="documents that choose the indexer's layer")
    document_batch: int = Field(default=8, ge=1, description="documents in one forward")
    logprob_trajectories: int = Field(
        default=64, ge=1, description="trajectories whose log-probabilities a full forward recomputes"
    )
    max_sequences: int = Field(default=256, ge=1, description="episodes that the engine plays at once")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="of every interval")
    resamples: int = Field(default=10_000, ge=100, description="bootstrap resamples")
    processes: int = Field(default=1, ge=1, le=64, description="plays that run side by side, in processes of their own")
    threads: int = Field(default=0, ge=0, description="CPU threads of each process; 0 = its share of the cores")

    @field_validator("temperatures")
    @classmethod
    def _positive(cls, values: list[float]) -> list[float]:
        if any(value <= 0 for value in values):
            raise ValueError("temperatures to choose from are above 0; greedy is played anyway")
        return values


class ChampionConfig(BaseModel):
    """How the champion is played; what is played follows from the candidate's records."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    max_sequences: int = Field(default=256, ge=1, description="episodes that the engine plays at once")
    threads: int = Field(default=0, ge=0, description="CPU threads of torch; 0 = all cores of the process")
