"""Discriminator heads on features of a network's blocks: one logit a tapped block.

Each head is a multilayer perceptron on every token, averaged over tokens, and a linear layer that starts at zero: an untrained
discriminator says nothing. The blocks' own attention has mixed the tokens, and the network they belong to has seen noise level and
prompt, so heads need neither. One architecture serves vectors, images and videos; DMD2's released convolutional head fits one UNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.rng import seeded

Taps = Literal["auto"] | tuple[int, ...]
_WIDTH = 128


def choose_taps(taps: Taps, num_blocks: int) -> tuple[int, ...]:
    """Indices of the tapped blocks: `auto` takes those at a quarter, a half and three quarters. UserError for one that is not there."""
    if taps == "auto":
        return tuple(sorted({num_blocks // 4, num_blocks // 2, 3 * num_blocks // 4}))
    for tap in taps:
        if not 0 <= tap < num_blocks:
            raise UserError(f"recipe key distiller.gan.taps: no block {tap}; this network has blocks 0 to {num_blocks - 1}")
    return taps


class Heads(nn.Module):
    """taps: the blocks listened to; widths: channels of their features, in the same order; seed: of the hidden layers."""

    def __init__(self, taps: Sequence[int], widths: Sequence[int], *, seed: object) -> None:
        super().__init__()
        self.taps = tuple(taps)
        with seeded("heads", seed):
            self.heads = nn.ModuleList(_head(width) for width in widths)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_taps) of features (B, N, C) or (B, C), one for each tap; in the heads' own dtype, fp32 or wider."""
        with torch.autocast(features[0].device.type, enabled=False):
            logits = [_judge(head, feature) for head, feature in zip(self.heads, features, strict=True)]
        return torch.cat(logits, 1)


def _head(width: int) -> nn.Module:
    out = nn.Linear(_WIDTH, 1)
    nn.init.zeros_(out.weight)
    nn.init.zeros_(out.bias)
    tokens = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH), nn.SiLU())
    return nn.ModuleDict({"tokens": tokens, "out": out})


def _judge(head: nn.Module, feature: Tensor) -> Tensor:
    assert isinstance(head, nn.ModuleDict)
    tokens = feature if feature.ndim == 3 else feature[:, None]
    return head["out"](head["tokens"](tokens.to(next(head.parameters()).dtype)).mean(1))
