"""Metrics that are the mean of a score of each picture and its prompt."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgen.evaluation.intervals import mean_interval
from fastgen.evaluation.metrics.base import Measured, Metric, Table, Unavailable, Value

if TYPE_CHECKING:
    from fastgen.evaluation.protocol import SampleSet


class PictureScores(Metric):
    """`shows` has one row, whose value is the mean of `picture_scores`; its interval is over pictures, or over prompts where a prompt has
    several pictures, wherever they lie, which are no independent draws."""

    @abstractmethod
    def picture_scores(self, measured: Measured) -> Tensor:
        """(N,) fp64, in the order of ids."""

    @property
    def name(self) -> str:
        return next(iter(self.shows))

    def scores(self, measured: Measured) -> dict[str, Tensor]:
        return {self.name: self.picture_scores(measured)}

    def measure(self, measured: Measured) -> list[Value]:
        samples = measured.sets[self.set]
        if not any(samples.prompts):
            raise Unavailable("compares pictures with their prompts, which these have none of")
        return [mean_value(self.name, self.picture_scores(measured), samples)]


def mean_value(name: str, scores: Tensor, samples: SampleSet) -> Value:
    """The mean of scores (N,) of a set's pictures; its interval is over the set's draws."""
    over = "prompts" if samples.repeats else "images"
    mean = mean_interval(scores, samples.groups if samples.repeats else None)
    known = None if mean.std is None else over
    return Value(name, mean.value, len(scores), mean.std, known, mean.interval, known)


def column(table: Table) -> Tensor:
    """(N,) fp64 of a table that holds one number a row."""
    return torch.cat([block.double().flatten() for block in table.blocks()])
