"""How a run spreads over processes. The trainer only sees `Strategy`; one process is the plain case of it.

A strategy prepares each role's module, averages gradients, and reduces what is logged. The global batch is cut into `world_size` contiguous
shares; randomness is per sample (rng.py), so the cut changes no number that is drawn. Every method but the properties, `share` and `gradients` is
collective: all processes call it, in the same order.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgen import group
from fastgen.config import TrainBlock
from fastgen.errors import UserError
from fastgen.families.weights import WeightFiles
from fastgen.roles import Role
from fastgen.surgery.offload import is_offloaded

T = TypeVar("T")

# Bytes of gradients that are summed at once: enough for a network's bandwidth, and little beside the gradients themselves.
BUCKET = 1 << 26


class Strategy(ABC):
    """What the trainer asks of the processes of a run."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.weights: WeightFiles | None = None  # of networks that are prepared without theirs

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def members(self) -> group.Alone:
        """The processes that share its work."""
        return group.Alone()

    def share(self, batch_size: int) -> range:
        """Global sample ids of this process."""
        each = batch_size // self.world_size
        return range(self.rank * each, (self.rank + 1) * each)

    def prepare(self, role: Role) -> None:
        """Put the role's module where it computes, wrapped or sharded in place, before optimizers are made."""
        role.module = role.denoiser if is_offloaded(role.denoiser.backbone) else role.denoiser.to(self.device)

    def plain(self, role: Role) -> Role | None:
        """The role with its network whole, to be exported: on every process that has it, and where processes keep parts on the main one alone."""
        return role

    @contextmanager
    def gradients(self, modules: Iterable[nn.Module], *, synchronise: bool) -> Iterator[None]:
        """Around a backward pass; `synchronise` says that it is an update's last, for strategies that reduce gradients as they appear."""
        yield

    @abstractmethod
    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """After an update's last backward pass: make the gradients of these the mean over processes, where `gradients` has not. A parameter that
        has one on some process has one on each afterwards; one that has none anywhere has none."""

    def clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Clip reduced gradients to a global norm, if any, and return the norm before clipping, fp32 scalar."""
        return torch.nn.utils.clip_grad_norm_(list(parameters), math.inf if max_norm is None else max_norm)

    @abstractmethod
    def total(self, value: Tensor) -> Tensor:
        """The sum over processes, without a graph: the same bits on each."""

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes."""
        return self.total(value) / self.world_size

    @abstractmethod
    def gather(self, value: Tensor) -> Tensor:
        """(world_size, ...) of a tensor (...) that each process has, in the order of ranks, without a graph."""

    @abstractmethod
    def any(self, flag: bool) -> bool:
        """Whether it is set on any process."""

    @abstractmethod
    def first(self, value: T | None) -> T | None:
        """What the process of the lowest rank has that has anything but None."""

    @abstractmethod
    def broadcast(self, value: T) -> T:
        """What the main process has."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every process has come here."""

    def lone(self, work: Callable[[], T]) -> T | None:
        """Have the main process do it while the others wait, for as long as it takes; its result there, None elsewhere. What it raises is raised
        everywhere."""
        return self.members.lone(work)


class SingleProcess(Strategy):
    """One process, one device."""

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        return

    def total(self, value: Tensor) -> Tensor:
        return value.detach()

    def gather(self, value: Tensor) -> Tensor:
        return value.detach()[None]

    def any(self, flag: bool) -> bool:
        return flag

    def first(self, value: T | None) -> T | None:
        return value

    def broadcast(self, value: T) -> T:
        return value

    def barrier(self) -> None:
        return


class SeveralProcesses(Strategy):
    """The collectives over all processes of a launcher, for strategies that cut the batch among them. Flags and objects go through the CPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    @property
    def members(self) -> group.Alone:
        return group.current()

    def total(self, value: Tensor) -> Tensor:
        value = value.detach().clone()
        dist.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> Tensor:
        each = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
        dist.all_gather(each, value.detach().contiguous())
        return torch.stack(each)

    def any(self, flag: bool) -> bool:
        return bool(_largest(torch.tensor([flag], dtype=torch.int32)).item())

    def first(self, value: T | None) -> T | None:
        if not self.any(value is not None):  # the usual case, which needs no pickles
            return None
        each: list[T | None] = [None] * self.world_size
        dist.all_gather_object(each, value)
        return next(found for found in each if found is not None)

    def broadcast(self, value: T) -> T:
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def barrier(self) -> None:
        self.any(False)


class Replicas(SeveralProcesses):
    """Every process has all networks. Gradients are summed in flat pieces once an update's are complete: no wrapper, so that it does not matter
    which terms, heads or experts a process's samples reached, and nothing is reduced that another micro-batch adds to."""

    def prepare(self, role: Role) -> None:
        super().prepare(role)
        self.equalise([*role.parameters().values(), *role.denoiser.buffers()])

    @torch.no_grad()
    def equalise(self, tensors: Iterable[Tensor]) -> None:
        """Make these the main process's: what a device's kernels have made may differ in its last bits."""
        for tensor in tensors:
            if tensor.device.type != "meta":
                held = tensor.detach().to(self.device, copy=True).contiguous()
                dist.broadcast(held, src=0)
                tensor.copy_(held)

    @torch.no_grad()
    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        has = _largest(torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)).tolist()
        for bucket in _buckets([parameter for parameter, there in zip(parameters, has, strict=True) if there]):
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            grads: list[Tensor] = [parameter.grad for parameter in bucket]  # type: ignore[misc]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat)
            flat /= self.world_size
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view(grad.shape))


