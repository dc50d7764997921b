"""Packed rows as padded runs: many short sequences become a few large batched operations.

A run is a stretch of consecutive rows with the same `key_start` (one packed sequence).
Legend: T rows, R runs of a group, Q padded rows of a run, L padded keys of a run.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Group:
    """Runs of similar size. `row_RQ`: row of each padded place (clamped); `valid_RQ`: whether the place is a row."""

    row_RQ: Tensor
    valid_RQ: Tensor
    key_start_R: Tensor
    keys: int


def groups(key_start_T: Tensor, key_end_T: Tensor) -> Iterator[Group]:
    """Yields groups of runs whose key count lies within a factor of two of each other (so padding at most doubles)."""
    tokens = key_start_T.shape[0]
    if tokens == 0:
        return
    device = key_start_T.device
    change = torch.nonzero(key_start_T[1:] != key_start_T[:-1])[:, 0] + 1
    first_R = torch.cat([change.new_zeros(1), change])
    rows_R = torch.diff(first_R, append=first_R.new_tensor([tokens]))
    run_T = torch.repeat_interleave(torch.arange(len(first_R), device=device), rows_R)
    start_R = key_start_T[first_R].long()
    end_R = torch.full_like(start_R, -1).scatter_reduce(0, run_T, key_end_T.long(), "amax")
    keys_R = (end_R - start_R).clamp(min=0)
    size_R = torch.maximum(keys_R, rows_R).clamp(min=1)
    bucket_R = torch.ceil(torch.log2(size_R.double())).long()
    for bucket in bucket_R.unique().tolist():
        chosen = torch.nonzero(bucket_R == bucket)[:, 0]
        offset_Q = torch.arange(int(rows_R[chosen].max()), device=device)
        valid_RQ = offset_Q < rows_R[chosen, None]
        row_RQ = (first_R[chosen, None] + offset_Q).clamp(max=tokens - 1)
        yield Group(row_RQ, valid_RQ, start_R[chosen], int(keys_R[chosen].max()))
