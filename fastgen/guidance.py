"""Classifier-free guidance: how a prediction with the conditioning and one with the negative conditioning become one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastgen.path import expand_time

GuidanceRule = Callable[[Tensor, Tensor, float | Tensor], Tensor]


def linear(cond: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
    """n + w (c - n), diffusers' convention: w = 1 is no guidance (Ho & Salimans 2022).

    scale: one number, or one a sample (B,).
    """
    scale = expand_time(scale, cond) if isinstance(scale, Tensor) else scale
    return negative + scale * (cond - negative)
