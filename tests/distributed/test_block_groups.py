"""Blocks in groups of which each of two processes keeps others (gloo, CPU). Run with `pytest -m distributed`."""

from __future__ import annotations

import importlib
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fastgen import across
from fastgen.surgery import moe

SURGERY = str(Path(__file__).parents[1] / "surgery")
if SURGERY not in sys.path:  # tiny networks in groups
    sys.path.append(SURGERY)
networks: Any = importlib.import_module("moe_networks")

pytestmark = pytest.mark.distributed


def made(rank: int, wrap: Any) -> tuple[Any, Tensor]:
    """A network in groups, and a batch of its own for each process."""
    denoiser, routers = networks.grouped("pixart", 1)
    for router in routers:
        torch.nn.init.zeros_(router.modulation.weight)  # the time is the same in both processes
    denoiser.network.requires_grad_(True)
    wrap(denoiser.network)
    return denoiser, denoiser.x + 30 * (2 * rank - 1)


@torch.no_grad()
def prediction(rank: int, wrap: Any) -> Tensor:
    denoiser, x = made(rank, wrap)
    return denoiser.call(x, denoiser.t)


def gradient(rank: int, wrap: Any) -> tuple[list[list[float]], dict[str, Tensor]]:
    """What each group's samples kept, and the parameters' gradients."""
    denoiser, x = made(rank, wrap)
    with moe.recording_blocks(denoiser.network) as choices:
        denoiser.call(x, denoiser.t).square().sum().backward()
    grads = {name: p.grad for name, p in denoiser.network.named_parameters() if p.grad is not None}
    return [choice.counts.tolist() for choice in choices], grads


def shard(network: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in network.transformer_blocks:
        fully_shard(block)
    fully_shard(network)


def total(value: Tensor) -> Tensor:
    found = value.clone()
    dist.all_reduce(found)
    return found


def process(rank: int, store: str) -> None:
    alone = [gradient(other, lambda _: None) for other in range(2)]  # before there is another process
    assert [2, 0] in alone[0][0] + alone[1][0] and alone[0][0] != alone[1][0]  # one skips what the other runs
    drawn = prediction(rank, lambda _: None)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        with across.parts(total, 2):  # as replicas are, which run what either's samples keep
            _, grads = gradient(rank, lambda _: None)
        union = alone[0][1].keys() | alone[1][1].keys()
        assert grads.keys() == union
        for name in sorted(union):
            both = total(grads[name])
            expected = sum(found[1].get(name, torch.zeros(())) for found in alone)
            assert networks.largest(both, expected) <= 1e-9 * max(1.0, float(both.abs().max())), name
        _, grads = gradient(rank, shard)
        for name, grad in grads.items():
            each = [found[1].get(name, torch.zeros(())) for found in alone]
            expected = (each[0] + each[1]) / 2
            full: Any = grad
            assert networks.largest(full.full_tensor(), expected) <= 1e-9 * max(1.0, float(expected.abs().max())), name
        assert len(grads) == len(alone[0][1].keys() | alone[1][1].keys())
        assert networks.largest(prediction(rank, shard), drawn) <= 1e-9  # without gradients weights are gathered too
        dist.barrier()  # gloo aborts a process that still listens to one that has gone
    finally:
        dist.destroy_process_group()


def test_a_block_that_one_process_skips_has_the_others_gradient(tmp_path: Path) -> None:
    mp.spawn(process, (str(tmp_path / "store"),), nprocs=2)  # type: ignore[attr-defined]
