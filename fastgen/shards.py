"""Tensors of which each process holds a part, beside plain ones that it holds whole, and what is asked of both alike.

A sharded tensor is torch's DTensor as FSDP2 makes it: cut along its first dimension over the mesh's last, the same on the others. Its own part
is a plain tensor, in which optimizers, averages and checks work; only what they find has to meet. Functions that say so are collective.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def own(tensor: Tensor) -> Tensor:
    """This process's part, which shares the tensor's memory, without its graph; a plain tensor itself."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def own_range(tensor: DTensor) -> range:
    """Which rows of the whole tensor are this process's: as `torch.chunk` cuts them, so that the last processes may have fewer or none."""
    dim = shard_dimension(tensor)
    size, count = tensor.shape[0], tensor.device_mesh.size(dim)
    each = math.ceil(size / count)
    start = min(tensor.device_mesh.get_local_rank(dim) * each, size)
    return range(start, min(start + each, size))


def shard_dimension(tensor: DTensor) -> int:
    """The dimension of its mesh over which it is cut."""
    (dim,) = [i for i, placement in enumerate(tensor.placements) if placement.is_shard()]
    assert tensor.placements[dim] == Shard(0), "FSDP2 cuts along the first dimension unless it is told otherwise"
    return dim


def rows_of(tensor: Tensor) -> range:
    """Which rows of a tensor are this process's; of a plain one all."""
    return own_range(tensor) if isinstance(tensor, DTensor) else range(tensor.shape[0])


def from_part(part: Tensor, like: Tensor) -> Tensor:
    """A tensor that is cut as `like` is, of which this process has this part; for a plain `like` the part is the whole."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a whole tensor, or of one sharded in the same way, where `like` lies as it does: a view."""
    if isinstance(whole, DTensor) or not isinstance(like, DTensor):
        return own(whole)
    rows = own_range(like)
    return whole.detach()[rows.start : rows.stop]


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Overwrite a tensor, of which this process may hold a part, by a whole one or by one sharded in the same way."""
    own(target).copy_(part_of(value, target))


@torch.no_grad()
def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor of `like`'s shape, cut as that is: a copy of this process's part; for a plain `like` the value itself."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return from_part(part_of(value, like).to(own(like).device).clone(), like)


def moved(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on another device, of a part too, whose mesh stays what it is: FSDP2 offloads so. The tensor itself where nothing changes."""
    dtype = tensor.dtype if dtype is None else dtype
    part = own(tensor).to(device, dtype)
    if not isinstance(tensor, DTensor):
        return part
    elsewhere = tensor.detach().clone().to(dtype)
    elsewhere._local_tensor = part  # type: ignore[attr-defined]
    return elsewhere


def whole(tensor: Tensor) -> Tensor:
    """Collective: the whole tensor, on the device of its mesh."""
    detached = tensor.detach()
    if not isinstance(detached, DTensor):
        return detached
    return moved(detached, detached.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]


def largest(tensors: Iterable[Tensor]) -> float:
    """Collective: the largest absolute value in any process's part; infinite where any value is not finite, 0 of nothing."""
    tensors = list(tensors)
    parts = [part for tensor in tensors if (part := own(tensor)).numel()]
    found = torch.nn.utils.get_total_norm(parts, math.inf).item() if parts else 0.0
    return _reduced(found if math.isfinite(found) else math.inf, tensors, dist.ReduceOp.MAX)


def norm(tensors: Iterable[Tensor]) -> float:
    """Collective: the Euclidean norm of all of them as one vector, summed in fp64."""
    tensors = list(tensors)
    squares = {True: 0.0, False: 0.0}
    for sharded in squares:
        parts = [own(tensor) for tensor in tensors if is_sharded(tensor) == sharded]
        if parts:
            squares[sharded] = torch.stack([n.double().cpu() for n in torch._foreach_norm(parts)]).square().sum().item()
    return math.sqrt(_reduced(squares[True], tensors, dist.ReduceOp.SUM) + squares[False])


def _reduced(value: float, tensors: Iterable[Tensor], operation: dist.ReduceOp.RedOpType) -> float:
    """Over the processes that hold parts of the tensors, all of one mesh; the value itself where none is sharded."""
    first = next((tensor for tensor in tensors if isinstance(tensor, DTensor)), None)
    if first is None:
        return value
    mesh = first.device_mesh
    reduced = torch.tensor(value, dtype=torch.float64, device=mesh.device_type)
    dist.all_reduce(reduced, operation, group=mesh.get_group(shard_dimension(first)))
    return reduced.item()
