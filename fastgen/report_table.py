"""A report's table of measurements: which metrics, under which headings, in which units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]  # an entry of results.json["metrics"]
ABSENT = "\N{EN DASH}"


class Metric(NamedTuple):
    """How a metric is printed: `better` is an arrow, or empty where more is not simply better."""

    heading: str
    better: str = ""
    decimals: int = 2


# In the order of the table's columns; a metric that is not listed comes last, under its own name.
METRICS = {
    "fd_digits": Metric("FD-digits", "↓"),
    "fid": Metric("FID", "↓"),
    "fid_infinity": Metric("FID∞", "↓"),
    "kid": Metric("KID", "↓", 5),
    "fd_dinov2": Metric("FD-DINOv2", "↓", 1),
    "cmmd": Metric("CMMD", "↓", 3),
    "clip_score": Metric("CLIP score", "↑"),
    "prompt_accuracy": Metric("prompt accuracy", "↑", 3),
    "parity_accuracy": Metric("parity accuracy", "↑", 3),
    "fd_digits_named": Metric("FD named", "↓"),
    "fd_digits_pixel": Metric("FD pixel", "↓"),
    "precision": Metric("precision", "↑", 3),
    "recall": Metric("recall", "↑", 3),
    "diversity": Metric("diversity"),
    "lpips_diversity": Metric("LPIPS diversity", "", 3),
    "vendi": Metric("Vendi score"),
    "mode_entropy": Metric("modes"),
    "seconds_per_1000_images": Metric("images/s", "↑", 0),
    "peak_memory_bytes": Metric("peak memory, MiB", "↓", 0),
}


def columns(rows: Iterable[Row]) -> list[str]:
    """Names of all metrics: those of METRICS first, in its order."""
    found = dict.fromkeys(row["name"] for row in rows)
    return [name for name in METRICS if name in found] + [name for name in found if name not in METRICS]


def table(groups: Mapping[str, Sequence[Row]], names: Sequence[str]) -> dict[str, Any] | None:
    """Headings and lines, one line for each (group, model, steps, guidance, floor); metrics that no line has are left out."""
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for group, rows in groups.items():
        for row in rows:
            # The bootstrap floor uses as many images as a model does, as do real rows that are no floor: they share a line.
            floor = None if row.get("floor") == "bootstrap" else row.get("floor")
            key = (group, row["model"], floor, row.get("steps"), row.get("guidance"))
            lines.setdefault(key, {})[row["name"]] = row
    if not lines:
        return None
    used = [name for name in names if any(name in line for line in lines.values())]
    first = {"run": any(group for group in groups), "model": True}
    ends = {"steps": any(key[3] is not None for key in lines), "guidance": any(key[4] is not None for key in lines)}
    return {
        "labels": [name for name, shown in first.items() if shown],
        "numbers": [name for name, shown in ends.items() if shown] + [f"{metric(name).heading} {metric(name).better}".strip() for name in used],
        "lines": [_line(key, line, used, first | ends) for key, line in lines.items()],
    }


def _line(key: tuple[Any, ...], line: Mapping[str, Row], used: Sequence[str], shown: Mapping[str, bool]) -> dict[str, Any]:
    group, model, floor, steps, guidance = key
    settings = [
        text for name, text in (("steps", steps), ("guidance", guidance)) if shown[name] for text in [ABSENT if text is None else f"{text:g}"]
    ]
    return {
        "labels": ([group] if shown["run"] else []) + [f"{model}, {floor}" if floor else model],
        "student": model == "student",
        "numbers": [(text, "") for text in settings]
        + [(formatted(line[name], with_std=True), remark(line[name])) if name in line else (ABSENT, "") for name in used],
    }


def metric(name: str) -> Metric:
    return METRICS.get(name) or Metric(name.replace("_", " "), "", -1)


def formatted(row: Row, *, with_std: bool = False) -> str:
    """A measurement as text, in the unit of its heading; a metric without a fixed number of decimals has four significant digits."""
    value, std, decimals = row["value"], row.get("std"), metric(row["name"]).decimals
    if row["name"] == "seconds_per_1000_images":
        # To first order a rate has the relative spread of its time.
        rate = 1000 / value
        value, std, decimals = rate, None if std is None else std / value * rate, 0 if rate >= 10 else 2
    elif row["name"] == "peak_memory_bytes":
        value, std = value / 2**20, None if std is None else std / 2**20
    texts = [f"{number:.4g}" if decimals < 0 else f"{number:,.{decimals}f}" for number in (value, std) if number is not None]
    return " ± ".join(texts if with_std else texts[:1])


def remark(row: Row) -> str:
    """What a number's tooltip says: unrounded value, number of images, what its spread is over."""
    parts = [f"{row['name']} = {row['value']:.6g}"] + ([f"n = {row['n']}"] if "n" in row else [])
    return ", ".join([*parts, f"± over {row['std_over']}"] if "std_over" in row else parts)
