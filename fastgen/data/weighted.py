"""Rows drawn with given frequencies from uniform numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def cumulative(weights: Iterable[float]) -> Tensor:
    """Cumulative probabilities (N,) fp64 of weights that need not sum to 1."""
    total = torch.tensor(list(weights), dtype=torch.float64).cumsum(0)
    return total / total[-1]


def rows(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Rows int64 of any shape, from uniform numbers in [0, 1) of that shape; a row of weight 0 is never drawn."""
    return torch.searchsorted(cumulative, uniform.double().cpu(), right=True).clamp(max=len(cumulative) - 1)
