"""Tile sizes: a table by architecture, head size and dtype, and a choice by measurement among a few of its entries."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """Queries and keys of one tile, warps of a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# For the interpreter: tiles small enough for short tests to take several steps.
INTERPRETER = Config(32, 32, num_warps=4, num_stages=1)
# Scores of one call from which measuring is worth its compilations.
MEASURE_FROM = 2**24
Kind = tuple[Hashable, ...]  # of problem: the kernel's name, then what a choice depends on
_chosen: dict[tuple[Kind, bool], Config] = {}  # by kind, and whether it was measured


def chosen() -> dict[Kind, Config]:
    """What has been chosen so far."""
    return {kind: config for (kind, _), config in _chosen.items()}


def forget() -> None:
    """Let the next call of each kind choose again."""
    _chosen.clear()


def bucket(length: int) -> int:
    """The power of two at or above a length."""
    return 1 << (length - 1).bit_length()


# By head size (a power of two), best guess first, the last entry small enough for every GPU. For fp16 and bf16 at head sizes 64 and 128 and
# without a mask none uses stack, i.e. spills registers (tests/kernels/test_compile.py); none has been timed yet.
_WGMMA = {
    32: [Config(128, 64, 8, 2), Config(64, 32, 4, 3)],
    64: [Config(128, 64, 8, 2), Config(128, 64, 8, 3), Config(64, 32, 4, 3)],
    128: [Config(128, 32, 8, 3), Config(128, 32, 8, 2), Config(64, 16, 4, 3)],
    256: [Config(32, 32, 8, 2)],
}
_MMA = {
    32: [Config(64, 64, 4, 2), Config(64, 32, 4, 2)],
    64: [Config(128, 32, 8, 2), Config(128, 32, 8, 3), Config(64, 32, 4, 2)],
    128: [Config(64, 32, 8, 3), Config(32, 64, 8, 2), Config(32, 32, 4, 2)],
    256: [Config(32, 32, 8, 2)],
}
# Without tangents there is room for larger tiles.
_WGMMA_PRIMAL = {64: [Config(128, 64, 4, 3), Config(128, 128, 8, 2)], 128: [Config(128, 64, 8, 3)]}
_MMA_PRIMAL = {64: [Config(128, 64, 8, 3)], 128: [Config(128, 64, 8, 2)]}
_BACKWARD = {32: [Config(64, 64, 4, 2)], 64: [Config(64, 64, 4, 2)], 128: [Config(64, 64, 8, 2), Config(32, 64, 8, 2)], 256: [Config(32, 32, 8, 2)]}
# Products in full fp32 run on the ordinary cores and keep their operands in registers: small tiles, and some of it spills.
_FP32 = {32: [Config(32, 32, 8, 1)], 64: [Config(32, 32, 8, 1)], 128: [Config(16, 32, 8, 1)], 256: [Config(16, 16, 8, 1)]}


def forward_candidates(capability: tuple[int, int], head_size: int, dtype: torch.dtype) -> list[Config]:
    """Tiles for output and tangent, best guess first. head_size: padded to a power of two."""
    if dtype == torch.float32:
        return _FP32[max(head_size, 32)]
    return (_WGMMA if capability[0] in (9, 10) else _MMA)[max(head_size, 32)]


def primal_candidates(capability: tuple[int, int], head_size: int, dtype: torch.dtype) -> list[Config]:
    """Tiles for the output alone."""
    more = _WGMMA_PRIMAL if capability[0] in (9, 10) else _MMA_PRIMAL
    larger = [] if dtype == torch.float32 else more.get(head_size, [])
    return larger + forward_candidates(capability, head_size, dtype)


def backward_candidates(capability: tuple[int, int], head_size: int, dtype: torch.dtype) -> list[Config]:
    """Tiles for the gradients, on any architecture."""
    return (_FP32 if dtype == torch.float32 else _BACKWARD)[max(head_size, 32)]


def suited(candidates: list[Config], num_queries: int) -> list[Config]:
    """The same candidates, those first whose tiles few queries fill."""
    return sorted(candidates, key=lambda config: config.block_m > max(bucket(num_queries), 32))


def launch_chosen(key: Kind, candidates: list[Config], launch: Callable[[Config], None], num_scores: int) -> None:
    """Launch with the configuration chosen for `key`, choosing it on the first call.

    Large problems are measured where there is a choice, unless torch.use_deterministic_algorithms asks for the same bits in every run or a
    CUDA graph is being captured; otherwise the first candidate that fits is taken.
    """
    measure = num_scores >= MEASURE_FROM and not torch.are_deterministic_algorithms_enabled() and not torch.cuda.is_current_stream_capturing()
    if (key, measure) not in _chosen:
        _chosen[key, measure] = _fastest(candidates, launch) if measure and len(candidates) > 1 else _first_that_fits(candidates, launch)
    launch(_chosen[key, measure])


def _first_that_fits(candidates: list[Config], launch: Callable[[Config], None]) -> Config:
    from triton.runtime.errors import OutOfResources

    for config in candidates[:-1]:
        try:
            launch(config)
        except OutOfResources:
            continue
        return config
    return candidates[-1]


def _fastest(candidates: list[Config], launch: Callable[[Config], None]) -> Config:
    """The candidate of the smallest median time; those that need more shared memory or registers than there are drop out."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times = {}
    for config in candidates:
        try:
            times[config] = do_bench(lambda config=config: launch(config), warmup=5, rep=20, return_mode="median")
        except OutOfResources:
            continue
    return min(times, key=times.__getitem__) if times else candidates[-1]
