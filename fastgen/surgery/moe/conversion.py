"""A student of experts beside its dense teacher: what a recipe's `student.moe` comes to (Dense2MoE, arXiv:2510.09094)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from fastgen.errors import UserError
from fastgen.rng import seeded
from fastgen.surgery.moe import importance as neurons
from fastgen.surgery.moe.accounting import KINDS, Account, total
from fastgen.surgery.moe.blocks import Groups, block_routers, mix_blocks
from fastgen.surgery.moe.capacity import Capacity, capacity_of, follow
from fastgen.surgery.moe.convert import convert, to_convert
from fastgen.surgery.moe.importance import Importance
from fastgen.surgery.moe.layer import Router, expert_layers, set_active
from fastgen.surgery.moe.modulation import Slim, find_modulation, slim, slim_layers
from fastgen.surgery.moe.operators import give_sizes, learn_bias, sizes_of
from fastgen.surgery.moe.split import Experts
from fastgen.surgery.moe.structures import KEY, Structure, walk

EXPERTS = Experts()
Measure = Literal["taylor", "magnitude", "random"]


@dataclass(frozen=True)
class Conversion:
    """How a dense network becomes one of experts. blocks: places of those whose layers are split, in the family's order; None: all. leave: ends of
    names of layers that stay dense. importance: what neurons are sorted by; batches: how many it is measured on, where it is measured.
    router_std: standard deviation of routers' weights at the start, for inputs of unit variance: divided by the square root of the width.
    balance: weight of the balance loss. bias_rate: of `even_out` after each step, 0 for none. seed: of routers and random importance. groups: of
    which list of blocks, by its name, or "" for all, and how; slim: what becomes of the blocks' modulation. capacity: what the number of experts
    follows, whose mean is `experts.active`; None where it is the same at all times. sizes: of a student that another run's takes the place of, where
    experts were added or removed since the split, how many each layer has, by roles (`operators.sizes_of`)."""

    experts: Experts = EXPERTS
    blocks: tuple[int, ...] | None = None
    leave: tuple[str, ...] = ()
    importance: Measure = "taylor"
    batches: int = 8
    router_std: float = 0.0
    balance: float = 0.01
    seed: int = 0
    bias_rate: float = 0.0
    groups: tuple[tuple[str, Groups], ...] = ()
    slim: Slim | None = None
    capacity: Capacity | None = None
    sizes: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)

    def chosen(self, blocks: Sequence[nn.Module]) -> list[nn.Module]:
        """Of a network's blocks those whose layers are split; UserError for one that is not there."""
        for place in self.blocks or ():
            if place >= len(blocks):
                raise UserError(f"{KEY}.blocks: no block {place}; the teacher's are 0 to {len(blocks) - 1}")
        return list(blocks) if self.blocks is None else [blocks[place] for place in self.blocks]

    def layers(self, network: nn.Module, blocks: Sequence[nn.Module]) -> list[Structure]:
        """The layers that are split; blocks: all of the network's. UserError, which names the module, where one cannot be."""
        return to_convert(network, self.chosen(blocks), self.at_the_split, self.leave)

    def check_leave(self, network: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """UserError for an end in `leave` that leaves nothing of a dense network as it is: no feed-forward layer lies there, nor, where these are
        changed too, a block or its modulation."""
        names = [name for _, name in walk(network, self.chosen(blocks), strict=False)]
        if self.groups:
            names += [name for name, module in network.named_modules() if any(module is block for block in blocks)]
        if self.slim is not None:
            names += [each.name for each in find_modulation(network, blocks)]
        parts = [name for name, _ in network.named_modules() if any(name.startswith(f"{found}.") for found in names)]  # of a block with one inside
        for end in self.leave:
            if not any(_lies_in(name, end) for name in (*names, *parts)):
                known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
                raise UserError(f"{KEY}.leave: no layer in question has a name that ends in {end!r}; names here end in {known}")

    @property
    def at_the_split(self) -> Experts:
        """Of which a token may use more later."""
        return replace(self.experts, active=min(self.experts.active, self.experts.num)) if self.sizes else self.experts

    def without_measuring(self, network: nn.Module, blocks: Sequence[nn.Module]) -> Importance:
        """Importance that asks for no data: that of magnitude or random, else zeros, which leave neurons in their order."""
        layers = self.layers(network, blocks)
        if self.importance == "magnitude":
            return neurons.magnitude(layers)
        return neurons.random(layers, self.seed) if self.importance == "random" else _in_order(layers)


@torch.no_grad()
def converted(
    dense: nn.Module, blocks: Sequence[nn.Module], conversion: Conversion, importance: Importance | None = None, role: str = "student"
) -> nn.Module:
    """A network of experts beside `dense`, which stays as it is; blocks: all of the dense network's. importance: None where the weights come from
    elsewhere, which bring their split with them. role: whose sizes these are, where there are several."""
    places = {id(block): name for name, block in dense.named_modules()}
    network = copy.deepcopy(dense)
    own = [network.get_submodule(places[id(block)]) for block in blocks]
    importance = _in_order(conversion.layers(network, own)) if importance is None else importance
    for layer in convert(network, conversion.chosen(own), conversion.at_the_split, importance, conversion.leave):
        _begin_router(layer.router, layer.name, conversion)
        if conversion.bias_rate:
            learn_bias(layer)
    if role in conversion.sizes:
        give_sizes(network, conversion.sizes[role])
    use(network, conversion.experts.active, conversion.capacity)
    if conversion.slim is not None:
        slim(network, own, conversion.slim, conversion.leave)
    for name, groups in conversion.groups:
        for router in mix_blocks(network, _in_list(network, own, name), groups, conversion.leave):
            _begin_router(router.tokens, f"{router.name}, tokens", conversion)
            _begin_router(router.modulation, f"{router.name}, modulation", conversion)
    keep_routers_wide(network)
    return network


def use(network: nn.Module, active: float, capacity: Capacity | None) -> None:
    """How many experts tokens use; UserError where a layer has fewer."""
    ends = () if capacity is None else (capacity.at_noise, capacity.at_data)
    for layer in expert_layers(network):
        for key, number in [("active", active), *(("capacity", end) for end in ends)]:
            if number > layer.num_experts:
                raise UserError(f"{KEY}.{key}: {number:g} of {layer.num_experts} experts ({layer.name}); allowed: 0 to {layer.num_experts}")
    set_active(network, active)
    if capacity is not None:
        follow(network, capacity)


def _in_list(network: nn.Module, blocks: Sequence[nn.Module], name: str) -> list[nn.Module]:
    """The blocks that lie in the list of this name; all without one."""
    lists = {each for each, module in network.named_modules() if isinstance(module, nn.ModuleList) and any(one in blocks for one in module)}
    if name and name not in lists:
        raise UserError(f"{KEY}.groups.of: no list of blocks {name!r}; {type(network).__name__} has {', '.join(sorted(lists))}")
    return [block for block in blocks if not name or any(block is one for one in network.get_submodule(name).children())]


def _lies_in(name: str, end: str) -> bool:
    """Whether the name, or that of a module around it, has this end."""
    parts = name.split(".")
    return any(f".{'.'.join(parts[: i + 1])}".endswith(f".{end}") for i in range(len(parts)))


def _in_order(layers: Sequence[Structure]) -> Importance:
    return {layer.name: torch.zeros(layer.hidden) for layer in layers}


def _begin_router(router: Router, name: str, conversion: Conversion) -> None:
    if conversion.router_std == 0 or router.weight.is_meta:
        return
    with seeded(conversion.seed, "router", name):
        noise = torch.randn(router.weight.shape)
    router.weight.copy_(noise * conversion.router_std / router.in_features**0.5)


def keep_routers_wide(network: Any) -> None:
    """Have diffusers and exports leave routers in fp32, whatever the dtype of the rest."""
    network._keep_in_fp32_modules = [*(getattr(network, "_keep_in_fp32_modules", None) or ()), "router", "selection_bias"]


def summary(network: nn.Module, costs: Account, dense: Account) -> dict[str, Any]:
    """What a network of experts has, which may be a meta network, as JSON has it: `layers`, and what they have in common (`experts`, `active`,
    `choice`; of several values the first layer's); `parameters`, `active_parameters` of a token, `dense_parameters` before; `flops` of one
    evaluation on one sample, `dense_flops`. costs, dense: accounts of it and of the dense network."""
    layers, ours, theirs = expert_layers(network), total(costs), total(dense)
    first = layers[0]
    assert isinstance(first.active, int | float)
    routers, slimmed = block_routers(network), slim_layers(network)
    more: dict[str, Any] = {"grouped_blocks": sum(r.size for r in routers), "kept_blocks": sum(r.kept for r in routers)} if routers else {}
    more |= {"modulation_rank": slimmed[0][2]} if slimmed else {}
    sizes, split = sizes_of(network).values(), sum(round(layer.gate_scale) for layer in layers)
    if any(size.removed for size in sizes) or sum(size.experts for size in sizes) != split:
        more |= {"all_experts": sum(size.experts for size in sizes), "split_experts": split, "removed_experts": sum(size.removed for size in sizes)}
    if (capacity := capacity_of(network)) is not None:
        more["capacity"] = {"noise": capacity.at_noise, "data": capacity.at_data}
    return {
        "layers": len(layers),
        "experts": first.num_experts,
        "active": float(first.active),
        "choice": first.choice,
        "parameters": ours.parameters,
        "active_parameters": round(ours.active),
        "dense_parameters": theirs.parameters,
        "flops": round(ours.flops),
        "dense_flops": round(theirs.flops),
        **more,
    }


def in_words(found: dict[str, Any]) -> str:
    """A `summary` in one line."""
    active = f"{found['active']:g}{' on average' if found['choice'] == 'expert' else ''}"
    if "capacity" in found:
        active += f" (from {found['capacity']['noise']:g} at noise to {found['capacity']['data']:g} at data)"
    who = f"1 shared and {active} of {found['experts']} routed experts a token in {found['layers']} feed-forward layers"
    if "all_experts" in found:
        who += (
            f" ({found['all_experts']} in all after {found['removed_experts']} were removed, copies and all; {found['split_experts']} at the split)"
        )
    if "grouped_blocks" in found:
        who += f", {found['kept_blocks']} of {found['grouped_blocks']} blocks in groups a sample"
    if "modulation_rank" in found:
        who += f", modulation of rank {found['modulation_rank']}"
    active = f"{found['active_parameters']:,} of {found['parameters']:,} parameters active (dense: {found['dense_parameters']:,})"
    return f"{who}, {active}, {flops_in_words(found['flops'])} an evaluation (dense: {flops_in_words(found['dense_flops'])})"


def flops_in_words(flops: float) -> str:
    """In the largest unit of which there is one."""
    unit, size = next((pair for pair in (("T", 1e12), ("G", 1e9)) if flops >= pair[1]), ("M", 1e6))
    return f"{flops / size:.4g} {unit}FLOPs"


def by_kind(costs: Account, dense: Account) -> dict[str, dict[str, dict[str, float]]]:
    """Two accounts of one network, before and after, as JSON has them: by kind of layer what is not 0."""
    rows = {kind: {"dense": dense[kind], "student": costs[kind]} for kind in KINDS if costs[kind].parameters or costs[kind].flops}
    return {kind: {whose: {**asdict(cost), "active": round(cost.active)} for whose, cost in row.items()} for kind, row in rows.items()}
