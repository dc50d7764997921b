"""Configuration of the synthesis stage."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SynthesisConfig(BaseModel):
    """How much of what is generated. All randomness follows from the run's seed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    environments: list[str] = Field(
        default=["kg_query"], min_length=1, description="names of installed environment families"
    )
    train_tasks: int = Field(default=3000, ge=1, description="tasks for RL, per family")
    validation_tasks: int = Field(default=300, ge=1, description="tasks for choosing a checkpoint, per family")
    test_tasks: int = Field(default=600, ge=1, description="tasks of held-out templates, per family")
    long_tasks: int = Field(default=48, ge=0, description="held-out tasks beyond the training length, per family")
    split_seed: int | None = Field(
        default=None, ge=0, description="seed that deals the templates to the splits; none: the run's seed"
    )
    test_templates: int = Field(default=27, ge=1, description="templates held out for the test split, per family")
    validation_templates: int = Field(default=12, ge=1, description="templates of the validation split, per family")
    demonstrations: int = Field(default=12000, ge=1, description="demonstrations on train templates, per family")
    validation_demonstrations: int = Field(
        default=300, ge=1, description="demonstrations on validation templates, per family"
    )
    test_environments: int = Field(
        default=40, ge=1, description="environments held out whole for the test split, of families that have many"
    )
    validation_environments: int = Field(
        default=20, ge=1, description="environments held out whole for validation, of families that have many"
    )
    wrong_share: float = Field(
        default=0.4, ge=0, le=0.5, description="share of wrong demonstrations of templates without a shortcut"
    )
    shortcut_share: float = Field(
        default=0.6,
        ge=0,
        le=0.9,
        description="share of a shortcut's demonstrations among those of a template that has one (a third of them)",
    )
    documents: int = Field(default=3000, ge=1, description="documents for training, per family")
    validation_documents: int = Field(default=100, ge=1, description="long documents for validation, per family")
    test_documents: int = Field(default=200, ge=1, description="held-out long documents, per family")
    document_words: int = Field(
        default=272,
        ge=32,
        description="length of validation and test documents and of a part of the training ones, words",
    )
    short_document_words: list[int] = Field(
        default=[54, 108, 180],
        description="lengths of the other training documents, in equal parts, words: practice before the long ones",
    )
    mutants: int = Field(default=12, ge=1, description="mutated solutions that the battery plays per task")
    random_plays: int = Field(default=3, ge=1, description="plays of the random player per task")
    player_tasks: int = Field(
        default=100, ge=1, description="held-out tasks per family that the players without a model play for the report"
    )
    near_duplicate: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Jaccard similarity of word shingles from which two tasks of different splits are near-duplicates",
    )
    workers: int = Field(default=0, ge=0, description="processes that make families side by side; 0 = one per core")
