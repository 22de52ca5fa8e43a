"""How rows of results are headed and in which unit they are printed, in every table. A metric's class says its own headings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from fastgen.evaluation.metrics import find_metric, metric_names
from fastgen.evaluation.metrics.base import Heading

ABSENT = "\N{EN DASH}"
RATE, MEMORY = "seconds_per_1000_images", "peak_memory_bytes"
COSTS = {
    "training_seconds": Heading("training s", "↓", 0),
    "network_passes": Heading("network passes", "", 0),
    RATE: Heading("images/s", "↑", 0),
    MEMORY: Heading("peak memory, MiB", "↓", 0),
}
# Distances to real pictures, agreement with the prompt, preferences, what makes up quality, diversity; what is not here comes after it.
_ORDER = (
    *("fd_digits", "fd_scenes", "fd_scenes_teacher", "fid", "fid_infinity", "sfid", "patch_fid", "kid", "fd_dinov2", "cmmd"),
    *("clip_score", "prompt_accuracy", "parity_accuracy"),
    *("scene_accuracy", "colour_accuracy", "digit_accuracy", "relation_accuracy"),
    *("pick_score", "hps_v21", "image_reward", "aesthetic"),
    *("fd_digits_named", "fd_digits_pixel", "inception_score", "precision", "recall"),
    *("diversity", "lpips_diversity", "dino_diversity", "vendi", "mode_entropy", "teacher_error"),
)


class Number(NamedTuple):
    """A measurement in the unit of its heading."""

    value: float
    std: float | None
    interval: tuple[float, float] | None
    decimals: int

    def text(self, thousands: str = ",") -> str:
        return written(self.value, self.decimals, thousands)

    def spread(self, thousands: str = ",") -> str:
        """The interval in brackets, or, where there is none, ± the standard deviation; empty without either. The standard deviation of single
        pictures' scores always has an interval beside it, and does not pass for the mean's."""
        if self.interval is not None:
            return f"[{', '.join(written(end, self.decimals, thousands) for end in self.interval)}]"
        return "" if self.std is None else f"± {written(self.std, self.decimals, thousands)}"


def heading(name: str) -> Heading:
    """Of the rows called `name`; a name that no metric knows is a heading of its own, with four significant digits."""
    return _headings().get(name) or Heading(name.replace("_", " "), "", -1)


def ordered(names: Iterable[str]) -> list[str]:
    """Each name once, in the order of a table's columns; names that nothing knows come last, as they come."""
    found, known = dict.fromkeys(names), [*_ORDER, *(name for name in _headings() if name not in _ORDER and name not in COSTS), *COSTS]
    return [name for name in known if name in found] + [name for name in found if name not in known]


def number(row: Mapping[str, Any]) -> Number:
    """A row's measurement: seconds per 1000 images become images per second, bytes MiB."""
    value, std, interval = row["value"], row.get("std"), row.get("interval")
    interval = None if interval is None else (interval[0], interval[1])
    if row["name"] == RATE:
        # To first order a rate has the relative spread of its time.
        rate, spread = 1000 / value, None if std is None else std / value * 1000 / value
        return Number(rate, spread, interval and (1000 / interval[1], 1000 / interval[0]), 0 if rate >= 10 else 2)
    if row["name"] == MEMORY:
        return Number(value / 2**20, None if std is None else std / 2**20, interval and (interval[0] / 2**20, interval[1] / 2**20), 0)
    return Number(value, std, interval, heading(row["name"]).decimals)


def written(number: float, decimals: int, thousands: str = ",") -> str:
    return f"{number:.4g}" if decimals < 0 else f"{number:{thousands}.{decimals}f}"


@cache
def _headings() -> dict[str, Heading]:
    """Of all metrics, in the order of their files, and of the costs."""
    return {name: each for metric in metric_names() for name, each in find_metric(metric).shows.items()} | COSTS
