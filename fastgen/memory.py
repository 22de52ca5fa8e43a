"""How much memory the tensors that a run holds all along take on one process, from shapes alone: networks and what trains them, and the encoded
data. Of a network that processes keep parts of (train.shard: fsdp), the largest part counts.

Neither what the recipe keeps on the CPU nor what comes and goes is counted: activations, text encoders and VAE, and the copies with which
averages are sampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen import conditioning
from fastgen.conditioning import Conditioning
from fastgen.data.store import DTYPES
from fastgen.data.training import prompt_weights
from fastgen.plan import Plan, pairs_of
from fastgen.roles import Role, Roles
from fastgen.surgery.held import held_bytes


class Held(NamedTuple):
    """Bytes that a run holds between passes, at the step where they are most. gradients: of the update with most of them."""

    step: int
    frozen: int
    trained: int
    buffers: int
    gradients: int
    optimizers: int
    averages: int

    @property
    def total(self) -> int:
        return sum(self[1:])


def network_bytes(planned: Plan, roles: Roles) -> int:
    """The most at one time of weights, buffers, gradients, optimizer states and averages. roles: the plan's, whose networks may be meta ones."""
    return held(planned, roles).total


def held(planned: Plan, roles: Roles) -> Held:
    """The same by what it is."""
    parts = _parts(planned, roles)
    trained = {name: [parts.get(id(p), p) for p in role.parameters().values()] for name, role in roles.items()}
    own = {id(p) for role in roles.values() for p in role.parameters().values()}
    # A teacher that no adapter shares is in the compute dtype under autocast, but for its buffers, unless the recipe says otherwise.
    narrow = planned.autocast is not None and planned.tuning is None and planned.storage.dtype == "auto"
    shared = {id(p): parts.get(id(p), p) for role in roles.values() for p in role.denoiser.parameters() if id(p) not in own}
    written = held_bytes(role.denoiser for role in roles.values())
    frozen = written + sum(p.numel() * (2 if narrow else p.element_size()) for p in shared.values())
    there = planned.recipe.train.ema_device == "same"
    averages = sum(4 * _count(trained[name]) for name, spec in planned.roles.items() if spec.averaged and there)
    most = _most_at_once(planned, roles, trained)
    buffers = _frozen_buffers(roles) - written
    if planned.recipe.teacher.offload:
        frozen = buffers = 0
    return most._replace(frozen=frozen, buffers=most.buffers + buffers, averages=averages)


def _parts(planned: Plan, roles: Roles) -> dict[int, Tensor]:
    """What the first process has of the networks' parameters, by their ids; nothing where each has them whole. What lies beside a network is
    whole everywhere."""
    if planned.cut is None:
        return {}
    networks = {id(role.denoiser.backbone): role.denoiser.backbone for role in roles.values()}
    return {id(p): part_as_cut(p, planned.parts) for network in networks.values() for p in network.parameters()}


def part_as_cut(parameter: Tensor, parts: int) -> Tensor:
    """The first and largest of `parts` parts, as FSDP2 cuts; on the meta device."""
    return torch.empty(math.ceil(parameter.shape[0] / parts), *parameter.shape[1:], dtype=parameter.dtype, device="meta")


def gathered_bytes(planned: Plan, roles: Roles) -> int:
    """The most that is whole for a moment of networks that processes keep parts of: two blocks, the next on its way, in the dtype that they are
    gathered in, and the gradients of one."""
    cut = planned.cut
    if cut is None:
        return 0
    most = 0
    for role in roles.values():
        family, network = role.denoiser.family, role.denoiser.backbone
        blocks = family.blocks(network)
        inside = {id(p) for block in blocks for p in block.parameters()}
        units = [list(block.parameters()) for block in blocks] + [[p for p in network.parameters() if id(p) not in inside]]
        for unit in units:
            count, width = _count(unit), max((p.element_size() for p in unit), default=0)
            gathered = count * (width if cut.compute is None else cut.compute.itemsize)
            most = max(most, 2 * gathered + 2 * sum(p.numel() * p.element_size() for p in unit if p.requires_grad))
    return most


