"""How different the samples of one prompt are from each other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def pairwise_distance(features: Tensor, groups: Sequence[Hashable]) -> float:
    """Mean over groups of the mean Euclidean distance between two different samples of that group.

    features: (N, D), any float dtype, compared in fp64; groups: N labels, usually the prompt texts; every group weighs the same whatever
    its size. In the features' own units. Groups with one sample have no pair and are left out; raises ValueError when none is left.
    """
    if features.ndim != 2 or len(features) != len(groups):
        raise ValueError(f"one group per row of features (N, D): got {len(groups)} groups and shape {tuple(features.shape)}")
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    wide = features.detach().double()
    means = [torch.pdist(wide[rows]).mean() for rows in members.values() if len(rows) > 1]
    if not means:
        raise ValueError(f"diversity needs a prompt with two samples; all {len(members)} prompts have one or none")
    return float(torch.stack(means).mean())
