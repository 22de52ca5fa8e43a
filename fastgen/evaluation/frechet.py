"""Fréchet distance between Gaussian fits of two feature sets, and the distance that finite samples of the real data have from themselves.

The extractor gives the number its name: only Inception pool3 features make it a FID. All arithmetic is fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from fastgen.evaluation.intervals import jackknife_interval
from fastgen.evaluation.tables import Table
from fastgen.evaluation.weights import Unavailable

JACKKNIFE_GROUPS = 10


class Gaussian(Protocol):
    """Mean (D,) and unbiased covariance (D, D) of features, fp64; n: of how many images, None where nobody has recorded it."""

    @property
    def n(self) -> int | None: ...

    @property
    def mean(self) -> Tensor: ...

    @property
    def cov(self) -> Tensor: ...


@dataclass(frozen=True)
class GaussianFit:
    """A Gaussian that somebody else has computed. origin: the file that it is from, for messages."""

    mean: Tensor
    cov: Tensor
    n: int | None = None
    origin: str = ""


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, mean (D,) and scatter (D, D) (sum of centred outer products) of features; fp64, mergeable without a loss of precision."""

    n: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def from_features(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of features (N, D), any float dtype, accumulated in fp64. ValueError unless they are 2-D with at least one row, and finite."""
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"features must have shape (N, D) with N >= 1, got {tuple(features.shape)}")
        wide = finite(features)
        mean = wide.mean(0)
        centred = wide - mean
        return cls(n=len(wide), mean=mean, scatter=centred.T @ centred)

    @classmethod
    def from_blocks(cls, blocks: Iterable[Tensor]) -> FeatureStatistics:
        """Statistics of features that come (B, D) at a time, such as `Table.blocks()`; the memory does not grow with their number."""
        return merged(map(cls.from_features, blocks))

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of the union of two disjoint batches (Chan, Golub & LeVeque 1979, eq. 2.1). Raises ValueError for unequal D."""
        _check_dims(self, other)
        n = self.n + other.n
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.n / n)
        between = torch.outer(delta, delta).mul_(self.n * other.n / n)
        scatter = between.add_(self.scatter).add_(other.scatter)  # in place: of D = 2048 each matrix takes 34 MB
        return FeatureStatistics(n=n, mean=mean, scatter=scatter)

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance (D, D), divided by N - 1 as in every published FID. Raises ValueError for N < 2."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.n}")
        return self.scatter / (self.n - 1)


def _rank(of: Gaussian) -> int:
    """The largest that the covariance can have, of so many samples."""
    return of.mean.numel() if of.n is None else min(of.n - 1, of.mean.numel())


def finite(features: Tensor) -> Tensor:
    """Features (N, D) in fp64; ValueError where one is not finite, of which nothing can be measured."""
    wide = features.detach().double()
    if not bool(wide.isfinite().all()):
        raise ValueError(f"features of {int((~wide.isfinite().all(1)).sum())} of {len(wide)} images are not finite")
    return wide


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared 2-Wasserstein distance of two Gaussians: |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2 (Dowson & Landau 1982).

    Units are the features' squared. Symmetric eigenproblems only, so rank-deficient covariances need no epsilon. Of fewer samples than
    features, eigenvalues beyond the rank of N - 1 are rounding, whose roots would add up: they are left out. Each dead unit makes the value
    up to about 1e-8 of the traces too small, and what falls below zero is clamped.
    Raises ValueError for fewer than 2 samples; Unavailable, a ValueError too, for unequal dimensions.
    """
    _check_dims(a, b)
    return distance_from(a)(b)


def distance_from(a: Gaussian) -> Callable[[Gaussian], float]:
    """`frechet_distance(a, ...)` to one after the other: of two eigenproblems that of `a` is solved once."""
    cov_a = a.cov
    values, vectors = torch.linalg.eigh(_symmetric(cov_a))
    values[: -_rank(a)] = 0
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(b: Gaussian) -> float:
        _check_dims(a, b)
        cov_b = b.cov
        cross = torch.linalg.eigvalsh(_symmetric(root @ cov_b @ root))[-min(_rank(a), _rank(b)) :].clamp(min=0).sqrt().sum()
        shift = (a.mean - b.mean).square().sum()
        return float((shift + cov_a.trace() + cov_b.trace() - 2 * cross).clamp(min=0))

    return distance


def table_statistics(table: Table) -> FeatureStatistics:
    """Statistics of all rows (N, D), N >= 1, a block at a time."""
    return FeatureStatistics.from_blocks(table.blocks())


def merged(parts: Iterable[FeatureStatistics]) -> FeatureStatistics:
    """Statistics of the union of disjoint parts, merged in their order."""
    return reduce(FeatureStatistics.merge, parts)


def distance_with_interval(table: Table, to: Gaussian, seed: int) -> tuple[float, tuple[float, float] | None]:
    """Fréchet distance of a table's rows (N, D), N >= 2, and where 95 % of such distances lie with other pictures drawn, by the jackknife over 10
    random groups; None for fewer than 20 rows.

    Flat memory: the groups' scatters, 10 D² in fp64 (336 MB for D = 2048). Time: one product of all rows and 12 eigenproblems of order D.
    """
    distance = distance_from(to)
    if len(table) < 2 * JACKKNIFE_GROUPS:
        return distance(table_statistics(table)), None
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    parts = [table_statistics(table.select(order[start::JACKKNIFE_GROUPS].sort().values)) for start in range(JACKKNIFE_GROUPS)]
    left_out = [distance(merged([*parts[:group], *parts[group + 1 :]])) for group in range(JACKKNIFE_GROUPS)]
    value = distance(merged(parts))
    return value, jackknife_interval(value, left_out)


def bootstrap_floor(features: Tensor, repeats: int, seed: int) -> tuple[float, float]:
    """Mean and standard deviation of the distance between a bootstrap resample (N of N, with replacement) and all of features (N, D).

    What a perfect generator of the same N would score against these very images. Repeat r draws with `seed + r`; repeats >= 2.
    """
    everything = FeatureStatistics.from_features(features)

    def distance(generator: torch.Generator) -> float:
        rows = torch.randint(len(features), (len(features),), generator=generator)
        return frechet_distance(FeatureStatistics.from_features(features[rows]), everything)

    return _spread(distance, repeats, seed)


def half_floor(features: Tensor, repeats: int, seed: int) -> tuple[float, float]:
    """Mean and standard deviation of the distance between two disjoint random halves of features (N, D).

    Both sides have N/2 samples, so its small-sample bias is larger than that of a generated set of N. Split r draws with `seed + r`.
    """

    def distance(generator: torch.Generator) -> float:
        rows = torch.randperm(len(features), generator=generator)
        first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        return frechet_distance(FeatureStatistics.from_features(features[first]), FeatureStatistics.from_features(features[second]))

    return _spread(distance, repeats, seed)


def _spread(distance: Callable[[torch.Generator], float], repeats: int, seed: int) -> tuple[float, float]:
    if repeats < 2:
        raise ValueError(f"a standard deviation needs at least 2 repeats, got {repeats}")
    values = torch.tensor([distance(torch.Generator().manual_seed(seed + r)) for r in range(repeats)], dtype=torch.float64)
    return float(values.mean()), float(values.std())


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _check_dims(a: Gaussian, b: Gaussian) -> None:
    if a.mean.shape != b.mean.shape:
        origins = [f" ({fit.origin})" if isinstance(fit, GaussianFit) and fit.origin else "" for fit in (a, b)]
        raise Unavailable(f"feature dimensions differ: {a.mean.numel()}{origins[0]} and {b.mean.numel()}{origins[1]}")
