"""Networks of which each process keeps a part (FSDP2, Zhao et al. 2023, arXiv:2304.11277), for roles that do not fit whole on one device.

One sharded root for each network, however many roles share it: a second root over it would gather it twice, and torch refuses it. Each of the
family's blocks is a unit that is whole only while it runs, the root holds the rest, and is cut again after every pass too: it would otherwise
keep serving weights from before an optimizer step to the next pass without gradients. Gradients are reduced in every backward pass, not in an
update's last alone: it is only then that no process ever has more of them than its part, and that a block which the last term does not
reach does not keep what earlier terms gave it. Parameters that lie beside a network (heads, inputs, the log-variance) stay whole everywhere.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils._pytree import tree_leaves

from fastgen import shards
from fastgen.denoiser import Denoiser
from fastgen.families.weights import WeightFiles
from fastgen.parallel import Cut, Replicas
from fastgen.roles import Role


def mesh_of(device: torch.device, sizes: Sequence[int] | None) -> DeviceMesh:
    """Collective. The last dimension is that over which networks are cut."""
    sizes = (dist.get_world_size(),) if sizes is None else tuple(sizes)
    return init_device_mesh(device.type, sizes, mesh_dim_names=("replicas", "parts")[-len(sizes) :])


def shard(network: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, cut: Cut) -> None:
    """Cut a network in place, block by block, so that no device ever holds more of it than a block; once it is cut, nothing happens.

    Times stay in fp32, whatever the parameters are gathered in: forward's arguments are not cast.
    """
    if isinstance(network, FSDPModule):
        return
    precision = MixedPrecisionPolicy(cut.compute, None if cut.compute is None else torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if _lies_on_cpu(network, cut) else OffloadPolicy()
    blocks = list(blocks)
    for module in (*blocks, network):
        if not isinstance(module, FSDPModule):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision, offload_policy=offload)
    for block in blocks:
        _gather_with(block, network)


def _gather_with(block: nn.Module, network: nn.Module) -> None:
    """Have the root's own parameters there once a gradient comes to a block's output: torch gathers them for gradients of the network's output alone,
    and heads listen to blocks. What is there already costs nothing, and at the end of a backward pass torch cuts and reduces whatever is whole."""

    def gather(grad: Tensor) -> Tensor:
        network.unshard()  # type: ignore[operator]  # fully_shard has made it an FSDPModule
        return grad

    def mark(_module: nn.Module, _inputs: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(gather)

    hook: Any = torch.compiler.disable(mark)
    block.register_forward_hook(hook)


def _lies_on_cpu(network: nn.Module, cut: Cut) -> bool:
    return cut.offload and not any(parameter.requires_grad for parameter in network.parameters())


@torch.no_grad()
def fill(network: nn.Module, files: WeightFiles, device: torch.device) -> None:
    """Give a cut network, whose parameters are on the meta device, this process's parts of its weights: it reads no more of them. Adapters in it
    have theirs, and the layers that they lie on keep their names in the files."""
    empty = {name: parameter for name, parameter in network.named_parameters() if parameter.is_meta}
    names = {name.replace(".base_layer.", "."): name for name in empty}
    parts: dict[str, Tensor] = {}
    for stored, value in files.read({stored: shards.rows_of(empty[name]) for stored, name in names.items()}):
        like = empty[names[stored]]
        part = value.to(device, shards.own(like).dtype, copy=True)  # no view of the file, which may be replaced
        parts[names[stored]] = shards.from_part(part, like)
    network.load_state_dict(parts, strict=False, assign=True)


def outline(network: nn.Module) -> nn.Module:
    """A copy without weights, on the meta device: its buffers are shared."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in network.parameters()}
    memo |= {id(buffer): buffer for buffer in network.buffers()}
    return copy.deepcopy(network, memo)


class Shards(Replicas):
    """Every process has its part of all networks, and its share of each batch."""

    def __init__(self, device: torch.device, cut: Cut) -> None:
        super().__init__(device)
        self.cut = cut
        self.mesh = mesh_of(device, cut.mesh)
        self._outlines: dict[int, nn.Module] = {}  # of networks as they were, by id

    def prepare(self, role: Role) -> None:
        denoiser = role.denoiser
        for addition in _additions(denoiser):
            addition.to(self.device)
            self.equalise([*addition.parameters(), *addition.buffers()])
        network = denoiser.backbone
        if not isinstance(network, FSDPModule):
            self.equalise([*(p for p in network.parameters() if p.requires_grad), *network.buffers()])
            self._outlines[id(network)] = outline(network)
            shard(network, denoiser.family.blocks(network), self.mesh, self.cut)
            if any(parameter.is_meta for parameter in network.parameters()):
                assert self.weights is not None, "whoever makes an outline says where its weights are"
                fill(network, self.weights, torch.device("cpu") if _lies_on_cpu(network, self.cut) else self.device)
        role.module = denoiser

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        super().reduce(parameter for parameter in parameters if not shards.is_sharded(parameter))

    def clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = shards.norm(grads)
        if max_norm is not None and math.isfinite(norm) and norm + 1e-6 > max_norm:
            for grad in grads:
                shards.own(grad).mul_(max_norm / (norm + 1e-6))
        return torch.tensor(norm, dtype=torch.float64)

    def plain(self, role: Role) -> Role | None:
        """Collective: the role with its whole network on the main process's CPU, gathered one tensor at a time; None elsewhere."""
        denoiser = role.denoiser
        network = self._outlines[id(denoiser.backbone)] if self.is_main else None
        if network is not None:
            network = copy.deepcopy(network).to_empty(device="cpu")
        target = {} if network is None else dict(network.named_parameters()) | dict(network.named_buffers())
        for name, tensor in [*denoiser.backbone.named_parameters(), *denoiser.backbone.named_buffers()]:
            whole = shards.whole(tensor)
            if network is not None:
                target[name].data = whole.to("cpu")
        if network is None:
            return None
        gathered = copy.copy(denoiser)  # not deep: the additions are whole already
        gathered._modules = {**denoiser._modules, "backbone": network}
        return Role(role.name, role.spec, gathered)


def _additions(denoiser: Denoiser) -> list[nn.Module]:
    return [module for module in (denoiser.inputs, denoiser.log_variance, denoiser.heads) if module is not None]
