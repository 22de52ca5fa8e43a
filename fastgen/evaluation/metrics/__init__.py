"""Metrics, found by file name."""

from __future__ import annotations

from collections.abc import Mapping

from fastgen.discovery import find_class, module_names
from fastgen.errors import UserError
from fastgen.evaluation.metrics.base import Metric

_SHARED = ("base", "external_process", "frechet_metric", "inception_features", "picture_scores")


def metric_names() -> list[str]:
    return module_names(__name__, shared=_SHARED)


def find_metric(name: str, where: str = "") -> type[Metric]:
    """The metric in `metrics/<name>.py`; UserError for an unknown one. where: what named it."""
    return find_class(__name__, name, Metric, metric_names(), f"{where}unknown metric {name!r}")


def refuse_shared_rows(metrics: Mapping[str, Metric], where: str = "") -> None:
    """UserError, which begins with `where` and names both, where two metrics have a row of one name: the one would stand for the other."""
    owners: dict[str, str] = {}
    for name, metric in metrics.items():
        for row in metric.rows:
            if (other := owners.setdefault(row, name)) != name:
                raise UserError(f"{where}metrics.{other} and metrics.{name} both have a row {row}: leave one of them out")
