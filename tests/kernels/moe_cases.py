"""Inputs of moe_ffn, the loop over tokens that it is held to, and how far two results lie apart."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from fastgen_kernels.moe_ffn import is_gated
from torch import Tensor

F64 = torch.float64


class Size(NamedTuple):
    tokens: int
    slots: int
    experts: int
    width: int
    hidden: int
    out: int


ODD, ALIGNED = Size(13, 2, 5, 7, 3, 9), Size(24, 3, 4, 8, 16, 12)  # the second are multiples of 16 bytes in fp32
ROUTINGS = ("random", "skewed", "one", "twice")


def normal(*size: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def chosen(size: Size, routing: str) -> Tensor:
    ids = torch.randint(size.experts, (size.tokens, size.slots), generator=torch.Generator().manual_seed(7))
    if routing == "skewed":  # all but two tokens at expert 1, and none at the last
        ids[2:] = 1
        ids[:2] = ids[:2] % (size.experts - 1)
    elif routing == "one":
        ids[:] = size.experts - 1
    elif routing == "twice":
        ids[:, 1] = ids[:, 0]
    return ids


def inputs(size: Size, activation: str = "gelu", dtype: torch.dtype = F64) -> dict[str, Tensor]:
    rows = (1 + is_gated(activation)) * size.hidden  # type: ignore[arg-type]
    made = {
        "x": normal(size.tokens, size.width),
        "gates": normal(size.tokens, size.slots, seed=1).abs(),
        "w1": normal(size.experts, rows, size.width, seed=2) / size.width**0.5,
        "b1": normal(size.experts, rows, seed=3),
        "w2": normal(size.experts, size.out, size.hidden, seed=4) / size.hidden**0.5,
        "b2": normal(size.experts, size.out, seed=5),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in made.items()}


def act(h: Tensor, activation: str) -> Tensor:
    """By formulas, not PyTorch's functions."""
    half = len(h) // 2
    value, x = (h[:half], h[half:]) if activation.startswith(("geglu", "swiglu")) else (torch.ones_like(h), h)
    if activation in ("silu", "swiglu"):
        return value * x / (1 + torch.exp(-x))
    if activation.endswith("-approximate"):
        return value * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
    return value * x * (1 + torch.erf(x / 2**0.5)) / 2


def loop(x: Tensor, ids: Tensor, gates: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str) -> Tensor:
    """One token and one slot after the other."""
    out = []
    for t in range(len(x)):
        y = x.new_zeros(w2.shape[1])
        for e, gate in zip(ids[t].tolist(), gates[t], strict=True):
            h = w1[e] @ x[t] if b1 is None else w1[e] @ x[t] + b1[e]
            z = w2[e] @ act(h, activation)
            y = y + gate * (z if b2 is None else z + b2[e])
        out.append(y)
    return torch.stack(out)


def relative(a: Tensor, b: Tensor) -> float:
    """Of what may be zero throughout, as the gradient of a bias nobody used."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def gradients(out: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad((out * normal(*out.shape, seed=9).to(out)).sum(), list(given.values()), allow_unused=True)
    return {name: torch.zeros_like(x) if grad is None else grad for (name, x), grad in zip(given.items(), grads, strict=True)}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], least: float) -> None:
    assert {name: relative(found[name], grad) for name, grad in expected.items() if relative(found[name], grad) >= least} == {}


def by_expert(capacity: int) -> tuple[Tensor, dict[str, Tensor]]:
    """What each of four experts chooses of ALIGNED's tokens, each token once at most; and its inputs."""
    tokens = torch.stack([torch.randperm(ALIGNED.tokens, generator=torch.Generator().manual_seed(e))[:capacity] for e in range(4)])
    return tokens, inputs(ALIGNED, "swiglu") | {"gates": normal(4, capacity, seed=1).requires_grad_()}
