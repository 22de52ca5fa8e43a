"""Improved precision and recall: how much of one set of pictures lies among the other (Kynkäänniemi et al. 2019, arXiv:1904.06991)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from fastgen.evaluation.metrics.base import Heading, Measured, Table, Value
from fastgen.evaluation.metrics.inception_features import InceptionMetric, InceptionOptions, require

_BLOCK = 1024  # rows whose distances to as many others are in memory at once: 8 MiB in fp64


class PrecisionRecall(InceptionMetric):
    """precision: the share of generated pictures within a real picture's ball, whose radius is the distance to its k-th nearest real neighbour.
    recall: the share of real pictures within a generated one's. Both fall with the number of pictures on the other side: compare equal ones."""

    class Config(InceptionOptions):
        k: int = Field(3, ge=1, le=1000)

    resampling = "jackknife"  # a picture that is drawn twice is its own neighbour
    shows = {"precision": Heading("precision", "↑", 3), "recall": Heading("recall", "↑", 3)}  # noqa: RUF012
    others = {"precision": "precision_inception", "recall": "recall_inception"}  # noqa: RUF012
    convention = "balls to the k-th nearest neighbour, the picture itself not counted, borders included; Inception pool3 features, not VGG16's"

    def measure(self, measured: Measured) -> list[Value]:
        table, real = self.generated(measured), measured.real().table(self.feature)
        require(self.config.k + 1, "images (k + 1)", len(table), len(real))
        shares = {"precision": share_within(table, real, self.config.k), "recall": share_within(real, table, self.config.k)}
        return [Value(self.called(name), share, len(table)) for name, share in shares.items()]


def share_within(points: Table, centres: Table, k: int, block: int = _BLOCK) -> float:
    """The share of points (N, D) whose distance to one of the centres (M, D), M > k, is at most that centre's to its k-th nearest neighbour."""
    radii = squared_radii(centres, k, block)
    inside = 0
    for some in points.blocks(block):
        within = torch.zeros(len(some), dtype=torch.bool)
        for others, radius in zip(centres.blocks(block), radii.split(block), strict=True):
            within |= (squared_distances(some, others) <= radius).any(1)
        inside += int(within.sum())
    return inside / len(points)


def squared_radii(centres: Table, k: int, block: int = _BLOCK) -> Tensor:
    """(M,) fp64: each row's squared distance to its k-th nearest other row, in the features' units squared."""
    found: list[Tensor] = []
    for some in centres.blocks(block):
        nearest = torch.empty(len(some), 0, dtype=torch.float64)
        for others in centres.blocks(block):
            nearest = torch.cat([nearest, squared_distances(some, others)], 1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), largest=False).values  # one more, for the row itself
        found.append(nearest.amax(1))
    return torch.cat(found)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, m) fp64. What is below 1e-12 of the lengths is 0: |x|² + |y|² - 2 x y leaves rounding of equal rows, and features of different pictures
    differ by more than the 1e-6 of their root."""
    x, y = x.double(), y.double()
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = torch.addmm(lengths, x, y.T, alpha=-2)
    return squares.masked_fill_(squares < 1e-12 * lengths, 0)
