"""What is done to experts that are there: copies of useful ones (expert upcycling, arXiv:2604.19835), removal of those that nobody asks for; and the
dense network of the same activated size, which experts have to beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from fastgen_kernels.moe_ffn import is_gated
from torch import Tensor, nn

from fastgen.rng import seeded
from fastgen.surgery.moe.convert import to_convert
from fastgen.surgery.moe.importance import Importance
from fastgen.surgery.moe.layer import ExpertLayer, Router, Shared, expert_layers
from fastgen.surgery.moe.split import Experts, select, sizes
from fastgen.surgery.moe.structures import Structure

Utility = dict[str, Tensor]  # a layer's name: its experts', (E,), fp32 or wider


def weight_utility(network: nn.Module) -> Utility:
    """The Euclidean norm of each expert's weights and biases."""
    return {layer.name: _squares([p.detach() for p in _weights(layer)]).sqrt() for layer in expert_layers(network)}


def gradient_utility(network: nn.Module, batches: Iterable[Callable[[], Tensor]]) -> Utility:
    """||g_e||^2 of the gradient's mean over batches: the paper's best. batches: each runs the network on one and returns its scalar loss.

    Frozen experts have one too; nobody's `grad` changes. ValueError without batches.
    """
    layers = expert_layers(network)
    sums: list[list[Tensor]] = [[torch.zeros_like(p, dtype=_wide(p)) for p in _weights(layer)] for layer in layers]
    count = 0
    for loss in batches:
        with torch.enable_grad(), _with_gradients([p for layer in layers for p in _weights(layer)]) as parameters:
            grads = iter(torch.autograd.grad(loss(), parameters, allow_unused=True))
        for each in sums:
            each[:] = [total if (grad := next(grads)) is None else total + grad for total in each]
        count += 1
    if not count:
        raise ValueError("batches: none; utility is measured on at least one")
    return {layer.name: _squares(each) / count**2 for layer, each in zip(layers, sums, strict=True)}


