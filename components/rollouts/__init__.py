"""The agent loop, once: a policy that takes and gives tokens x an environment -> episodes with trajectories."""

from components.rollouts.loop import EpisodeRequest, EpisodeResult, run_episodes
from components.rollouts.policies import EnginePolicy, OpenAIPolicy, Policy

__all__ = ["EnginePolicy", "EpisodeRequest", "EpisodeResult", "OpenAIPolicy", "Policy", "run_episodes"]
