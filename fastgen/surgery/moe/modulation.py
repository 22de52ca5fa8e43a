"""AdaLN slimming: the linear layers with which each block makes its shifts, scales and gates, 3.2 of FLUX.1's 11.9 billion parameters, made small.

Dense2MoE's reported sizes (arXiv:2510.09094) need something like it, but no source says what: these are two obvious ways, both of which begin
beside the dense layers W_l y + b_l, as close as their number of parameters allows in the Frobenius norm, and are trained from there.

- low rank: (U_l V_l) y + b_l, of each weight's largest singular values;
- shared: (W + U_l V_l) y + b_l, W the mean over the blocks of one list at one place in them, U_l V_l of what is left, or nothing (rank 0).

With full rank both are the dense layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import UserError

KEY = "recipe key student.moe.modulation"


@dataclass(frozen=True)
class Slim:
    """rank: of each block's own part; shared: beside one layer for each list of blocks."""

    rank: int
    shared: bool = False


class LowRank(nn.Module):
    """up(down(y)): (…, D) -> (…, D'), `up` with the dense layer's bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rank: int) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        up, down = _factors(weight, rank)
        self.down, self.up = _linear(down, None), _linear(up, bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.up(self.down(input))


class Common(nn.Module):
    """The layers that blocks share, in the network itself, by number: a parameter has one name there."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()


class BesideCommon(nn.Module):
    """The common layer, and the block's own part: its low rank, or its bias alone."""

    def __init__(self, common: Common, index: int, residual: Tensor, bias: Tensor | None, rank: int) -> None:
        super().__init__()
        self.out_features, self.in_features = residual.shape
        self.common = (common, index)  # in a tuple it is not a submodule of every block
        self.own = LowRank(residual, bias, rank) if rank else None
        self.bias = nn.Parameter(bias.clone()) if bias is not None and not rank else None

    def forward(self, input: Tensor) -> Tensor:
        common, index = self.common
        out = common.layers[index](input)
        out = out if self.own is None else out + self.own(input)
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True)
class Modulation:
    """One linear layer. name: in the network; place: of its block's list, and in the block."""

    name: str
    place: tuple[str, str]
    layer: nn.Linear


def find_modulation(network: nn.Module, blocks: Iterable[nn.Module], leave: Sequence[str] = ()) -> list[Modulation]:
    """The blocks' modulation layers; UserError, which names the module, for blocks that have none of their own, as where a table is added to what
    one layer makes for all (PixArt, Sana, Wan, FLUX.2), and for layers that are not plain. leave: ends of names of layers that stay."""
    inside = {id(block) for block in blocks}
    found: list[Modulation] = []
    for name, block in network.named_modules():
        if id(block) not in inside:
            continue
        layers = [(place, layer) for place, layer in block.named_modules() if _makes_modulation(block, place)]
        if not layers:
            what = (
                "adds a scale_shift_table to it" if any(key.endswith("scale_shift_table") for key, _ in block.named_parameters()) else "is given it"
            )
            raise UserError(f"{KEY}: {name} ({type(block).__name__}) has no layer that makes its modulation; it {what}, so there is nothing to slim")
        for place, layer in layers:
            if any(f".{name}.{place}".endswith(f".{end}") for end in leave):
                continue
            if type(layer) is not nn.Linear:
                raise UserError(
                    f"{KEY}: {name}.{place} is a {type(layer).__name__}; merge adapters, and slim once, before weights are held otherwise"
                )
            found.append(Modulation(f"{name}.{place}", (name.rpartition(".")[0], place), layer))
    if not found:
        raise UserError(f"{KEY}: {type(network).__name__} has no modulation layer in its blocks that is not left as it is")
    return found


# Adaptive norms keep their layer under this name; where norms are not adaptive, blocks keep sequences that end in it.
_SEQUENCES = ("img_mod", "txt_mod", "adaLN_modulation")


