"""Software engineering: find the documented, not deprecated calls of a library, and run them in the sandbox."""

from components.environments.internal_api.environment import InternalApi

__all__ = ["InternalApi"]
