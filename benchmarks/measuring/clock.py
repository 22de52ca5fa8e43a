"""Times, memory and arithmetic of a call."""

from __future__ import annotations

import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring.case import Row, Target

Call = Callable[[], Any]


def spread(milliseconds: Sequence[float]) -> Row:
    """Median, interquartile range and number of repeated times."""
    quartiles = statistics.quantiles(milliseconds, n=4) if len(milliseconds) > 1 else [milliseconds[0]] * 3
    return {"median_ms": quartiles[1], "iqr_ms": quartiles[2] - quartiles[0], "n": len(milliseconds)}


def kernel_time(call: Call, target: Target, *, milliseconds: float = 300.0) -> Row:
    """Of what a call does on the GPU: CUDA events around it, the L2 cache cleared before each. It compiles and tunes in a call of its own."""
    call()
    if not target.is_gpu:
        return wall_time(call, target, seconds=0.01)
    times = importlib.import_module("triton.testing").do_bench(call, warmup=25, rep=milliseconds, return_mode="all")
    return spread(times)


def wall_time(call: Call, target: Target, *, seconds: float = 1.0, warm_up: int = 1) -> Row:
    """Of a call as its caller sees it, launches and host work included, until the GPU has finished."""
    for _ in range(warm_up):
        call()
    estimate = elapsed(call, target)
    repeats = max(3 if target.rehearsal else 5, min(100, round(1e3 * seconds / max(estimate, 1e-3))))
    return spread([elapsed(call, target) for _ in range(repeats)])


def elapsed(call: Call, target: Target) -> float:
    """Milliseconds of one call as its caller sees it. PyTorch's Timer would make two more calls before each, to warm up."""
    _finish(target)
    started = time.perf_counter()
    call()
    _finish(target)
    return 1e3 * (time.perf_counter() - started)


def _finish(target: Target) -> None:
    if target.is_gpu:
        torch.cuda.synchronize()


@contextmanager
def peak_bytes(target: Target) -> Iterator[Callable[[], int | None]]:
    """Yields a function that gives the GPU memory held at most inside, all tensors counted; None on a CPU, which does not count it."""
    if not target.is_gpu:
        yield lambda: None
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    yield torch.cuda.max_memory_allocated


def flops(call: Call) -> int:
    """Floating-point operations of the matrix products, convolutions and attention of a call, backward passes included, as PyTorch counts
    them: a product of M x K and K x N is 2 M N K. Kernels that PyTorch does not know count for nothing here."""
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


def busy_share(call: Call, target: Target) -> float | None:
    """Share of a call's time in which the GPU runs a kernel; what is left are gaps between launches. None on a CPU."""
    if not target.is_gpu:
        return None
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    kernels = sorted((event.time_range.start, event.time_range.end) for event in profile.events() or [] if _ran_on_gpu(event))
    if not kernels:
        return None
    busy, end = 0.0, kernels[0][0]
    for start, stop in kernels:
        busy, end = busy + max(0.0, stop - max(start, end)), max(end, stop)
    return busy / (end - kernels[0][0])


def _ran_on_gpu(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.end > event.time_range.start


def free_memory() -> None:
    """Give back what earlier cases have left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
