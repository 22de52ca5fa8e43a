"""What a network has and what one image costs, by kind of layer; of a dense network or of one that was converted, and on the meta device too.

FLOPs are two for each multiplication with its addition, in linear and convolution layers, experts and scaled dot products; norms, activations,
linear attention's products and masks, which save nothing here, are left out. Blocks in groups count by how many of their group a sample keeps,
whichever these are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgen.surgery.moe.blocks import block_routers, grouped_blocks, keeping_all
from fastgen.surgery.moe.layer import ExpertLayer, Shared, expert_layers
from fastgen.surgery.moe.modulation import Common, is_adaptive_norm
from fastgen.surgery.moe.structures import Structure, walk

Kind = Literal["feed-forward", "router", "attention", "attention products", "modulation", "outside blocks"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass
class Cost:
    """parameters: all of them; active: those that one token uses, experts and blocks in groups by their number; flops: of one call."""

    parameters: int = 0
    active: float = 0.0
    flops: float = 0.0


Account = dict[Kind, Cost]
# A parameter's kinds, each with its share of it and the fraction of that which one token uses.
Shares = list[tuple[Kind, float, float]]


def account(network: nn.Module, blocks: Iterable[nn.Module], call: Callable[[], Any] | None = None) -> Account:
    """Costs by kind. call: runs the network once, on one image, for the FLOPs, which are 0 without it; tensors of the meta device will do.

    Attention is what blocks hold that is nothing else: projections, and norms with weights. Modulation is blocks' own adaptive norms and tables,
    and what `slim` has them share; what else all blocks share lies outside. A layer that fuses attention and feed-forward in a way that
    `structures` does not know is attention's.
    """
    shares = _shares(network, list(blocks))
    costs: Account = {kind: Cost() for kind in KINDS}
    for parameter in network.parameters():
        for kind, share, active in shares[id(parameter)]:
            costs[kind].parameters += round(share * parameter.numel())
            costs[kind].active += share * active * parameter.numel()
    for kind, flops in _flops(network, call, shares).items() if call is not None else ():
        costs[kind].flops = flops
    return costs


def total(costs: Account, without: Iterable[Kind] = ()) -> Cost:
    """The sum over kinds, but for some."""
    kept = [cost for kind, cost in costs.items() if kind not in tuple(without)]
    return Cost(sum(cost.parameters for cost in kept), sum(cost.active for cost in kept), sum(cost.flops for cost in kept))


def _shares(network: nn.Module, blocks: list[nn.Module]) -> Mapping[int, Shares]:
    shares: dict[int, Shares] = {id(p): [("outside blocks", 1.0, 1.0)] for p in network.parameters()}

    def put(parameters: Iterable[nn.Parameter], kind: Kind, active: float = 1.0) -> None:
        shares.update({id(p): [(kind, 1.0, active)] for p in parameters})

    for block in blocks:
        put(block.parameters(), "attention")
        for name, module in block.named_modules():
            if _modulates(name, module):
                put(module.parameters(), "modulation")
        put((p for name, p in block.named_parameters() if name.endswith("scale_shift_table")), "modulation")
    for structure, name in walk(network, blocks, strict=False):
        if structure is not None:
            _put_dense(shares, structure)
        elif not isinstance(network.get_submodule(name), (nn.Linear, ExpertLayer)):
            put(network.get_submodule(name).parameters(), "feed-forward")
    for module in network.modules():
        if isinstance(module, Shared):  # alone, where a network was pruned
            put(module.parameters(), "feed-forward")
        elif isinstance(module, Common):
            put(module.parameters(), "modulation")
    for layer in expert_layers(network):
        put(layer.parameters(), "feed-forward")
        put(layer.router.parameters(), "router")
        put(layer.parameters(recurse=False), "feed-forward", _mean_active(layer) / layer.num_experts)
        put((p for p in (layer.selection_bias,) if isinstance(p, nn.Parameter)), "router")
    for block, router in grouped_blocks(network):
        kept = router.kept / router.size
        shares.update({id(p): [(kind, share, kept * active) for kind, share, active in shares[id(p)]] for p in block.parameters()})
    for router in block_routers(network):
        put(router.parameters(), "router")
    return shares


def _put_dense(shares: dict[int, Shares], structure: Structure) -> None:
    down = structure.down
    for layer in (*structure.up, down):
        shares.update({id(p): [("feed-forward", 1.0, 1.0)] for p in layer.parameters()})
    if structure.above:
        (up,) = structure.up
        shares.update({id(p): _fused(structure.above / up.out_features) for p in up.parameters()})
    if structure.beside:
        shares.update({id(p): [("attention", 1.0, 1.0)] for p in down.parameters()})  # its bias
        shares[id(down.weight)] = _fused(structure.beside / down.in_features)


def _fused(attention: float) -> Shares:
    return [("attention", attention, 1.0), ("feed-forward", 1 - attention, 1.0)]


def _modulates(name: str, module: nn.Module) -> bool:
    return is_adaptive_norm(module) or name.rpartition(".")[2] in ("img_mod", "txt_mod", "adaLN_modulation")


def _mean_active(layer: ExpertLayer) -> float:
    return float(layer.active) if isinstance(layer.active, int | float) else sum(layer.active) / len(layer.active)


def _flops(network: nn.Module, call: Callable[[], Any], shares: Mapping[int, Shares]) -> Mapping[Kind, float]:
    counter = _Counter()

    def of_layer(layer: Any, _inputs: Any, output: Tensor) -> None:
        each = layer.weight.numel() // layer.weight.shape[0]  # of one number of the output
        for kind, share, _ in shares[id(layer.weight)]:
            counter.add(kind, 2 * share * output.numel() * each)

    def of_experts(layer: ExpertLayer, _inputs: Any, output: Tensor) -> None:
        tokens, each = output.numel() // layer.w2.shape[1], layer.w1[0].numel() + layer.w2[0].numel()
        counter.add("feed-forward", 2 * tokens * _mean_active(layer) * each)

    with ExitStack() as stack, torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                stack.callback(module.register_forward_hook(of_layer).remove)
            elif isinstance(module, ExpertLayer):
                stack.callback(module.register_forward_hook(of_experts).remove)
        for module, kept in _fractions(network):
            stack.callback(module.register_forward_pre_hook(partial(counter.enter, kept)).remove)
            stack.callback(module.register_forward_hook(counter.leave).remove)
        stack.enter_context(keeping_all(network))
        stack.enter_context(_Attention(counter))
        call()
    return counter.flops


class _Counter:
    """Adds FLOPs up, those inside a block in a group by the fraction of the group that a sample keeps."""

    def __init__(self) -> None:
        self.flops: dict[Kind, float] = defaultdict(float)
        self.fractions = [1.0]

    def add(self, kind: Kind, flops: float) -> None:
        self.flops[kind] += self.fractions[-1] * flops

    def enter(self, fraction: float, *_: Any) -> None:
        self.fractions.append(fraction)

    def leave(self, *_: Any) -> None:
        self.fractions.pop()


def _fractions(network: nn.Module) -> list[tuple[nn.Module, float]]:
    """Blocks in groups, and routers inside them, which always run."""
    blocks: list[tuple[nn.Module, float]] = [(block, router.kept / router.size) for block, router in grouped_blocks(network)]
    return blocks + [(router, 1.0) for router in block_routers(network)]


class _Attention(TorchFunctionMode):
    """Counts the two products of each `F.scaled_dot_product_attention`."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            q, k, v = named["query"], named["key"], named["value"]
            self.counter.add("attention products", 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]))
        return func(*args, **(kwargs or {}))
