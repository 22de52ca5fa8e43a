"""A report's plots of measurements, and runs beside each other at the same steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fastgen import curves
from fastgen.evaluation.headings import ABSENT, COSTS, heading, number, ordered
from fastgen.report_table import Row, formatted, remark

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Groups = Mapping[str, Sequence[Row]]  # rows of results.json by run; "" where there is one run
Series = dict[str, dict[int, dict[str, Row]]]  # by label, steps and metric

MOST = 6  # panels of quality
DIVERSITY = ("recall", "diversity", "lpips_diversity", "dino_diversity", "vendi", "mode_entropy")


def against_steps(groups: Groups) -> list[str]:
    """SVG of the first measures of quality, each against the number of steps, a line for each model; those with one point are left out."""
    series, real = _series(groups), _real(groups)
    measured = ordered(name for points in series.values() for rows in points.values() for name in rows)
    names = [name for name in measured if name not in COSTS and heading(name).better]
    shown = [name for name in names if sum(name in rows for points in series.values() for rows in points.values()) > 1][:MOST]
    return curves.drawn({f"{heading(name).text} against steps": partial(_draw_steps, name=name, series=series, real=real) for name in shown})


def diversity_beside_quality(groups: Groups) -> list[str]:
    """SVG of each measure of diversity against the first distance, a point for each model and number of steps."""
    series, real = _series(groups), _real(groups)
    every = [rows for points in series.values() for rows in points.values()]
    quality = next((name for name in ordered(name for rows in every for name in rows) if heading(name).better == "↓" and name not in COSTS), None)
    if quality is None:
        return []
    shown = [name for name in DIVERSITY if any(name in rows and quality in rows for rows in every)]
    panels = {
        f"{heading(name).text} beside {heading(quality).text}": partial(_draw_pair, x=quality, y=name, series=series, real=real) for name in shown
    }
    return curves.drawn(panels)


def point_by_point(groups: Groups) -> dict[str, Any] | None:
    """A table with a line for each metric and number of steps of the students, and a column for each run; None for fewer than two with results."""
    if sum(bool(rows) for rows in groups.values()) < 2:
        return None
    points: dict[str, dict[int, dict[str, Row]]] = {}
    for run, rows in groups.items():
        for row in _of_models(rows):
            if row["model"] == "student" and "steps" in row:
                points.setdefault(row["name"], {}).setdefault(row["steps"], {})[run] = row
    lines = [
        {
            "labels": ["" if place else f"{heading(name).text} {heading(name).better}".strip()],
            "student": False,
            "numbers": [
                (str(steps), ""),
                *((formatted(found[run], with_std=True), remark(found[run])) if run in found else (ABSENT, "") for run in groups),
            ],
        }
        for name in ordered(points)
        for place, (steps, found) in enumerate(sorted(points[name].items()))
    ]
    return {"labels": ["metric"], "numbers": ["steps", *groups], "lines": lines} if lines else None


def _of_models(rows: Sequence[Row]) -> Iterator[Row]:
    """Not of real pictures, and not of a single seed, whose mean has a row of its own."""
    return (row for row in rows if row["model"] != "real" and "floor" not in row and "seed" not in row)


def _series(groups: Groups) -> Series:
    """What takes steps, by model, or by run, the runs first, also those without results: a colour is a place in this order. A teacher that
    several runs have measured is one, and the first to have measured a point tells it."""
    found: Series = {run: {} for run in groups if run}
    for run, rows in groups.items():
        guidances = {row.get("guidance") for row in _of_models(rows) if row["model"] == "teacher"}
        for row in _of_models(rows):
            if row.get("steps") is None:
                continue
            is_teacher = row["model"] == "teacher"
            label = "teacher" if is_teacher else run if run and row["model"] == "student" else f"{run} {row['model']}".strip()
            if is_teacher and len(guidances) > 1 and row.get("guidance") is not None:
                label += f", guidance {row['guidance']:g}"
            found.setdefault(label, {}).setdefault(row["steps"], {}).setdefault(row["name"], row)
    return found


def _real(groups: Groups) -> dict[str, Row]:
    """What real pictures score, as many as a model draws."""
    rows = [row for rows in groups.values() for row in rows if row["model"] == "real" and row.get("floor") in (None, "bootstrap")]
    return {row["name"]: row for row in reversed(rows)}


def _draw_steps(axes: Axes, *, name: str, series: Series, real: Mapping[str, Row]) -> None:
    every: set[int] = set()
    values: list[float] = []
    for i, (label, points) in enumerate(series.items()):
        steps = sorted(count for count, rows in points.items() if name in rows)
        known = [number(points[count][name]) for count in steps]
        spread = [[abs(end - each.value) for end in each.interval] if each.interval else [each.std or 0.0] * 2 for each in known]
        if steps:
            bars = list(map(list, zip(*spread, strict=True)))
            axes.errorbar(
                steps,
                [each.value for each in known],
                yerr=bars,
                marker="o",
                markersize=4,
                linewidth=1.4,
                elinewidth=1,
                capsize=2,
                color=curves.COLOURS[i % len(curves.COLOURS)],
                label=curves.in_legend(label),
            )
        every |= set(steps)
        values += [each.value for each in known]
    if name in real:
        values.append(number(real[name]).value)
        axes.axhline(values[-1], color=curves.INK, linewidth=1, linestyle=(0, (4, 3)), label="real")
    if curves.wide_range(values):
        _logarithmic(axes, "y")
    _logarithmic(axes, "x")
    axes.set_xlim(min(every) / 1.25, max(every) * 1.25)
    axes.set_xticks(_apart(sorted(every)))
    axes.set_title(f"{heading(name).text} {heading(name).better}", loc="left", fontsize=10)
    axes.set_xlabel("steps")
    axes.grid(alpha=0.15, color=curves.INK)
    axes.legend(frameon=False, fontsize=8)


def _draw_pair(axes: Axes, *, x: str, y: str, series: Series, real: Mapping[str, Row]) -> None:
    values: list[float] = []
    for i, (label, points) in enumerate(series.items()):
        both = {steps: (number(rows[x]).value, number(rows[y]).value) for steps, rows in sorted(points.items()) if x in rows and y in rows}
        if not both:
            continue
        colour = curves.COLOURS[i % len(curves.COLOURS)]
        axes.plot(*zip(*both.values(), strict=True), marker="o", markersize=4, linewidth=0.7, color=colour, label=curves.in_legend(label))
        for steps, place in both.items():
            axes.annotate(str(steps), place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        values += [place[0] for place in both.values()]
    if x in real and y in real:
        place = number(real[x]).value, number(real[y]).value
        axes.plot(*place, marker="*", markersize=8, linewidth=0, color=curves.INK, label="real")
        values.append(place[0])
    if curves.wide_range(values):
        _logarithmic(axes, "x")
    axes.margins(0.12)
    axes.set_title(f"{heading(y).text} {heading(y).better}".strip(), loc="left", fontsize=10)
    axes.set_xlabel(f"{heading(x).text} {heading(x).better}")
    axes.grid(alpha=0.15, color=curves.INK)
    axes.legend(frameon=False, fontsize=8)


def _logarithmic(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
    axis.set_tick_params(which="minor", length=0)


def _apart(steps: Sequence[int]) -> list[int]:
    """Those whose numbers have room beside each other on a logarithmic axis."""
    kept: list[int] = []
    for count in steps:
        if not kept or count >= 1.25 * kept[-1]:
            kept.append(count)
    return kept
