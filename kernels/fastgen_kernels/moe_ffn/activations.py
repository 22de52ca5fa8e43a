"""The activations of diffusers' feed-forward layers. Of a gated one the values come first and the gates after, as in diffusers' GEGLU.

The names are diffusers' `activation_fn`, but for two: "silu" is its "linear-silu", and "geglu-approximate", GEGLU with GELU's tanh form, has no
`activation_fn` there (what diffusers calls so, x sigmoid(1.702 x), does not gate).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["gelu", "gelu-approximate", "silu", "geglu", "geglu-approximate", "swiglu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
# Of gates where there are any, else of what is there: each is made of PyTorch's own functions, so its gradient and tangent are theirs.
_FUNCTIONS = {"gelu": F.gelu, "geglu": F.gelu, "silu": F.silu, "swiglu": F.silu}


def is_gated(activation: Activation) -> bool:
    """Whether the first product makes two numbers for each hidden one: a value and its gate."""
    return activation in ("geglu", "geglu-approximate", "swiglu")


def activate(h: Tensor, activation: Activation) -> Tensor:
    """(…, H) of (…, H), or of (…, 2H) where gated."""
    if not is_gated(activation):
        return _shaped(h, activation)
    value, gate = h.chunk(2, -1)
    return value * _shaped(gate, activation)


def _shaped(h: Tensor, activation: Activation) -> Tensor:
    name = activation.removesuffix("-approximate")
    return F.gelu(h, approximate="tanh") if name != activation else _FUNCTIONS[name](h)
