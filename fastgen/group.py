"""The processes that a launcher (torchrun, accelerate launch --multi_gpu) started for one run: joining them, and waiting for one of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def launched() -> int:
    """How many processes run this, 1 without a launcher."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", "0"))


def join(device: torch.device, timeout: float) -> None:
    """Meet the other processes, once; timeout: seconds after which a collective that some process does not come to fails."""
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))


def lone(work: Callable[[], T]) -> T | None:
    """Rank 0 does it while the others wait; its result there, None elsewhere. What it raises is raised everywhere."""
    result, failure = None, None
    if rank() == 0:
        try:
            result = work()
        except Exception as error:
            failure = error
    held: list[Any] = [failure]
    dist.broadcast_object_list(held, src=0)
    if held[0] is not None:
        raise held[0] if failure is None else failure
    return result
