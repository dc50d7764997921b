"""Configuration of the serving check."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ServingConfig(BaseModel):
    """What the check serves and plays."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    source: Literal["champion", "checkpoint"] = Field(
        default="champion", description="serve models:/NAME@champion, or the checkpoint that is given, by its folder"
    )
    episodes: int = Field(default=4, ge=1, description="held-out tasks played without streaming, and as many with")
    max_turn_tokens: int = Field(default=64, ge=1, description="tokens of one answer")
    start_seconds: float = Field(default=120.0, gt=0, description="time that the server may take to start, seconds")
