"""Configuration of the pre-training stage."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class PhaseConfig(BaseModel):
    """One phase. Rates are per optimiser step; a step sees about `demonstration_tokens` + `document_tokens` tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(ge=0, description="optimiser steps")
    demonstration_tokens: int = Field(2000, ge=1, description="tokens of demonstrations per step")
    document_tokens: int = Field(2000, ge=0, description="tokens of documents per step")
    curriculum: float = Field(
        0.0, ge=0, le=1, description="share of the phase over which documents grow from the shortest to all lengths"
    )
    learning_rate: float = Field(gt=0, description="peak learning rate of AdamW: embedding, head, routers, vectors")
    matrix_learning_rate: float = Field(3e-3, gt=0, description="peak learning rate of Muon: the network's matrices")
    indexer_learning_rate: float = Field(1e-3, gt=0, description="learning rate of the lightning indexer")
    warmup_steps: int = Field(20, ge=0, description="steps of linear warm-up of the learning rate")
    final_share: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak (cosine)")


class PretrainingConfig(BaseModel):
    """Dense base (only without a base checkpoint), indexer warm-up (Eq. 3), sparse training (Eq. 4)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field("nano", description="preset in model/presets, used where no base checkpoint is given")
    dense: PhaseConfig = PhaseConfig(
        steps=900, learning_rate=3e-3, demonstration_tokens=2000, document_tokens=2000, curriculum=0.6
    )
    warmup: PhaseConfig = PhaseConfig(steps=80, learning_rate=5e-3)
    sparse: PhaseConfig = PhaseConfig(
        steps=100, learning_rate=5e-4, matrix_learning_rate=2e-3, demonstration_tokens=1600, document_tokens=1600
    )
    filler_weight: float = Field(
        0.1, ge=0, le=1, description="weight of a document's other words in the loss; words of answers have weight 1"
    )
    weight_decay: float = Field(0.05, ge=0, description="AdamW weight decay of matrices")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    router_bias_speed: float = Field(1e-3, ge=0, description="step of the router bias that balances expert load")
    validation_every: int = Field(100, ge=1, description="steps between validations")
    state_seconds: float = Field(20.0, ge=0, description="seconds between two saves of the training state")
    processes: int = Field(
        1, ge=1, le=64, description="data-parallel processes on this machine, each with its share of every batch"
    )
    threads: int = Field(0, ge=0, description="CPU threads of each process; 0 = its share of the cores")
