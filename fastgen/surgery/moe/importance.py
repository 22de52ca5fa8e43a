"""How much each hidden neuron of a feed-forward layer counts: what decides where it goes when the layer is split.

`taylor` is the paper's: the first-order change of the loss when a weight is removed is w dL/dw. Summed with its sign over a neuron's output
column it is the sum over tokens of a dL/da of the neuron's activation a, exactly, so that no weight's gradient is needed:
sum_i W2[i, j] dL/dW2[i, j] = sum_t a[t, j] dL/da[t, j].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from fastgen_kernels.moe_ffn import is_gated
from torch import Tensor

from fastgen.rng import seeded
from fastgen.surgery.moe.structures import Structure

Importance = dict[str, Tensor]  # a layer's name: its neurons', (H,), fp32 or wider


def taylor(layers: Sequence[Structure], batches: Iterable[Callable[[], Tensor]]) -> Importance:
    """The mean over batches of |sum over tokens of a dL/da|. batches: each runs the network on one and returns its scalar loss.

    No parameter need have a gradient, and none gets one. A neuron that the loss does not depend on has importance 0, as those of a last text
    stream whose output nobody reads. ValueError without batches.
    """
    total: Importance = {}
    count = 0
    for loss in batches:
        with torch.enable_grad(), _activations(layers) as seen:
            value = loss()
            taken = {name: tuple(parts) for name, parts in seen.items()}  # blocks that are computed again for the gradient pass here once more
            grads = iter(torch.autograd.grad(value, [a for parts in taken.values() for a in parts], allow_unused=True))
        for layer in layers:
            score = _score([(a, next(grads)) for a in taken[layer.name]], layer)
            total[layer.name] = score + total.get(layer.name, torch.zeros_like(score))
        count += 1
    if not count:
        raise ValueError("batches: none; importance is measured on at least one")
    return {name: score / count for name, score in total.items()}


def _score(pairs: Sequence[tuple[Tensor, Tensor | None]], layer: Structure) -> Tensor:
    score = torch.zeros(layer.hidden, dtype=torch.promote_types(layer.down.weight.dtype, torch.float32), device=layer.down.weight.device)
    for a, grad in pairs:
        if grad is not None:
            product = (a.detach().to(score.dtype) * grad.to(score.dtype))[..., layer.beside :]
            score = score + product.flatten(0, -2).sum(0)
    return score.abs()


@contextmanager
def _activations(layers: Sequence[Structure]) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, the inputs of the layers' way back, of each call, with a gradient."""
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}

    def keep(name: str) -> Callable[[Any, Any], Any]:
        def hook(_module: Any, inputs: Any) -> Any:
            a = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
            seen[name].append(a)
            return (a,)

        return hook

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.down.register_forward_pre_hook(keep(layer.name)).remove)
        yield seen


def magnitude(layers: Sequence[Structure]) -> Importance:
    """The Euclidean norm of all of a neuron's weights: its input row, or a value's and its gate's, its hidden biases, its output column."""
    return {layer.name: _norm(layer) for layer in layers}


def _norm(layer: Structure) -> Tensor:
    dense = layer.dense()
    wide = torch.promote_types(dense.w1.dtype, torch.float32)
    rows = dense.w1.to(wide).square().sum(1) + (0 if dense.b1 is None else dense.b1.to(wide).square())
    rows = rows.view(2, -1).sum(0) if is_gated(layer.activation) else rows
    return (rows + dense.w2.to(wide).square().sum(0)).sqrt()


def random(layers: Sequence[Structure], seed: int) -> Importance:
    """Uniform numbers that depend on the seed and the layer's name alone: what the others are compared with."""
    drawn: Importance = {}
    for layer in layers:
        with seeded(seed, "expert importance", layer.name):
            drawn[layer.name] = torch.rand(layer.hidden)
    return drawn
