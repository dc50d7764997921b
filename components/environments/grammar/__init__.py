"""The environment grammar: environments that are compiled from a seed instead of written by hand."""

from components.environments.grammar.environment import CompiledEnvironments

__all__ = ["CompiledEnvironments"]
