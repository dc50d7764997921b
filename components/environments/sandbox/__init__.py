"""Where model-written code runs, and nowhere else: namespaces, a system call filter, limits, nothing that lasts."""

from components.environments.sandbox.box import Sandbox, SandboxLimits, SandboxResult, refusal

__all__ = ["Sandbox", "SandboxLimits", "SandboxResult", "refusal"]
