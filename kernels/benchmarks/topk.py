"""Top-2048 of 4096 rows of fp32 scores, against one read of them at copy speed and torch.topk."""

from functools import partial

import torch
from torch import Tensor

from kernels.benchmarks.measure import Context, milliseconds, row
from kernels.topk import topk

ROWS, KEEP = 4096, 2048


def scores(kind: str, positions: int, device: torch.device) -> Tensor:
    """normal; real: recency, 16 sinks and 12 clusters of 250 keys a row on noise; plateau: 1 % positive, else 0."""
    generator = torch.Generator(device).manual_seed(positions)
    scores_TS = torch.randn(ROWS, positions, device=device, generator=generator)
    if kind == "plateau":
        return scores_TS.sub_(2.33).relu_()
    if kind == "real":
        scores_TS += 2.0 * torch.exp((torch.arange(positions, device=device) - positions) / 2000.0)
        scores_TS[:, :16] += 4.0
        starts = torch.randint(0, positions - 250, (ROWS, 12), device=device, generator=generator)
        for start_T in starts.unbind(1):
            places = start_T[:, None] + torch.arange(250, device=device)
            scores_TS.scatter_add_(1, places, torch.full_like(places, 2, dtype=scores_TS.dtype))
    return scores_TS


def rows(context: Context) -> list[dict]:
    found = []
    for positions in (32768, 131072):
        for kind in ("normal", "real", "plateau"):
            scores_TS = scores(kind, positions, context.device)
            read_ms = scores_TS.numel() * 4 / context.ceilings["copy"] / 1e6
            ms = milliseconds(partial(topk, scores_TS, KEEP))
            bar, aim = (1.5, 1.15) if positions == 131072 and kind != "plateau" else (None, None)
            shape = f"{ROWS} x {positions // 1024}K fp32, k={KEEP}"
            found.append(row("top-k", shape, kind, ms, "one read at copy speed", ms / read_ms, bar, aim, False))
            if kind == "normal":
                peer_ms = milliseconds(partial(torch.topk, scores_TS, KEEP, sorted=False))
                found.append(row("top-k", shape, kind, ms, "torch.topk", peer_ms / ms, None, None, True))
            del scores_TS
    return found
