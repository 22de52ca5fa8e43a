"""Floating-point operations of a training step: what PyTorch counts, and attention with its tangent by formula.

PyTorch counts matrix products, convolutions and its own attention. It sees our kernel's products where plain PyTorch computes them, on a CPU,
but nothing of a Triton launch. So each call of the kernel counts as the formula says, and what PyTorch saw of it is taken off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fastgen_kernels.jvp_attention as kernel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def attention_flops(q: Tensor, k: Tensor, tq: Tensor | None = None, tk: Tensor | None = None, tv: Tensor | None = None) -> int:
    """Of the output of one call and its tangent, q (B, H, N, d), k (B, H', M, d): 12 N M d a head with all three tangents, 8 N M d with
    tangents of the queries alone, 4 N M d with none. Each of Q Kᵀ, P V, tQ Kᵀ, Q tKᵀ, P tV and (P ⊙ tS) V is 2 N M d."""
    products = 2 + sum(tangent is not None for tangent in (tq, tk, tv)) + (tq is not None or tk is not None)
    batch, heads, queries, size = q.shape
    return 2 * products * batch * heads * queries * k.shape[2] * size


class _Counter:
    """Stands in for the kernel: the same result, and its FLOPs beside what the counter sees of it."""

    def __init__(self, attend: Callable[..., Any], counter: FlopCounterMode) -> None:
        self.attend, self.counter = attend, counter
        self.calls, self.formula, self.seen = 0, 0, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *tangents: Tensor | None, **options: Any) -> Any:
        before = self.counter.get_total_flops()
        out = self.attend(q, k, v, *tangents, **options)
        self.calls += 1
        self.formula += attention_flops(q, k, *tangents)
        self.seen += self.counter.get_total_flops() - before
        return out


def step_flops(call: Callable[[], Any]) -> tuple[int, int]:
    """(FLOPs, those of them in attention with tangents) of a call, backward passes included."""
    counter = FlopCounterMode(display=False)
    attend = kernel.jvp_attention
    counting = _Counter(attend, counter)
    kernel.jvp_attention = counting  # fastgen.jvp takes it from its package at each call
    try:
        with counter:
            call()
    finally:
        kernel.jvp_attention = attend
    return counter.get_total_flops() - counting.seen + counting.formula, counting.formula
