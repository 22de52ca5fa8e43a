"""What numbers would be over other pictures: means of scores with standard deviation and 95 % interval, intervals of anything else."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.evaluation.weights import Unavailable

LEVEL = 0.95
NORMAL = 1.959963984540054  # LEVEL of a normal distribution lies within so many standard deviations


class Mean(NamedTuple):
    """std: between single scores (of groups, where there are some), divided by n - 1. interval: where 95 % of such means lie. Both None for
    a single score, which says nothing about others."""

    value: float
    std: float | None
    interval: tuple[float, float] | None


def mean_interval(scores: Tensor, groups: Sequence[Hashable] | None = None) -> Mean:
    """Mean of scores (N,), computed in fp64, with its interval by Student's t: mean ± t(n - 1) std / sqrt n.

    groups: N labels, of pictures that are no independent draws because they share a prompt: then the mean is that over groups of each group's
    mean, and n counts groups. Unavailable without any score, and where one is not finite.
    """
    if scores.ndim != 1 or (groups is not None and len(groups) != len(scores)):
        raise ValueError(f"one group per score (N,): got shape {tuple(scores.shape)} and {len(groups or ())} groups")
    wide = scores.detach().cpu().double()
    if len(wide) == 0:
        raise Unavailable("there are no scores to take the mean of")
    if broken := int((~wide.isfinite()).sum()):
        raise Unavailable(f"{broken} of {len(wide)} scores are not finite")
    units = wide if groups is None else group_means(wide, groups)
    mean = float(units.mean())
    if len(units) < 2:
        return Mean(mean, None, None)
    std = float(units.std())
    half = _student(len(units) - 1) * std / len(units) ** 0.5
    return Mean(mean, std, (mean - half, mean + half))


def group_means(scores: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """(G,) fp64: the mean of each group's scores, groups in the order in which they first appear."""
    numbers: dict[Hashable, int] = {}
    rows = torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups])
    sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, rows, scores.double())
    return sums / torch.bincount(rows, minlength=len(numbers))


def jackknife_interval(value: float, left_out: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a statistic by the delete-a-group jackknife (Kott 2001): value ± t(G - 1) s, s² = (G - 1) / G · sum (v_g - mean v)².

    left_out: v_g, the statistic without the g-th of G >= 2 random groups of equal size (to one). What it says is the spread between draws of
    as many pictures; a bias that they share, such as that of Fréchet distances, is in value and interval alike.
    """
    values = torch.tensor(left_out, dtype=torch.float64)
    groups = len(values)
    half = _student(groups - 1) * float((values - values.mean()).square().sum() * (groups - 1) / groups) ** 0.5
    return value - half, value + half


def _student(degrees: int) -> float:
    """The quantile of Student's t that 95 % of its mass lie between the negative of and it."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + LEVEL) / 2))
