"""Metrics, found by file name."""

from __future__ import annotations

from fastgen.discovery import find_class, module_names
from fastgen.evaluation.metrics.base import Metric

_SHARED = ("base", "external_process", "inception_features", "picture_scores")


def metric_names() -> list[str]:
    return module_names(__name__, shared=_SHARED)


def find_metric(name: str, where: str = "") -> type[Metric]:
    """The metric in `metrics/<name>.py`; UserError for an unknown one. where: what named it."""
    return find_class(__name__, name, Metric, metric_names(), f"{where}unknown metric {name!r}")