def _largest(value: Tensor) -> Tensor:
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one dtype, up to BUCKET bytes together; one that is larger has its own."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        own = parameter.numel() * parameter.element_size()
        if bucket and (parameter.dtype != bucket[0].dtype or size + own > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += own
    if bucket:
        yield bucket


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


def own_device(name: str, key: str = "recipe key train.device") -> torch.device:
    """This process's own of its machine's devices. UserError, in which the name is called `key`, where there are fewer of them than processes, or
    it is of one for all."""
    device = choose_device(name, key)
    if device.type != "cuda" or group.launched() == 1:
        return device
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device.index is not None:
        raise UserError(f"{key}: {name!r} is one GPU for every process; with several, say cuda, and each takes its own")
    if local >= count:
        raise UserError(f"{key}: {count} GPUs here, too few for process {local + 1} of this machine; start as many as there are")
    return torch.device("cuda", local)


def processes_of(train: TrainBlock, processes: int | None = None, *, dry: bool = False) -> int:
    """How many processes share a run: as many as are given, else as the launcher has started; of a dry run without a launcher, as its mesh has."""
    found = group.launched() if processes is None else processes
    return math.prod(train.mesh) if dry and found == 1 and train.mesh is not None else found


def shard_of(train: TrainBlock, processes: int | None = None, *, dry: bool = False) -> str:
    """`none`, `ddp` or `fsdp`: how a run spreads. processes: how many there are, None for the launcher's. UserError where that does not fit them or
    the batch. dry: it does not start now, so there may be no launcher."""
    started = processes_of(train, processes)
    processes = processes_of(train, processes, dry=dry)
    shard = ("none" if started == 1 else "ddp") if train.shard == "auto" else train.shard
    if shard == "none" and started > 1:
        raise UserError(f"recipe key train.shard: 'none' runs one process, but the launcher started {started}; say auto, or leave out the launcher")
    if shard != "none" and started == 1 and not dry:
        raise UserError(f"recipe key train.shard: {shard!r} needs several processes; start it with torchrun or accelerate launch --multi_gpu")
    if train.mesh is not None and shard != "fsdp":
        raise UserError(f"recipe key train.mesh: {list(train.mesh)} is for train.shard: fsdp alone, and this run has {shard!r}")
    if train.mesh is not None and math.prod(train.mesh) != processes:
        raise UserError(f"recipe key train.mesh: {' x '.join(map(str, train.mesh))} is not the {processes} processes that the launcher started")
    if train.batch_size % processes:
        raise UserError(f"recipe key train.batch_size: {train.batch_size} cannot be shared by {processes} processes; choose a multiple")
    share = train.batch_size // processes
    if train.micro_batch and share % train.micro_batch:
        of = "train.batch_size" if processes == 1 else f"the {share} samples that each of {processes} processes has of train.batch_size"
        raise UserError(f"recipe key train.micro_batch: {train.micro_batch} does not divide {of}{f' {share}' * (processes == 1)}")
    return shard


def check_launch(train: TrainBlock, processes: int | None = None, *, dry: bool = False) -> None:
    """UserError for what `launch` would refuse. processes: of another machine's launcher, whose devices are not looked for here; dry: without asking
    for a launcher."""
    shard_of(train, processes, dry=dry)
    if processes is None:
        own_device(train.device)


@dataclass(frozen=True)
class Cut:
    """How fsdp cuts networks. mesh: (copies, parts of a copy), None for one copy in as many parts as there are processes. compute: the dtype that
    parameters are gathered in, None for their own; gradients are reduced in fp32 then. offload: parts of frozen networks lie on the CPU."""

    mesh: tuple[int, int] | None = None
    compute: torch.dtype | None = None
    offload: bool = False


def launch(train: TrainBlock, cut: Cut | None = None) -> Strategy:
    """The strategy that a recipe asks for, in the group of the launcher's processes, which it joins. cut: of fsdp."""
    check_launch(train)
    device, shard = own_device(train.device), shard_of(train)
    if shard == "none":
        return SingleProcess(device)
    group.join(device, train.timeout)
    if shard == "ddp":
        return Replicas(device)
    from fastgen.sharding import Shards  # which is a strategy too

    return Shards(device, cut or Cut(train.mesh))
