"""The one generator that RL rollouts, evaluation and serving share: paged cache, continuous batching, sampling."""

from model.engine.engine import Engine, EngineFull, Turn
from model.engine.sampling import LogitMask, SamplingParameters
from model.engine.trajectory import Trajectory

__all__ = ["Engine", "EngineFull", "LogitMask", "SamplingParameters", "Trajectory", "Turn"]
