"""Planning by nested conditional rules: look up what the rules need, take the branch, submit the plan."""

from components.environments.trip_planning.environment import TripPlanning

__all__ = ["TripPlanning"]
