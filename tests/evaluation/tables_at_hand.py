"""Metrics measured on features that a test has at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastgen.evaluation.extractors.base import Feature
from fastgen.evaluation.frechet import FeatureStatistics, table_statistics
from fastgen.evaluation.metrics.base import Measured, Metric, Value
from fastgen.evaluation.protocol import SampleSet
from fastgen.evaluation.tables import Table


@dataclass(frozen=True)
class Real:
    """A reference whose features are in memory, by layer."""

    layers: Mapping[str, Tensor]

    def statistics(self, of: Feature) -> FeatureStatistics:
        return table_statistics(self.table(of))

    def table(self, of: Feature) -> Table:
        return Table(self.layers[of.layer])


def built(kind: type[Metric], **options: Any) -> Metric:
    """A metric with these options for a protocol of one set."""
    return kind(kind.Config(**options), ["pictures"])


def measure(metric: Metric, generated: Mapping[str, Tensor], real: Mapping[str, Tensor] | None = None, seed: int = 0) -> dict[str, Value]:
    """Values by name, of features by layer."""
    count = len(next(iter(generated.values())))
    needs = metric.needs()
    tables = {(name, one): Table(generated[one.layer]) for name, features in needs.generated.items() for one in features}
    sets = {name: SampleSet(name, ("",) * count, tuple(range(count))) for name in needs.generated}
    found = metric.measure(Measured(sets, tables, None if real is None else Real(real), seed=seed))
    return {value.name: value for value in found}
