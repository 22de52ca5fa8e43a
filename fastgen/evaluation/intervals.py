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
    """std: between single scores (of groups' means, where there are some), divided by n - 1. interval: where 95 % of such means lie. Both None
    for a single score or group, which says nothing about others."""

    value: float
    std: float | None
    interval: tuple[float, float] | None


def mean_interval(scores: Tensor, groups: Sequence[Hashable] | None = None) -> Mean:
    """Mean of scores (N,), computed in fp64, with its interval by Student's t: mean ± t(n - 1) std / sqrt n.

    groups: N labels, of pictures that are no independent draws because they share a prompt. The mean m stays that of all scores, a ratio of
    two sums over n = G groups, y_g of scores and N_g of pictures; its linearised variance is G / (G - 1) · sum (y_g - m N_g)² / N² (Cochran
    1977, Sampling Techniques, ch. 6: that of a ratio estimate). It is Student's of the groups' means where all are of one size, and otherwise
    of m + (y_g - m N_g) G / N in their place. Unavailable without any score, and where one is not finite.
    """
    if scores.ndim != 1 or (groups is not None and len(groups) != len(scores)):
        raise ValueError(f"one group per score (N,): got shape {tuple(scores.shape)} and {len(groups or ())} groups")
    wide = scores.detach().cpu().double()
    if len(wide) == 0:
        raise Unavailable("there are no scores to take the mean of")
    if broken := int((~wide.isfinite()).sum()):
        raise Unavailable(f"{broken} of {len(wide)} scores are not finite")
    mean = float(wide.mean())
    units = wide if groups is None else _linearised(mean, *group_sums(wide, groups))
    if len(units) < 2:
        return Mean(mean, None, None)
    std = float((units - mean).square().sum() / (len(units) - 1)) ** 0.5
    half = _student(len(units) - 1) * std / len(units) ** 0.5
    return Mean(mean, std, (mean - half, mean + half))


def _linearised(mean: float, sums: Tensor, counts: Tensor) -> Tensor:
    return mean + (sums - mean * counts) * (len(counts) / counts.sum())


def group_sums(scores: Tensor, groups: Sequence[Hashable]) -> tuple[Tensor, Tensor]:
    """(G,) fp64: the sum of each group's scores, and how many they are, groups in the order in which they first appear."""
    numbers: dict[Hashable, int] = {}
    rows = torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups])
    sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, rows, scores.double())
    return sums, torch.bincount(rows, minlength=len(numbers)).double()


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
