"""Inception score: how sure a classifier is of single pictures and how evenly it sees all classes (Salimans et al. 2016, arXiv:1606.03498)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fastgen.evaluation.metrics.base import Heading, Measured, Needs, Table, Value
from fastgen.evaluation.metrics.inception_features import InceptionMetric, InceptionOptions, require


class InceptionScore(InceptionMetric):
    """Mean over splits of exp E KL(p(y|x) ‖ p(y)), at most the 1008 classes; it sees no real picture. std is that between splits."""

    class Config(InceptionOptions):
        splits: int = Field(10, ge=1, le=1000)

    shows = {"inception_score": Heading("IS", "↑")}  # noqa: RUF012
    others = {"inception_score": "score_inception"}  # noqa: RUF012
    layer = "logits_unbiased"
    convention = "softmax of logits without bias; pictures in random order, splits of equal size, mean and population std over splits"

    def needs(self) -> Needs:
        return Needs({self.set: (self.feature,)})

    def measure(self, measured: Measured) -> list[Value]:
        table = self.generated(measured)
        require(self.config.splits, "images (one a split)", len(table))
        scores = split_scores(table, self.config.splits, measured.seed)
        return [Value(self.called("inception_score"), float(scores.mean()), len(table), float(scores.std(correction=0)), "splits")]


def split_scores(logits: Table, splits: int, seed: int) -> Tensor:
    """(splits,) fp64 scores of logits (N, classes), N >= splits, in an order drawn by NumPy's RandomState: the same as torch-fidelity's with this
    seed."""
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    edges = [part * len(logits) // splits for part in range(splits + 1)]
    return torch.stack([score(logits.select(order[start:stop]).blocks()) for start, stop in pairwise(edges)])


def score(logits: Iterator[Tensor]) -> Tensor:
    """exp E KL(p(y|x) ‖ p(y)), p(y) = E p(y|x), of all rows of some blocks (n, classes): their mean negative entropy and that of p(y) suffice."""
    count, negative_entropy, total = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for block in logits:
        log_p = block.double().log_softmax(1)
        count, total = count + len(block), total + log_p.exp().sum(0)
        negative_entropy = negative_entropy + (log_p.exp() * log_p).sum()
    return (negative_entropy / count + torch.special.entr(total / count).sum()).exp()
