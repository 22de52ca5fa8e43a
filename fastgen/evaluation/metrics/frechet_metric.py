"""What metrics that are a Fréchet distance to the reference have in common: the interval, and what is said of few pictures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from fastgen.evaluation.frechet import Gaussian, distance_from, distance_with_interval, table_statistics
from fastgen.evaluation.metrics.base import Measured, Metric, Table, Value

FEW = 10_000
CONVENTION = "covariances over N - 1, fp64 by eigh; interval: delete-a-group jackknife, 10 random groups"


class FrechetMetric(Metric):
    """`frechet.frechet_distance` of generated pictures' features to those of the reference. One row.

    It falls with N: by a bias of about 1/N that differs between models, so only values of one N compare. The interval is of the spread between
    draws of as many pictures, not of that bias.
    """

    _from: tuple[Gaussian, Callable[[Gaussian], float]] | None = None

    @abstractmethod
    def sides(self, measured: Measured) -> tuple[Table, Gaussian]:
        """Generated features (N, D) and the reference's statistics; Unavailable where the two have no distance."""

    def measure(self, measured: Measured) -> list[Value]:
        (name,), (table, real) = self.rows, self.sides(measured)
        value, interval = distance_with_interval(table, real, measured.seed)
        remark = f"biased upwards by fewer than {FEW} images: compare equal counts only" if len(table) < FEW else None
        return [Value(name, value, len(table), interval=interval, interval_over=interval and "jackknife", remark=remark)]

    def values(self, measured: Measured) -> dict[str, float]:
        """Without the interval; the reference's eigenproblem is solved once."""
        (name,), (table, real) = self.rows, self.sides(measured)
        if self._from is None or self._from[0] is not real:
            self._from = real, distance_from(real)
        return {name: self._from[1](table_statistics(table))}
