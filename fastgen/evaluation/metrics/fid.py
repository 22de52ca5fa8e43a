"""FID: Fréchet distance of Inception features (Heusel et al. 2017, arXiv:1706.08500)."""

from __future__ import annotations

from collections.abc import Callable

from fastgen.evaluation.frechet import Gaussian, distance_from, distance_with_interval, table_statistics
from fastgen.evaluation.metrics.base import Heading, Measured, Value
from fastgen.evaluation.metrics.inception_features import InceptionMetric

FEW = 10_000


class Fid(InceptionMetric):
    """`frechet.frechet_distance` of generated to real pictures' pool3 features; covariances are divided by N - 1.

    It falls with N: by a bias of about 1/N that differs between models, so only values of one N compare. The interval is of the spread between
    draws of as many pictures, not of that bias.
    """

    shows = {"fid": Heading("FID", "↓")}  # noqa: RUF012
    others = {"fid": "fd_inception"}  # noqa: RUF012
    _from: tuple[Gaussian, Callable[[Gaussian], float]] | None = None
    convention = "Frechet distance, covariances over N - 1, fp64 by eigh; interval: delete-a-group jackknife, 10 random groups"

    def measure(self, measured: Measured) -> list[Value]:
        real, table = self.statistics(measured), self.generated(measured)
        value, interval = distance_with_interval(table, real, measured.seed)
        remark = f"biased upwards by fewer than {FEW} images: compare equal counts only" if len(table) < FEW else None
        name = self.called(next(iter(self.shows)))
        return [Value(name, value, len(table), interval=interval, interval_over=interval and "jackknife", remark=remark)]

    def values(self, measured: Measured) -> dict[str, float]:
        """Without the interval; the reference's eigenproblem is solved once."""
        real, table = self.statistics(measured), self.generated(measured)
        if self._from is None or self._from[0] is not real:
            self._from = real, distance_from(real)
        return {self.called(next(iter(self.shows))): self._from[1](table_statistics(table))}
