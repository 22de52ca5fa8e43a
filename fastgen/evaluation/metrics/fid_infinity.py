"""FID∞: what FID would be of endlessly many generated pictures (Chong & Forsyth 2020, arXiv:1911.07023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from fastgen.evaluation.frechet import Gaussian, distance_from, table_statistics
from fastgen.evaluation.metrics.base import Heading, Measured, Table, Value
from fastgen.evaluation.metrics.inception_features import InceptionMetric, InceptionOptions, require


class FidInfinity(InceptionMetric):
    """FID of random subsets of several sizes, extrapolated linearly in 1/N to 0. The generated pictures' bias goes, that of the reference's own
    number of pictures stays. Below some thousand pictures, fewer than features, FID is not linear in 1/N and what is left of the bias grows."""

    class Config(InceptionOptions):
        """points: sizes, evenly spaced from `smallest` (at most half of the pictures) to all pictures; each has a subset of its own."""

        points: int = Field(15, ge=2, le=1000)
        smallest: int = Field(5000, ge=2)

    shows = {"fid_infinity": Heading("FID∞", "↓")}  # noqa: RUF012
    others = {"fid_infinity": "fd_inception_infinity"}  # noqa: RUF012
    convention = "intercept of FID over 1/N by least squares, random subsets of evenly spaced sizes as in Chong & Forsyth's code"

    def measure(self, measured: Measured) -> list[Value]:
        real, table = self.statistics(measured), self.generated(measured)
        require(2 * self.config.points, "images", len(table))
        sizes = subset_sizes(len(table), self.config.points, self.config.smallest)
        distances = subset_distances(table, real, sizes, measured.seed)
        return [Value(self.called("fid_infinity"), intercept(sizes, distances), len(table))]


def subset_sizes(count: int, points: int, smallest: int) -> list[int]:
    """Evenly spaced from `smallest`, or half of `count` where that is less, to `count`."""
    return torch.linspace(min(smallest, count // 2), count, points, dtype=torch.float64).long().tolist()


def subset_distances(table: Table, real: Gaussian, sizes: Sequence[int], seed: int) -> list[float]:
    """Fréchet distances of random subsets, drawn one after the other from a generator seeded with `seed`, without replacement."""
    distance, generator = distance_from(real), torch.Generator().manual_seed(seed)
    rows = (torch.randperm(len(table), generator=generator)[:size].sort().values for size in sizes)
    return [distance(table_statistics(table.select(each))) for each in rows]


def intercept(sizes: Sequence[int], distances: Sequence[float]) -> float:
    """Where the least-squares line through (1/N, distance) meets 1/N = 0."""
    x, y = 1 / torch.tensor(sizes, dtype=torch.float64), torch.tensor(distances, dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean())
