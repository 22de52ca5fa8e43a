"""The activations of diffusers' feed-forward layers. Of a gated one the values come first and the gates after, as in diffusers' GEGLU."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["gelu", "gelu-approximate", "geglu", "swiglu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def is_gated(activation: Activation) -> bool:
    """Whether the first product makes two numbers for each hidden one: a value and its gate."""
    return activation in ("geglu", "swiglu")


def activate(h: Tensor, activation: Activation) -> Tensor:
    """(…, H) of (…, H), or of (…, 2H) where gated."""
    if activation == "gelu":
        return F.gelu(h)
    if activation == "gelu-approximate":
        return F.gelu(h, approximate="tanh")
    value, gate = h.chunk(2, -1)
    return value * (F.gelu(gate) if activation == "geglu" else F.silu(gate))
