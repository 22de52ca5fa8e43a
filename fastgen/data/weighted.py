"""Weights that people give, as frequencies: normalised without overflow, and rows drawn with them from uniform numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_SMALLEST = math.ulp(0.0)


def scaled(weights: Iterable[float]) -> list[float]:
    """Finite weights >= 0 times the power of two that brings the largest into [.5, 1): no sum of them overflows, and none that can be
    told from 0 beside the largest vanishes. All 0 stays so."""
    given = list(weights)
    _, exponent = math.frexp(max(given, default=0.0))
    return [math.ldexp(weight, -exponent) for weight in given]


def shares(groups: Iterable[Sequence[float]]) -> list[float]:
    """The share of each group of weights in all of them, by an exact sum; positive where one of its weights is. All 0 stays so."""
    members = [list(group) for group in groups]
    flat = iter(scaled(weight for group in members for weight in group))
    sums = [math.fsum(next(flat) for _ in group) for group in members]
    total = math.fsum(sums) or 1.0
    # A share too small for a double is rounded up: only what has no weight is never drawn by intention.
    return [max(part / total, _SMALLEST if any(group) else 0.0) for part, group in zip(sums, members, strict=True)]


def cumulative(weights: Iterable[float]) -> Tensor:
    """Cumulative probabilities (N,) fp64 of weights that need not sum to 1."""
    total = torch.tensor(scaled(weights), dtype=torch.float64).cumsum(0)
    return total / total[-1]


def rows(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Rows int64 of any shape, from uniform numbers in [0, 1) of that shape; a row of weight 0 is never drawn."""
    return torch.searchsorted(cumulative, uniform.double().cpu(), right=True).clamp(max=len(cumulative) - 1)
