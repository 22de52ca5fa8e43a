"""How much a network's blocks count: how far its loss rises when it goes without one of them, which then passes on what it got.

One block at a time, by doing it, as Kim et al. 2024 choose blocks of language models ("Shortened LLaMA", arXiv:2402.02834, their PPL criterion);
Molchanov et al. 2019 (arXiv:1906.10771, eq. 2) define importance so and take the first order of it, <dL/dy, y - x> of a block from x to y, for
networks of too many parts to leave each out. There are few blocks, so nothing is approximated: at a trained teacher, whose gradient nearly
vanishes, the first order is mostly noise. It takes no gradients, and one evaluation more for each block. The sign counts: a block without which
the loss falls is the first to go. That two blocks can do without each other is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Rises = dict[str, dict[int, float]]  # by a list's name and a block's place


@torch.no_grad()
def without_each(network: nn.Module, places: Mapping[str, Sequence[int]], batches: Iterable[Callable[[], Tensor]]) -> Rises:
    """The mean over batches of how much the loss rises without the block at each of `places`, by the lists' names; infinite where it is not
    finite. batches: each runs the network on one, the same numbers whenever it is called, and returns its scalar loss. ValueError without any."""
    sums = {name: dict.fromkeys(some, 0.0) for name, some in places.items()}
    count = 0
    for loss in batches:
        whole = loss().item()
        for name, rises in sums.items():
            for place in rises:
                with _without(network, name, place):
                    rises[place] += loss().item() - whole
        count += 1
    if not count:
        raise ValueError("batches: none; importance is measured on at least one")
    return {name: {place: rise / count if math.isfinite(rise) else math.inf for place, rise in rises.items()} for name, rises in sums.items()}


@contextmanager
def _without(network: nn.Module, name: str, place: int) -> Iterator[None]:
    blocks = network.get_submodule(name)
    setattr(network, name, nn.ModuleList([block for i, block in enumerate(blocks.children()) if i != place]))
    try:
        yield
    finally:
        setattr(network, name, blocks)
