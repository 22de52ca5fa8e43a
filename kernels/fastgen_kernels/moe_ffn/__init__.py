"""Feed-forward experts on tokens sorted by expert, with gradients and tangents. Layout, formulas and limits in README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen_kernels.moe_ffn.activations import ACTIVATIONS, Activation, activate, is_gated
from fastgen_kernels.moe_ffn.arguments import Experts, check, check_range
from fastgen_kernels.moe_ffn.plan import Plan, add, of_experts, of_tokens, take
from fastgen_kernels.moe_ffn.products import rows

__all__ = ["ACTIVATIONS", "Activation", "activate", "describe", "is_gated", "moe_ffn", "moe_ffn_by_expert"]


def moe_ffn(
    x: Tensor, ids: Tensor, gates: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None = None, *, activation: Activation
) -> Tensor:
    """Σ_j gates[t, j] FFN_ids[t, j](x_t), FFN_e(x) = W2_e act(W1_e x + b1_e) + b2_e, where each token has chosen k experts: (T, D').

    x: (T, D); ids: (T, k) int64 in 0 … E − 1, an expert may stand twice; gates: (T, k), any floating dtype; k or T may be 0.
    w1: (E, H, D), b1: (E, H); where gated (geglu, geglu-approximate, swiglu) (E, 2H, D) and (E, 2H), values first, then gates, as in
    diffusers. w2: (E, D', H); b2: (E, D'). Either bias may be None. Everything computes in autocast's dtype, if any, else in x's; the result is in
    that.

    Differentiable in x, gates, weights and biases, to any order, in reverse and forward mode (`forward_ad`, `torch.func.jvp`). The choice,
    `ids`, is constant: it has no gradient, and a tangent does not see that another expert would be chosen a step further on. Gates are
    differentiated. Two runs agree bit for bit. On the meta device the result has its shape and nothing else.
    Under torch.compile the call is a graph break.
    Raises ValueError naming the argument for wrong shapes, dtypes, devices, activations, and, on a CPU, for ids out of range.
    """
    return _by_token(x, ids, gates, Experts(w1, b1, w2, b2, activation))


def moe_ffn_by_expert(
    x: Tensor, tokens: Tensor, gates: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None = None, *, activation: Activation
) -> Tensor:
    """The same where each expert has chosen C tokens, tokens: (E, C) int64 in 0 … T − 1, gates: (E, C). A token may be chosen by many experts
    or by none, then its result is 0. No sizes depend on the choice, so nothing waits for the device."""
    return _by_expert(x, tokens, gates, Experts(w1, b1, w2, b2, activation))


def describe() -> str:
    """One line for `fastgen doctor`: which path is active here."""
    where = f"on {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "on the CPU"
    return f"PyTorch {torch.__version__}'s grouped product {where}; a loop over experts for float64 and rows that are no multiple of 16 bytes"


def _by_token_eagerly(x: Tensor, ids: Tensor, gates: Tensor, experts: Experts) -> Tensor:
    check(x, ("ids", ids), gates, experts)
    check_range("ids", ids, len(experts.w1))
    if not ids.numel() or x.is_meta:
        return _nothing(x, experts)
    plan, order = of_tokens(ids, len(experts.w1))
    return _computed(x, gates.flatten()[order], plan, experts)


def _by_expert_eagerly(x: Tensor, tokens: Tensor, gates: Tensor, experts: Experts) -> Tensor:
    check(x, ("tokens", tokens), gates, experts)
    check_range("tokens", tokens, len(x))
    if len(tokens) != len(experts.w1):
        raise ValueError(f"tokens: {tuple(tokens.shape)}; it has a row for each of {len(experts.w1)} experts")
    if not tokens.numel() or x.is_meta:
        return _nothing(x, experts)
    return _computed(x, gates.flatten(), of_experts(tokens, len(x)), experts)


# Out of torch.compile's sight: it knows the grouped product of half types alone, and neither its loop nor its checks.
_by_token: Callable[..., Any] = torch.compiler.disable(_by_token_eagerly)
_by_expert: Callable[..., Any] = torch.compiler.disable(_by_expert_eagerly)


def _computed(x: Tensor, gates: Tensor, plan: Plan, experts: Experts) -> Tensor:
    """(T, D') of gates (R,) in the order of the plan's rows.

    A gate scales the row's hidden activations: W2 is linear, and there a row is narrowest. Biases are products with the matrix of which row is
    whose, so that their gradients need no atomics either.
    """
    dtype = _compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        x, w1, w2 = x.to(dtype), experts.w1.to(dtype), experts.w2.to(dtype)
        whose = (plan.expert[:, None] == torch.arange(len(w1), device=x.device)).to(dtype)  # (R, E)
        h = rows(take(x, plan), w1, plan.ends)
        h = h if experts.b1 is None else h + whose @ experts.b1.to(dtype)
        a = (activate(h, experts.activation) * gates[:, None]).to(dtype)
        y = rows(a, w2, plan.ends)
        y = y if experts.b2 is None else y + (whose * gates[:, None]).to(dtype) @ experts.b2.to(dtype)
        return add(y, plan)


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind: Any = x.device.type
    return torch.get_autocast_dtype(kind) if x.dtype != torch.float64 and torch.is_autocast_enabled(kind) else x.dtype


def _nothing(x: Tensor, experts: Experts) -> Tensor:
    return x.new_zeros(x.shape[0], experts.w2.shape[1], dtype=x.dtype if x.is_meta else _compute_dtype(x))
