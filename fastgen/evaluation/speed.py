"""Time and memory of generating images."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch


def seconds_per_1000(generate: Callable[[int], object], n: int, batch_size: int, repeats: int) -> float:
    """Median wall-clock seconds per 1000 images, over `repeats` generations of n images, after one batch that is not counted.

    `generate(count)` makes `count` images (the last batch of n may be smaller); the accelerator is synchronised before each reading of
    the clock. Raises ValueError unless n, batch_size and repeats are at least 1.
    """
    if min(n, batch_size, repeats) < 1:
        raise ValueError(f"n, batch_size and repeats must be at least 1, got {n}, {batch_size}, {repeats}")
    sizes = [min(batch_size, n - start) for start in range(0, n, batch_size)]
    generate(sizes[0])
    return statistics.median(1000 * _seconds(generate, sizes) / n for _ in range(repeats))


def synchronise() -> None:
    """Wait until the accelerator, where there is one, has finished what it was given, so that a clock reading means something."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def peak_memory_bytes() -> int:
    """Peak memory in bytes, of the kind this process has used.

    With tensors on a CUDA device: the most that torch held allocated there since `reset_peak_memory()`, on the current device. Otherwise
    the process's peak resident set (`ru_maxrss`, POSIX only): it counts the interpreter and every library, and never falls, so on a CPU
    a later measurement in the same process cannot be lower than an earlier one.
    """
    if torch.cuda.is_initialized() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def reset_peak_memory() -> None:
    """Start a new CUDA peak; the CPU's cannot be reset."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _seconds(generate: Callable[[int], object], sizes: list[int]) -> float:
    synchronise()
    start = time.perf_counter()
    for size in sizes:
        generate(size)
    synchronise()
    return time.perf_counter() - start
