"""What the launchers of several kernels ask about the device."""

import functools

import torch


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 on a CPU, where Triton's interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """(9, 0) for Hopper; (0, 0) on a CPU, where Triton's interpreter runs."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