def _most_at_once(planned: Plan, roles: Mapping[str, Role], trained: Mapping[str, Sequence[Tensor]]) -> Held:
    """Trained roles have weights as long as they are needed, optimizer states while they train, and gradients while one update does."""
    steps = planned.recipe.train.steps
    distiller = planned.method(planned.method_config, planned.setting({}))
    spans = {name: distiller.span(name) or (0, steps) for name, parameters in trained.items() if parameters}

    def at(step: int) -> Held:
        needed = [name for name in spans if distiller.needed(name, step)]
        training = [name for name in needed if spans[name][0] <= step < sum(spans[name])]
        gradients = max(sum(_bytes(trained[name]) for name in update.trains) for update in distiller.updates(step))
        states = [_optimizer_bytes(planned, name, trained[name]) for name in training]
        return Held(
            step=step,
            frozen=0,
            trained=sum(_bytes(trained[name]) for name in needed),
            buffers=sum(_own_buffers(roles[name]) for name in needed),
            gradients=gradients,
            optimizers=max(states, default=0) if planned.recipe.train.offload_optimizers else sum(states),
            averages=0,
        )

    moments = {0, steps - 1, *(first for first, _ in spans.values()), *(first + count - 1 for first, count in spans.values())}
    return max((at(step) for step in sorted(moments) if 0 <= step < steps), key=lambda found: found.total)


def _optimizer_bytes(planned: Plan, role: str, parameters: Sequence[Tensor]) -> int:
    """Adam: two moments and a counter of each parameter; in 8 bits with a scale for each 256, but for small parameters, and two tables of 256
    numbers; SGD: its momentum."""
    block = planned.optimizers[role]
    if block.name == "sgd":
        return _bytes(parameters) if block.betas[0] else 0
    if block.name == "adamw8bit":
        counts = [parameter.numel() for parameter in parameters]
        return sum(8 * n if n < 4096 else 2 * n + 8 * math.ceil(n / 256) for n in counts) + (2048 if max(counts, default=0) >= 4096 else 0)
    return 2 * _bytes(parameters) + 4 * len(parameters)


def _own_buffers(role: Role) -> int:
    return _bytes(role.denoiser.buffers()) if _has_copy(role) else 0


def _frozen_buffers(roles: Mapping[str, Role]) -> int:
    buffers = {id(b): b for role in roles.values() if not _has_copy(role) for b in role.denoiser.buffers()}
    return _bytes(buffers.values())


def _has_copy(role: Role) -> bool:
    """Whether its network is a copy of the teacher's, rather than the one that roles share."""
    return role.spec.trains_network and role.denoiser.adapter is None


def data_bytes(planned: Plan) -> int:
    """Text embeddings of every prompt and of the negative one, latents of every image, pairs, and the tables that they are drawn by. Of a store
    the tables alone: what of it fits into memory is read into it, and nothing has to."""
    family, images, pairs, block = planned.family, planned.images, planned.pairs, planned.recipe.data
    texts, samples = prompt_weights(planned.prompts, images), [4 * math.prod(each.latent.shape) for each in planned.families]
    held = block.encode == "ahead" and (block.store is None or block.keep == "memory")
    of_one = conditioning.to(family.meta_conditioning(1), dtype=DTYPES[block.dtype])
    total = _conditioning(family.meta_conditioning(1)) + 8 * len(texts) + held * len(texts) * _conditioning(of_one)
    if images is not None:
        counts = [len(part) for part in planned.divided or (images,)]
        of_all = sum(count * sample for count, sample in zip(counts, samples, strict=True))
        total += held * of_all * DTYPES[block.dtype].itemsize // 4 + sum(16 * len(captions) for captions in images.captions)
    asked = block.pairs_asked
    if asked is not None:  # a row and a seed for each; those of a folder where they are kept in memory
        counts = [pairs_of(planned, place) for place in range(len(samples))] if pairs is None else [pairs.count]
        held = (block.store is None and pairs is None) or block.keep == "memory"
        total += sum(count * (16 + held * sample * DTYPES[block.dtype].itemsize // 4) for count, sample in zip(counts, samples, strict=True))
    return total


def _conditioning(cond: Conditioning) -> int:
    return _bytes(cond.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