def _makes_modulation(block: nn.Module, place: str) -> bool:
    parent, _, last = place.rpartition(".")
    owner: Any = block.get_submodule(parent)
    if parent.rpartition(".")[2] in _SEQUENCES and isinstance(owner, nn.Sequential):
        return last == str(len(owner) - 1)
    return last == "linear" and is_adaptive_norm(owner)


def is_adaptive_norm(module: nn.Module) -> bool:
    kind = type(module).__name__
    return "AdaLayerNorm" in kind or "AdaNorm" in kind or kind == "LuminaRMSNormZero"


@torch.no_grad()
def slim(network: nn.Module, blocks: Iterable[nn.Module], how: Slim, leave: Sequence[str] = ()) -> list[str]:
    """Replace the blocks' modulation layers, for good, and return their names; UserError as from `find_modulation`, and for a rank that a layer
    does not have. Frozen weights stay frozen; a network of the meta device may be slimmed as well."""
    layers = find_modulation(network, blocks, leave)
    for each in layers:
        full = min(each.layer.weight.shape)
        if not (0 if how.shared else 1) <= how.rank <= full:
            raise UserError(f"{KEY}: rank {how.rank}; {each.name} has {full}; allowed: {'0' if how.shared else '1'} to {full}")
    if how.shared:
        _share(network, layers, how.rank)
    else:
        for each in layers:
            _place(network, each, LowRank(each.layer.weight, each.layer.bias, how.rank))
    return [each.name for each in layers]


def _share(network: Any, layers: list[Modulation], rank: int) -> None:
    network.common_modulation = common = Common()
    places: dict[Any, list[Modulation]] = defaultdict(list)
    for each in layers:
        places[each.place, each.layer.weight.shape].append(each)
    for index, members in enumerate(places.values()):
        wide = torch.promote_types(members[0].layer.weight.dtype, torch.float32)
        mean = torch.stack([each.layer.weight.to(wide) for each in members]).mean(0).to(members[0].layer.weight.dtype)
        common.layers.append(_linear(mean, None).requires_grad_(members[0].layer.weight.requires_grad))
        for each in members:
            _place(network, each, BesideCommon(common, index, each.layer.weight - mean, each.layer.bias, rank))


def slim_layers(network: nn.Module) -> list[tuple[str, int | None, int]]:
    """Of each slim layer its name, the number of the layer that it shares, None for none, and the rank of its own part."""
    found: list[tuple[str, int | None, int]] = []
    for name, module in network.named_modules():
        if isinstance(module, BesideCommon):
            found.append((name, module.common[1], 0 if module.own is None else module.own.down.out_features))
        elif isinstance(module, LowRank) and not isinstance(network.get_submodule(name.rpartition(".")[0]), BesideCommon):
            found.append((name, None, module.down.out_features))
    return found


def slim_like(network: Any, layers: Sequence[tuple[str, int | None, int]]) -> None:
    """Make linear layers slim as `slim_layers` says, without anything of their weights, for those are loaded."""
    common = Common()
    for name, index, rank in layers:
        layer = network.get_submodule(name)
        weight, bias = (None if each is None else torch.empty_like(each, device="meta") for each in (layer.weight, layer.bias))
        assert weight is not None
        if index is None:
            module: nn.Module = LowRank(weight, bias, rank)
        else:
            while len(common.layers) <= index:
                common.layers.append(_linear(weight, None).to_empty(device=layer.weight.device).requires_grad_(layer.weight.requires_grad))
            module = BesideCommon(common, index, weight, bias, rank)
        _place(network, Modulation(name, ("", ""), layer), module.to_empty(device=layer.weight.device))
    if len(common.layers):
        network.common_modulation = common


def _place(network: nn.Module, each: Modulation, module: nn.Module) -> None:
    module.requires_grad_(each.layer.weight.requires_grad).train(each.layer.training)
    network.set_submodule(each.name, module)


def _factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(D', r) and (r, D) whose product is the nearest of that rank, with singular values shared evenly between them."""
    u, s, v = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).to(weight.dtype), (root[:, None] * v[:rank]).to(weight.dtype)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer
