"""Timing and ceilings. A card lowers its clock under load, so a kernel is compared with what the same process
measured."""

import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl


@dataclass
class Context:
    """What the benchmark modules get: `rows(context) -> list[dict]`, keys as `row` below makes them."""

    device: torch.device
    ceilings: dict[str, float] = field(default_factory=dict)  # TFLOP/s: bf16, fp8; GB/s (read + written): copy


def milliseconds(run: Callable[[], object], repeat_ms: int = 100) -> float:
    """Median; clears L2 between the runs."""
    return float(triton.testing.do_bench(run, warmup=25, rep=repeat_ms, quantiles=[0.5]))


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The same as one CUDA graph, as decoding steps are served: of launches of a few microseconds each, the host's time
    would be measured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = run()

    def replay() -> object:
        graph.replay()
        return written  # and so it lives as long as the graph that writes it

    return replay


def interleaved(runs: dict[str, Callable[[], object]], rounds: int = 3, repeat_ms: int = 40) -> dict[str, float]:
    """Median of the medians of rounds in which every candidate takes its turn, so that a drift of the clock hits
    all."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(milliseconds(run, repeat_ms))
    return {name: statistics.median(values) for name, values in taken.items()}


def once(run: Callable[[], object], repeats: int = 3) -> float:
    """Median of single event-timed runs, for operations of tens of milliseconds and more."""
    run()
    taken = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def row(
    operation: str,
    shape: str,
    selection: str,
    ms: float,
    against: str,
    ratio: float,
    bar: float | None,
    aim: float | None,
    higher_is_better: bool,
) -> dict:
    holds = None if bar is None else bool(ratio >= bar if higher_is_better else ratio <= bar)
    return dict(
        operation=operation,
        shape=shape,
        selection=selection,
        ms=round(ms, 4),
        against=against,
        ratio=round(ratio, 3),
        bar=bar,
        aim=aim,
        better="higher" if higher_is_better else "lower",
        holds=holds,
    )


def measure_ceilings(device: torch.device) -> dict[str, float]:
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    # a cool card lends its clock for a second or two; the kernels are timed on a hot one, and so is the ceiling
    until = time.monotonic() + 4
    while time.monotonic() < until:
        for _ in range(50):
            torch.matmul(a, b)
        torch.cuda.synchronize()
    ceilings = {"bf16": 2 * n**3 / milliseconds(lambda: a @ b, 500) / 1e9}
    if torch.cuda.get_device_capability(device) >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        run = lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)  # noqa: E731
        ceilings["fp8"] = 2 * n**3 / milliseconds(run, 300) / 1e9
    source = torch.randn(1 << 29, device=device)  # 2 GB, read and written: 4 GB
    target = torch.empty_like(source)
    ceilings["copy"] = 2 * source.numel() * 4 / milliseconds(lambda: target.copy_(source)) / 1e6
    return {name: round(value, 1) for name, value in ceilings.items()}


@triton.jit
def gather_kernel(words_ptr, indices_ptr, out_ptr, KEYS: tl.constexpr, N: tl.constexpr):
    """Reads 1152-byte rows as the attention kernels do, and does nothing but mix their words."""
    query = tl.program_id(0).to(tl.int64)
    wide_D = tl.arange(0, 256)
    narrow_D = tl.arange(0, 32)
    wide_ND = tl.zeros([N, 256], tl.int32)
    narrow_ND = tl.zeros([N, 32], tl.int32)
    for start in range(0, KEYS, N):
        index_N = tl.load(indices_ptr + query * KEYS + start + tl.arange(0, N))
        row_N = words_ptr + tl.maximum(index_N, 0).to(tl.int64) * 288
        wide_ND ^= tl.load(row_N[:, None] + wide_D[None, :])
        narrow_ND ^= tl.load(row_N[:, None] + (256 + narrow_D)[None, :])
    tl.store(out_ptr + query, tl.sum(tl.sum(wide_ND, 1), 0) + tl.sum(tl.sum(narrow_ND, 1), 0))


def gather_only(kv_SD: torch.Tensor, indices_TK: torch.Tensor, rows: int = 32) -> torch.Tensor:
    """kv_SD [S, 576] bf16. What the card can gather: 16 bytes a thread, several programs on each multiprocessor."""
    out_T = torch.empty(indices_TK.shape[0], dtype=torch.int32, device=kv_SD.device)
    words = kv_SD.view(torch.int32)
    gather_kernel[(indices_TK.shape[0],)](words, indices_TK, out_T, KEYS=indices_TK.shape[1], N=rows, num_warps=4)
    return out_T


def clocks() -> str:
    """SM clock and power as the driver tells them right now; 'unknown' where it does not."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,power.limit", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else "unknown"
