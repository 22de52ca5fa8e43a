"""How different the samples of one prompt are from each other: distances, effective numbers of samples and of modes.

Every measure is a mean over groups, usually the samples of one prompt text, and every group weighs the same whatever its size. Groups
with one sample say nothing about diversity and are left out; ValueError when none is left, or when there is not one group a row.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from fastgen.evaluation.frechet import finite


def pairwise_distance(features: Tensor, groups: Sequence[Hashable]) -> float:
    """Mean over groups of the mean Euclidean distance between two different samples of that group, in the features' own units.

    features: (N, D), any float dtype, compared in fp64; groups: N labels.
    """
    return _mean([torch.pdist(rows).mean() for rows in _grouped(_matrix(features, groups), groups)])


def vendi_score(features: Tensor, groups: Sequence[Hashable]) -> float:
    """Mean over groups of the Vendi score with the cosine kernel: the effective number of different samples (Friedman & Dieng 2023).

    exp of the Shannon entropy of the eigenvalues of K/n, K[i, j] = cos(f_i, f_j): 1 for n equal samples, k for k orthogonal clusters
    of equal size, at most min(n, D). Estimated from the group alone, so it grows a little with n: compare at equal group sizes.
    features: (N, D), any float dtype, computed in fp64, not centred; groups: N labels. Features that are all zero have no direction:
    they count as equal to each other and orthogonal to all else.
    """
    return _mean([vendi_scores(rows) for rows in _grouped(_matrix(features, groups), groups)])


def vendi_scores(features: Tensor) -> Tensor:
    """(...) fp64: the Vendi score, as above, of each group of features (..., n, D)."""
    wide = features.double()
    blank = (wide == 0).all(-1, keepdim=True).to(wide)
    directions = torch.nn.functional.normalize(torch.cat([wide, blank], -1), dim=-1)
    # The squared singular values of F/sqrt(n) are the eigenvalues of F F^T/n, without the cost of the (n, n) matrix and never negative.
    values = torch.linalg.svdvals(directions / directions.shape[-2] ** 0.5).square()
    return torch.special.entr(values).sum(-1).exp()


def mode_entropy(labels: Tensor, groups: Sequence[Hashable]) -> float:
    """Mean over groups of exp(entropy of the labels' shares in that group): the effective number of modes.

    1 where all samples have one label, k where k labels are equally frequent. labels: (N,) integers; groups: N labels of the groups.
    """
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != len(groups):
        raise ValueError(f"one group per integer label (N,): got {len(groups)} groups, {labels.dtype} and shape {tuple(labels.shape)}")
    shares = [torch.unique(rows, return_counts=True)[1].double() / len(rows) for rows in _grouped(labels, groups)]
    return _mean([torch.special.entr(share).sum().exp() for share in shares])


def _matrix(features: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """The features in fp64, once their shape is known to be right and they to be finite."""
    if features.ndim != 2 or len(features) != len(groups):
        raise ValueError(f"one group per row of features (N, D): got {len(groups)} groups and shape {tuple(features.shape)}")
    return finite(features)


def _grouped(rows: Tensor, groups: Sequence[Hashable]) -> list[Tensor]:
    """The rows of each group with two samples or more."""
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    found = [rows[indices] for indices in members.values() if len(indices) > 1]
    if not found:
        raise ValueError(f"diversity needs a prompt with two samples; all {len(members)} prompts have one or none")
    return found


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())
