"""Exact, deterministic top-k in plain PyTorch: the oracle, and what runs on a CPU.

Legend: T rows, S positions of a row, K slots kept.
"""

import torch
from torch import Tensor


def topk(scores_TS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `kernels.topk.topk`; any float dtype, any row length."""
    tokens, positions = scores_TS.shape
    slots = min(k, positions)
    indices_TK = torch.full((tokens, k), -1, dtype=torch.int32, device=scores_TS.device)
    if tokens == 0 or slots == 0:
        return indices_TK, torch.zeros(tokens, dtype=torch.int32, device=scores_TS.device)
    # torch.topk ranks NaN above everything; here neither NaN nor -inf is ever selected
    scores_TS = scores_TS.masked_fill(scores_TS.isnan(), float("-inf"))
    selectable_TS = scores_TS > float("-inf")
    if slots == positions:
        selected_TS = selectable_TS
    else:
        # torch.topk promises no order among ties, so only its k-th VALUE is used
        threshold_T1 = torch.topk(scores_TS, slots, dim=1).values[:, -1:]
        selected_TS = (scores_TS >= threshold_T1) & selectable_TS
        if bool((selected_TS.sum(1) > slots).any()):
            above_TS = scores_TS > threshold_T1
            tied_TS = selected_TS & ~above_TS
            room_T1 = slots - above_TS.sum(1, keepdim=True)
            selected_TS = above_TS | (tied_TS & (tied_TS.cumsum(1) <= room_T1))
    lengths_T = selected_TS.sum(1, dtype=torch.int32)
    filled_TK = torch.arange(k, device=scores_TS.device) < lengths_T[:, None]
    # nonzero walks row by row in ascending position, which is exactly the order of the filled slots
    indices_TK.masked_scatter_(filled_TK, selected_TS.nonzero()[:, 1].to(torch.int32))
    return indices_TK, lengths_T
