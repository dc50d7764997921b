"""Environments: the protocol, the families as plug-ins (entry points `sparseline.environments`), the chat format."""
