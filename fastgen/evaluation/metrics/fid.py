"""FID: Fréchet distance of Inception features (Heusel et al. 2017, arXiv:1706.08500)."""

from __future__ import annotations

from fastgen.evaluation.frechet import Gaussian
from fastgen.evaluation.metrics.base import Heading, Measured, Table
from fastgen.evaluation.metrics.frechet_metric import CONVENTION, FrechetMetric
from fastgen.evaluation.metrics.inception_features import InceptionMetric


class Fid(InceptionMetric, FrechetMetric):
    """The Fréchet distance of generated to real pictures' pool3 features."""

    shows = {"fid": Heading("FID", "↓")}  # noqa: RUF012
    others = {"fid": "fd_inception"}  # noqa: RUF012
    convention = f"Frechet distance, {CONVENTION}"

    def sides(self, measured: Measured) -> tuple[Table, Gaussian]:
        return self.generated(measured), self.statistics(measured)
