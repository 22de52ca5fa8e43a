"""How a run spreads over processes. The trainer only sees this interface; one process is the plain case of it.

A strategy prepares each role's module, decides when gradients are averaged, and reduces what is logged. The global batch is cut
into `world_size` contiguous shares; randomness is per sample (rng.py), so the cut changes no number that is drawn.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.roles import Role
from fastgen.surgery.offload import is_offloaded


class SingleProcess:
    """One process, one device; the interface that DDP and FSDP2 strategies implement."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, batch_size: int) -> range:
        """Global sample ids of this process."""
        each = batch_size // self.world_size
        return range(self.rank * each, (self.rank + 1) * each)

    def prepare(self, role: Role) -> None:
        """Wrap or shard the role's module in place, before optimizers are made."""
        role.module = role.denoiser if is_offloaded(role.denoiser.backbone) else role.denoiser.to(self.device)

    @contextmanager
    def gradients(self, modules: Iterable[nn.Module], *, synchronise: bool) -> Iterator[None]:
        """Around a backward pass: average gradients over processes only where `synchronise` is set."""
        yield

    def clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Clip to a global norm, if any, and return the norm before clipping, fp32 scalar."""
        return torch.nn.utils.clip_grad_norm_(list(parameters), math.inf if max_norm is None else max_norm)

    def mean(self, value: Tensor) -> Tensor:
        """Average of a logged scalar over processes."""
        return value


def choose_device(name: str, key: str = "recipe key train.device") -> torch.device:
    """`auto` takes CUDA, else the CPU; a name that is not there raises UserError, in which it is called `key`. Not MPS, which lacks the fp64
    of sampling grids."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    available = ["auto", "cpu", *gpus]
    if name not in available:
        raise UserError(f"{key}: {name!r} is not available here; available: {', '.join(available)}")
    return torch.device(name)


def launch(shard: str, device: str) -> SingleProcess:
    """The strategy for `train.shard`. UserError under a multi-process launcher, which no strategy here serves."""
    assert shard == "none", shard
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UserError(f"recipe key train.shard: 'none' runs one process, but the launcher started {processes}; start fastgen without a launcher")
    return SingleProcess(choose_device(device))
