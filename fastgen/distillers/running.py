"""Running means that a method's terms keep, so that a factor per sample can be normalised although micro-batches are small.

A sample is normalised by the student steps before its own and by itself, not by its batch: so its factor is the same however the batch
is split, 1 where nothing came before, and no larger than the number of samples that the mean remembers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor


def new_log_means(count: int = 1) -> Tensor:
    """(5, count) fp64 for `log_means`: logarithms of the decayed sum and number of the steps before, of the present step's, and which that is."""
    return torch.full((5, count), -torch.inf, dtype=torch.float64)


@torch.no_grad()
def log_means(state: Tensor, values: Tensor, places: Tensor, step: int, decay: float) -> Tensor:
    """Logarithms (B,), fp64, of the means of exp(values) over the steps before `step` at each sample's place and the sample itself; takes in
    values (B,) at places (B,) in [0, count) for the steps after it. exp itself may overflow.

    decay: weight that each step keeps in the next; 0 leaves the last step alone.
    """
    own, values = state.to(values.device), values.double()
    if bool((own[4] != step).any()):
        past = torch.logaddexp(own[:2] + torch.tensor(decay, dtype=torch.float64).log(), own[2:4])
        own = torch.cat([past, torch.full_like(past, -torch.inf), torch.full_like(own[:1], step)])
    here = places == torch.arange(own.shape[1], device=values.device)[:, None]
    fresh = torch.stack([values.where(here, -torch.inf).logsumexp(1), here.sum(1).double().log()])
    state.copy_(torch.cat([own[:2], torch.logaddexp(own[2:4], fresh), own[4:]]))
    total, number = own[:2, places]
    return torch.logaddexp(total, values) - torch.logaddexp(number, torch.zeros_like(values))


@torch.no_grad()
def take_together(state: Tensor, step: int, gather: Callable[[Tensor], Tensor]) -> None:
    """Add up, over processes, what `log_means` has taken in at `step`; gather: (processes, ...) of a tensor (...). Once a step."""
    if bool((state[4] == step).all()):
        state[2:4] = reduce(torch.logaddexp, gather(state[2:4]))