@contextmanager
def _with_gradients(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield parameters
    finally:
        for p, old in zip(parameters, before, strict=True):
            p.requires_grad_(old)


def upcycle(network: nn.Module, utility: Mapping[str, Tensor], *, factor: int = 2, most: int = 3, noise: float = 1e-3, seed: int = 0) -> None:
    """`factor` times as many experts in every layer: each copy goes to the expert with the most utility for each of its copies so far, which are at
    most `most`, itself included. Copies come last, with their original's router row, and a selection bias up to `noise` beside it.

    Where every expert has as many copies, and a token uses `factor` times as many experts as before, nothing has changed: gates keep their scale,
    so that copies share their original's. With as many experts a token as before the network is another one, as in the paper, and is trained on;
    what an optimizer knows of the old weights is void. ValueError for a factor that cannot be, before anything is changed.
    """
    if not 1 <= factor <= most:
        raise ValueError(f"factor: {factor} times as many experts, at most {most} of each; allowed: 1 to {most} times as many")
    for layer in expert_layers(network):
        copies = _copies(utility[layer.name].tolist(), (factor - 1) * layer.num_experts, most)
        with seeded(seed, "expert upcycling", layer.name):
            moved = noise * (2 * torch.rand(len(copies)) - 1)
        first = layer.num_experts
        _take(layer, [*range(first), *copies])
        layer.selection_bias.data[first:] += moved.to(layer.selection_bias)


def _copies(utility: Sequence[float], num: int, most: int) -> list[int]:
    replicas = [1] * len(utility)
    copies: list[int] = []
    for _ in range(num):
        best = max((e for e in range(len(utility)) if replicas[e] < most), key=lambda e: (utility[e] / replicas[e], -e))
        replicas[best] += 1
        copies.append(best)
    return copies


def remove(network: nn.Module, counts: Mapping[str, Tensor], below: float = 0.05, *, at_least: int = 1) -> dict[str, list[int]]:
    """Remove experts whose load was less than `below` of the even one, 1 / E, and return which, by layer; counts: of recorded routings, over all
    processes (`moe.counts`). As many stay as a token uses, and `at_least` so many.

    The router goes on knowing them, a row each, so that the others' gates stay: removing an expert that is never chosen changes nothing.
    ValueError for a threshold that is none and for layers without counts, before anything is changed.
    """
    layers = expert_layers(network)
    unknown = [layer.name for layer in layers if layer.name not in counts]
    if not 0 < below <= 1 or unknown:
        raise ValueError(f"below: {below}; allowed: above 0, at most 1" if not unknown else f"counts: none of {unknown[0]}")
    removed: dict[str, list[int]] = {}
    for layer in layers:
        load = counts[layer.name] / counts[layer.name].sum().clamp(min=1)
        most_used = load.argsort(descending=True, stable=True).tolist()[: max(at_least, _most_active(layer))]
        is_dead = (load * layer.num_experts < below).tolist()
        dead = [e for e in range(layer.num_experts) if is_dead[e] and e not in most_used]
        if dead:
            _take(layer, [e for e in range(layer.num_experts) if e not in dead], dead)
            removed[layer.name] = dead
    return removed


def _most_active(layer: ExpertLayer) -> int:
    numbers = [layer.active] if isinstance(layer.active, int | float) else layer.active
    return max(1, math.ceil(max(numbers)))


class Size(NamedTuple):
    """How many experts a layer has, for how many more its router has rows, and whether a selection bias is among its parameters."""

    experts: int
    removed: int
    has_bias: bool


def sizes_of(network: nn.Module) -> dict[str, Size]:
    """Of each layer, by its name."""

    def size(layer: ExpertLayer) -> Size:
        return Size(layer.num_experts, layer.router.out_features - layer.num_experts, isinstance(layer.selection_bias, nn.Parameter))

    return {layer.name: size(layer) for layer in expert_layers(network)}


def give_sizes(network: nn.Module, given: Mapping[str, Sequence[int]]) -> None:
    """Have as many experts in each layer as given (`sizes_of` of another), so that other weights can be loaded."""
    for layer in expert_layers(network):
        num, removed, has_bias = given[layer.name]
        _take(layer, [0] * num, [0] * removed, behind=False)
        if has_bias:
            learn_bias(layer)


def resize(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Have as many experts in each layer as a converted network with this state has, so that it can be loaded after experts were added or removed."""
    for name, module in network.named_modules():
        if isinstance(module, ExpertLayer):
            num, rows = len(state[f"{name}.w1"]), len(state[f"{name}.router.weight"])
            _take(module, [0] * num, [0] * (rows - num), behind=False)


def learn_bias(layer: ExpertLayer) -> None:
    """Make the layer's selection bias a parameter, so that whatever keeps, averages and takes over parameters has it; no gradient reaches it."""
    bias = layer.selection_bias
    if not isinstance(bias, nn.Parameter):
        del layer.selection_bias
        layer.selection_bias = nn.Parameter(bias)


@torch.no_grad()
def _take(layer: ExpertLayer, experts: list[int], removed: Sequence[int] = (), *, behind: bool = True) -> None:
    """The layer with these of its experts, which may stand there twice; rows of removed ones, and of those removed before, come last."""
    rows = [*experts, *removed, *(range(layer.num_experts, layer.router.out_features) if behind else ())]
    for name in ("w1", "b1", "w2"):
        old = getattr(layer, name)
        if old is not None:
            setattr(layer, name, nn.Parameter(old[experts], old.requires_grad))
    router = Router(layer.router.in_features, len(rows), layer.router.weight)
    router.weight = nn.Parameter(layer.router.weight[rows], layer.router.weight.requires_grad)
    layer.router = router.train(layer.training)
    bias = layer.selection_bias[experts]
    layer.selection_bias = nn.Parameter(bias) if isinstance(layer.selection_bias, nn.Parameter) else bias
    layer.num_experts = len(experts)


def prune(network: nn.Module, blocks: Iterable[nn.Module], experts: Experts, importance: Importance, leave: Sequence[str] = ()) -> list[str]:
    """Each feed-forward layer with its most important neurons alone, as many as a token uses once it is split into `experts`, and return which
    layers: dense, no router, the same activated size but for that. Arguments and errors are those of `convert`, and it is as final."""
    layers = to_convert(network, blocks, experts, leave)
    for layer in layers:
        shared, routed = sizes(layer.hidden, experts, layer.name)
        _prune(layer, importance[layer.name].argsort(descending=True, stable=True)[: round(shared + experts.active * routed)])
    return [layer.name for layer in layers]


def _prune(structure: Structure, neurons: Tensor) -> None:
    dense = structure.dense()
    kept = Shared(select(dense, neurons, gated=is_gated(structure.activation))._replace(b2=dense.b2), structure.activation)
    structure.place(kept.requires_grad_(structure.down.weight.requires_grad).train(structure.down.training))


def _weights(layer: Any) -> list[nn.Parameter]:
    return [p for p in (layer.w1, layer.b1, layer.w2) if p is not None]


def _squares(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.to(_wide(part)).square().flatten(1).sum(1) for part in parts]).sum(0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
