"""KID: squared maximum mean discrepancy of Inception features (Bińkowski et al. 2018, arXiv:1801.01401)."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fastgen.evaluation.metrics.base import Heading, Measured, Subsets, Table, Value
from fastgen.evaluation.metrics.inception_features import InceptionMetric, InceptionOptions, require


class Kid(InceptionMetric):
    """Mean over random subsets of the unbiased estimate, which can fall below 0. std is that between subsets, as published ones are: not the
    uncertainty of their mean, whose subsets share pictures."""

    class Config(InceptionOptions):
        subsets: int = Field(100, ge=1, le=10**5)
        subset_size: int = Field(1000, ge=2)

    resampling = "jackknife"  # a picture that is drawn twice is like itself
    shows = {"kid": Heading("KID", "↓", 5)}  # noqa: RUF012
    others = {"kid": "mmd_inception"}  # noqa: RUF012
    convention = "unbiased MMD^2, kernel (x y / D + 1)^3, mean and population std over subsets; not multiplied by 1000"

    def measure(self, measured: Measured) -> list[Value]:
        values = self._values(measured)
        return [Value(self.called("kid"), float(values.mean()), len(self.generated(measured)), float(values.std(correction=0)), "subsets")]

    def subsets(self, measured: Measured) -> dict[str, Subsets]:
        return {self.called("kid"): Subsets(self._values(measured), self.config.subset_size / len(self.generated(measured)))}

    def _values(self, measured: Measured) -> Tensor:
        table, real, size = self.generated(measured), measured.real().table(self.feature), self.config.subset_size
        require(size, "images (subset_size)", len(table), len(real))
        return subset_discrepancies(table, real, subsets=self.config.subsets, size=size, seed=measured.seed)


def subset_discrepancies(generated: Table, real: Table, *, subsets: int, size: int, seed: int) -> Tensor:
    """(subsets,) fp64 of `squared_discrepancy` of `size` pictures of each side, drawn without replacement by NumPy's RandomState: the same as
    torch-fidelity draws with this seed."""
    random = np.random.RandomState(seed)

    def draw(table: Table) -> Tensor:
        return table.take(torch.from_numpy(random.choice(len(table), size, replace=False))).double()

    return torch.stack([squared_discrepancy(draw(generated), draw(real)) for _ in range(subsets)])


def squared_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased MMD² of x (n, D) and y (m, D), fp64, with the kernel (x y / D + 1)³ (Bińkowski et al. 2018, eq. 4)."""
    return _off_diagonal_mean(_kernel(x, x)) + _off_diagonal_mean(_kernel(y, y)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_mean(kernel: Tensor) -> Tensor:
    n = len(kernel)
    return (kernel.sum() - kernel.trace()) / (n * (n - 1))
