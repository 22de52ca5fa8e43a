"""Checks of `moe_ffn`'s arguments, shared by the op and its reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastgen_kernels.moe_ffn.activations import ACTIVATIONS, Activation, is_gated


@dataclass(frozen=True)
class Experts:
    """Weights of E experts: w1 (E, H, D), or (E, 2H, D) where gated; b1 (E, H) or (E, 2H); w2 (E, D', H); b2 (E, D')."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    activation: Activation


def check(x: Tensor, chosen: tuple[str, Tensor], gates: Tensor, experts: Experts) -> None:
    """ValueError naming the argument that does not fit. chosen: what it is called, and indices, of the shape that gates have."""
    name, indices = chosen
    if experts.activation not in ACTIVATIONS:
        raise ValueError(f"activation: {experts.activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x: {tuple(x.shape)} {x.dtype}; it is (tokens, width), floating point")
    if indices.ndim != 2 or indices.dtype != torch.int64:
        raise ValueError(f"{name}: {tuple(indices.shape)} {indices.dtype}; it has two dimensions, int64")
    if gates.shape != indices.shape or not gates.is_floating_point():
        raise ValueError(f"gates: {tuple(gates.shape)} {gates.dtype}; {name} is {tuple(indices.shape)}, and gates are floating point")
    if experts.w1.ndim != 3 or experts.w2.ndim != 3:
        raise ValueError(f"w1, w2: {tuple(experts.w1.shape)}, {tuple(experts.w2.shape)}; they are (experts, outputs, inputs)")
    num, outputs, width = experts.w1.shape
    hidden = outputs // 2 if is_gated(experts.activation) else outputs
    shapes = {"x": (x.shape[0], width), "w2": (num, experts.w2.shape[1], hidden), "b1": (num, outputs), "b2": (num, experts.w2.shape[1])}
    given = {"x": x, "w1": experts.w1, "w2": experts.w2, "b1": experts.b1, "b2": experts.b2}
    for key, tensor in given.items():
        if tensor is not None and key in shapes and tensor.shape != shapes[key]:
            raise ValueError(f"{key}: {tuple(tensor.shape)}; w1 {tuple(experts.w1.shape)} with {experts.activation} needs {shapes[key]}")
    tensors = {**{key: tensor for key, tensor in given.items() if tensor is not None}, name: indices, "gates": gates}
    for key, tensor in tensors.items():
        if tensor.device != x.device:
            raise ValueError(f"{key}: on {tensor.device}, but x on {x.device}")


def has_numbers(x: Tensor) -> bool:
    """Whether a tensor has more than a shape: those of the meta device and PyTorch's fake tensors do not."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def check_range(name: str, indices: Tensor, count: int) -> None:
    """ValueError for an index outside 0 … count - 1. On a CPU alone: elsewhere looking would wait for the device."""
    if indices.device.type == "cpu" and has_numbers(indices) and indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < count:
        raise ValueError(f"{name}: {int(indices.min())} to {int(indices.max())}; allowed: 0 to {count - 1}")
