"""moe_ffn in plain PyTorch: every expert at every token, weighted by gates that are zero where it was not chosen. Any dtype, any device.

What the op is held to. It has every derivative that PyTorch has, and costs as much as all experts together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen_kernels.moe_ffn.activations import Activation, activate
from fastgen_kernels.moe_ffn.arguments import Experts, check, check_range


def moe_ffn(
    x: Tensor, ids: Tensor, gates: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None = None, *, activation: Activation
) -> Tensor:
    """Tokens choose experts; arguments, result and errors are those of `fastgen_kernels.moe_ffn.moe_ffn`."""
    experts = Experts(w1, b1, w2, b2, activation)
    check(x, ("ids", ids), gates, experts)
    check_range("ids", ids, len(w1))
    chosen = ids[..., None] == torch.arange(len(w1), device=ids.device)  # (T, k, E)
    return _mixture(x, (chosen * gates[..., None]).sum(1), experts)


def moe_ffn_by_expert(
    x: Tensor, tokens: Tensor, gates: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None = None, *, activation: Activation
) -> Tensor:
    """Experts choose tokens; arguments, result and errors are those of `fastgen_kernels.moe_ffn.moe_ffn_by_expert`."""
    experts = Experts(w1, b1, w2, b2, activation)
    check(x, ("tokens", tokens), gates, experts)
    check_range("tokens", tokens, len(x))
    chosen = tokens[..., None] == torch.arange(len(x), device=x.device)  # (E, C, T)
    return _mixture(x, (chosen * gates[..., None]).sum(1).T, experts)


def _mixture(x: Tensor, gates: Tensor, experts: Experts) -> Tensor:
    """Σ_e gates[t, e] FFN_e(x_t): (T, D') of gates (T, E)."""
    h = torch.einsum("td,ehd->teh", x, experts.w1)
    a = activate(h if experts.b1 is None else h + experts.b1, experts.activation)
    y = torch.einsum("teh,edh->ted", a, experts.w2)
    y = y if experts.b2 is None else y + experts.b2
    return (gates[..., None] * y).sum(1).to(x.dtype)
