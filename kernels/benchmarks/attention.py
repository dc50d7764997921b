"""Sparse attention of 4096 queries at the end of 4K, 32K and 128K keys; and the whole forward against dense
attention."""

from collections.abc import Callable
from functools import partial

import torch

from kernels.benchmarks.measure import Context, gather_only, interleaved, milliseconds, row
from kernels.benchmarks.selections import GENERATORS
from kernels.sparse_attention import sparse_attention
from kernels.sparse_attention import triton as plain

TOKENS, KEEP, DIM, VALUE = 4096, 2048, 576, 512
SCALE = DIM**-0.5
BARS = {(128, 32): (0.70, 0.86), (64, 32): (0.66, 0.82), (128, 128): (0.66, 0.82), (64, 128): (0.62, 0.78)}
GATHER_BARS = {32: (1.35, 1.12), 128: (1.15, 1.05)}
GATHER_BEFORE = {32: 1.23, 128: 2.50}  # ms of a gather-only pass on an H100, uniform selection


def check(q, kv, indices, out) -> None:
    """A few rows against float64, and no element unwritten."""
    if not torch.isfinite(out).all():
        raise RuntimeError("sparse attention: the output is not finite")
    for t in (0, 1000, TOKENS - 1):
        keys = kv[indices[t][indices[t] >= 0].long()].double()
        want = torch.softmax(q[t].double() @ keys.T * SCALE, -1) @ keys[:, :VALUE]
        error = float((out[t].double() - want).norm() / want.norm())
        if not error < 5e-3:
            raise RuntimeError(f"sparse attention: row {t} differs from float64 by {error}")


def rows(context: Context) -> list[dict]:
    found = []
    per_query = {}
    for thousands in (4, 8, 16, 32, 64, 128):
        keys = thousands * 1024
        kv = torch.randn(keys, DIM, device=context.device, dtype=torch.bfloat16)
        names = GENERATORS if thousands in (32, 128) else ["uniform"]
        for name in names:
            indices = GENERATORS[name](TOKENS, keys, KEEP, context.device)
            valid = int((indices >= 0).sum())
            runs: dict[str, Callable[[], object]] = {"gather": partial(gather_only, kv, indices)}
            for heads in (128, 64, 16) if thousands in (4, 32, 128) else (128,):
                q = torch.randn(TOKENS, heads, DIM, device=context.device, dtype=torch.bfloat16)
                run = partial(sparse_attention, q, kv, indices, SCALE, VALUE)
                check(q, kv, indices, run()[0])
                runs[str(heads)] = run
            ms = interleaved(runs)
            gather = ms.pop("gather")
            shape = f"T={TOKENS} S={thousands}K K={KEEP}"
            if thousands in GATHER_BEFORE and name == "uniform":
                ratio = GATHER_BEFORE[thousands] / gather
                found.append(row("gather only", shape, name, gather, "an H100 timed before", ratio, 0.9, None, True))
            for heads_text, taken in ms.items():
                heads = int(heads_text)
                title = f"sparse attention H={heads}"
                share = 2 * heads * valid * (DIM + VALUE) / taken / 1e9 / context.ceilings["bf16"]
                bar, aim = BARS.get((heads, thousands), (None, None))
                graded = bar is not None and name == "uniform"
                found.append(
                    row(
                        title,
                        shape,
                        name,
                        taken,
                        "bf16 ceiling",
                        share,
                        bar if graded else None,
                        aim if graded else None,
                        True,
                    )
                )
                slow_gather = thousands == 128 and heads >= 64 and name == "uniform"
                if slow_gather:  # the bar is the longer of the two times
                    limit = max(1.3 * gather, taken * share / BARS[heads, thousands][0])
                    found[-1]["holds"] = taken <= limit
                if heads == 16 and thousands in GATHER_BARS:
                    bar, aim = GATHER_BARS[thousands] if name == "uniform" else (None, None)
                    found.append(row(title, shape, name, taken, "gather only", taken / gather, bar, aim, False))
            if name == "uniform":
                per_query[thousands] = ms["128"]
        torch.cuda.empty_cache()
    growth = per_query[128] / per_query[32]
    found.append(
        row(
            "sparse attention H=128, 128K / 32K",
            "time per query",
            "uniform",
            per_query[128],
            "32K",
            growth,
            1.25,
            None,
            False,
        )
    )
    return found + plain_rows(context)


def plain_rows(context: Context) -> list[dict]:
    """Plain Triton beside Gluon, at 32K, uniform."""
    indices = GENERATORS["uniform"](TOKENS, 32768, KEEP, context.device)
    kv = torch.randn(32768, DIM, device=context.device, dtype=torch.bfloat16)
    found = []
    for heads in (128, 64):
        q = torch.randn(TOKENS, heads, DIM, device=context.device, dtype=torch.bfloat16)
        ms = milliseconds(partial(plain.sparse_attention, q, kv[:, None], None, indices, SCALE, VALUE))
        share = 2 * heads * TOKENS * KEEP * (DIM + VALUE) / ms / 1e9 / context.ceilings["bf16"]
        shape = f"T={TOKENS} S=32K K={KEEP}"
        found.append(
            row(
                f"sparse attention H={heads}, plain Triton",
                shape,
                "uniform",
                ms,
                "bf16 ceiling",
                share,
                None,
                None,
                True,
            )
        )
    return found
