"""Rows of a comparison on disk: each seed's own, and the means over seeds that are made of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgen.files import write_atomically

Rows = list[dict[str, Any]]


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def in_words(values: Sequence[float]) -> str:
    """Mean ± standard deviation, where there is one."""
    if not values:
        return "–"
    mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean:.3g} ± {spread:.2g}" if spread > 1e-9 * abs(mean) else f"{mean:.3g}"


def over_seeds(runs: Iterable[Rows]) -> Rows:
    """Mean and standard deviation over seeds of each metric of one recipe, one list of rows a seed; over the seeds that have it."""
    same: dict[tuple[str, int | None], Rows] = {}
    for row in (row for own in runs for row in own):
        same.setdefault((row["name"], row["steps"]), []).append(row)
    return [_mean(rows) for rows in same.values()]


def _mean(rows: Rows) -> dict[str, Any]:
    values = [row["value"] for row in rows]
    spread = {"std": statistics.stdev(values), "std_over": "seeds"} if len(values) > 1 else {}
    shared = {key: value for key, value in rows[0].items() if key not in ("seed", "provenance")}
    return {**shared, "value": statistics.mean(values), **spread, "seeds": [row["seed"] for row in rows]}


def with_means(seeds: Iterable[dict[str, Any]], order: Sequence[str]) -> Rows:
    """For each model its means over seeds, then every seed's own rows; models in this order, others after them."""
    runs: dict[str, dict[int, Rows]] = {}
    for row in seeds:
        runs.setdefault(row["model"], {}).setdefault(row["seed"], []).append(row)
    models = [*(name for name in order if name in runs), *(name for name in runs if name not in order)]
    return [row for name in models for row in _of_model([runs[name][seed] for seed in sorted(runs[name])])]


def _of_model(runs: Sequence[Rows]) -> Rows:
    return [*over_seeds(runs), *(row for own in runs for row in own)]
