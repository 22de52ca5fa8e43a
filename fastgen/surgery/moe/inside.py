"""Experts inside a block whose feed-forward layer is no module of its own: the block's code stays, with tokens where hidden activations were.

The layers that lead to values and gates give the tokens on as they are, the activation does nothing (or gives ones, where the code multiplies
values by it), and so the layer that leads back reads tokens, beside attention's outputs where it reads both: experts take its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Inside:
    """up: names of the block's layers that lead to values and gates; act, down: of its activation and of the layer that leads back; beside, above:
    how many inputs of `down`, and how many outputs of the one layer `up`, come first and are attention's; times: how often the code expects the
    tokens from a layer, 2 where it splits values from gates; ones: whether it multiplies values by the activation; widths: attributes that the code
    splits by, and what they are with experts."""

    up: tuple[str, ...]
    act: str
    down: str
    beside: int = 0
    above: int = 0
    times: int = 1
    ones: bool = False
    widths: Mapping[str, int] = field(default_factory=dict)

    def put(self, block: Any, module: nn.Module) -> None:
        """Tokens to `module`, whose result takes the place of the feed-forward layer's."""
        down = block.get_submodule(self.down)
        block.set_submodule(self.down, BesideAttention(down, self.beside, module) if self.beside else module)
        for name in self.up:
            block.set_submodule(name, passing(block.get_submodule(name), self.above, self.times))
        block.set_submodule(self.act, Ones() if self.ones else nn.Identity())
        for name, width in self.widths.items():
            setattr(block, name, width)


class BesideAttention(nn.Module):
    """The last layer of a single block whose feed-forward part is another module now: of [attention; tokens] (…, A + D), the same sum as before."""

    def __init__(self, both: nn.Linear, attention: int, experts: nn.Module) -> None:
        super().__init__()
        self.attention = nn.Linear(attention, both.out_features, both.bias is not None, device="meta")
        self.attention.weight = nn.Parameter(both.weight.detach()[:, :attention].clone(), both.weight.requires_grad)
        if both.bias is not None:
            self.attention.bias = both.bias
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        width = self.attention.in_features
        return self.attention(x[..., :width]) + self.experts(x[..., width:])


class AboveTokens(nn.Module):
    """[attention's part of a layer that made hidden values as well; the tokens themselves]: (…, D) -> (…, A + times · D), without such a part
    (…, times · D)."""

    def __init__(self, both: nn.Linear, attention: int, times: int) -> None:
        super().__init__()
        self.in_features, self.times = both.in_features, times
        self.attention = _first_rows(both, attention) if attention else None

    def forward(self, x: Tensor) -> Tensor:
        if self.attention is None:
            return torch.cat([x] * self.times, -1)
        out = self.attention(x)
        return torch.cat([out, *[x.to(out.dtype)] * self.times], -1)  # as wide as it was, for attention's sake: under autocast x is wider


class Ones(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


def stand_ins(network: nn.Module) -> dict[str, str]:
    """Names of modules that stand where linear layers were, each with that of the linear layer that is left of it, attention's, or ""."""
    found = [(name, module) for name, module in network.named_modules() if isinstance(module, (AboveTokens, BesideAttention, Ones, nn.Identity))]
    return {name: f"{name}.attention" if isinstance(getattr(module, "attention", None), nn.Module) else "" for name, module in found}


def passing(both: nn.Linear, attention: int, times: int) -> nn.Module:
    """What stands for a layer that led to values and gates."""
    return AboveTokens(both, attention, times) if attention or times > 1 else nn.Identity()


def _first_rows(both: nn.Linear, count: int) -> nn.Linear:
    layer = nn.Linear(both.in_features, count, both.bias is not None, device="meta")
    layer.weight = nn.Parameter(both.weight.detach()[:count].clone(), both.weight.requires_grad)
    if both.bias is not None:
        layer.bias = nn.Parameter(both.bias.detach()[:count].clone(), both.bias.requires_grad)
    return layer
