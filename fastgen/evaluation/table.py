"""Results as a table: aligned text for the terminal, Markdown for a README or a model card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastgen.evaluation.results import Row


class Column(NamedTuple):
    """A metric's heading and format; `rate` prints seconds per 1000 images as images per second."""

    heading: str
    metric: str
    decimals: int
    rate: bool = False


COLUMNS = (
    Column("prompt accuracy", "prompt_accuracy", 3),
    Column("parity accuracy", "parity_accuracy", 3),
    Column("FD-digits", "fd_digits", 2),
    Column("FD named", "fd_digits_named", 2),
    Column("FD pixel", "fd_digits_pixel", 2),
    Column("diversity", "diversity", 2),
    Column("Vendi", "vendi", 2),
    Column("modes", "mode_entropy", 2),
    Column("training s", "training_seconds", 0),
    Column("s/1000 images", "seconds_per_1000_images", 2),
    Column("images/s", "seconds_per_1000_images", 0, rate=True),
)
ABSENT = "–"


def summary_table(rows: Sequence[Row]) -> str:
    """Plain text, one line for each model and step count in order of appearance, numbers right-aligned, no standard deviations."""
    lines = _lines(rows, with_std=False)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )


def markdown_table(rows: Sequence[Row]) -> str:
    """The same lines as a Markdown table; a value with a standard deviation is printed as mean ± std."""
    head, *body = _lines(rows, with_std=True)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def _lines(rows: Sequence[Row], *, with_std: bool) -> list[list[str]]:
    """Headings, then one list of cells for each (model, steps, guidance, floor); rows of a single seed are left to their mean."""
    rows = [row for row in rows if "seed" not in row]
    groups: dict[tuple[str, int | None, float | None, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row.get("steps"), row.get("guidance"), _floor(row)), {})[row["name"]] = row
    measured = {row["name"] for row in rows}
    columns = [column for column in COLUMNS if column.metric in measured]
    lines = [["model", "steps", *(column.heading for column in columns)]]
    for (model, steps, guidance, floor), metrics in groups.items():
        several = len({w for m, _, w, _ in groups if m == model}) > 1
        label = model + (f", {floor}" if floor else "") + (f", w {guidance:g}" if several and guidance is not None else "")
        cells = [_cell(metrics.get(column.metric), column, with_std=with_std) for column in columns]
        lines.append([label, ABSENT if steps is None else str(steps), *cells])
    return lines


def _floor(row: Row) -> str:
    """The bootstrap floor shares a line with real rows that are no floor (accuracy, diversity): both use as many images as a model does."""
    floor = row.get("floor", "")
    return "" if floor == "bootstrap" else floor


def _cell(row: Row | None, column: Column, *, with_std: bool) -> str:
    if row is None:
        return ABSENT
    value, std = row["value"], row.get("std")
    if column.rate:
        # To first order a rate has the relative spread of its time.
        value, std = 1000 / value, None if std is None else std / value * 1000 / value
    text = f"{value:.{column.decimals}f}"
    return text if std is None or not with_std else f"{text} ± {std:.{column.decimals}f}"
