"""Running means that a method's terms keep, so that a factor per sample can be normalised although micro-batches are small."""

from __future__ import annotations

import torch
from torch import Tensor


def new_log_mean() -> Tensor:
    """(2,) fp64: logarithms of a decayed sum and of the decayed number of samples."""
    return torch.full((2,), -torch.inf, dtype=torch.float64)


@torch.no_grad()
def update_log_mean(state: Tensor, values: Tensor, decay: float) -> Tensor:
    """Take in exp(values), values (B,), and return the logarithm () of their running mean, fp64; exp itself may overflow."""
    values = values.double()
    fresh = torch.stack([values.logsumexp(0), torch.tensor(float(len(values)), dtype=torch.float64, device=values.device).log()])
    state.copy_(torch.logaddexp(state.to(values.device) + torch.tensor(decay, dtype=torch.float64).log(), fresh))
    return (state[0] - state[1]).to(values.device)


def new_mean(count: int) -> Tensor:
    """(2, count) fp64 zeros: decayed sums and decayed numbers of samples."""
    return torch.zeros(2, count, dtype=torch.float64)


@torch.no_grad()
def update_mean(state: Tensor, values: Tensor, places: Tensor, decay: float) -> Tensor:
    """Take in values (B,) at places (B,) in [0, count) and return each sample's running mean (B,), fp64, its own batch included.

    decay: weight that the past keeps at each call; 0 is the mean of this batch alone.
    """
    own = state.to(values.device)
    fresh = torch.zeros_like(own)
    fresh[0].index_add_(0, places, values.double())
    fresh[1].index_add_(0, places, torch.ones_like(values, dtype=torch.float64))
    own = decay * own + fresh
    state.copy_(own)
    return (own[0] / own[1])[places]
