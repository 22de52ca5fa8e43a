"""Results as a table: aligned text for the terminal, Markdown for a README or a model card."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from fastgen.evaluation.headings import ABSENT, COSTS, MEMORY, RATE, Number, heading, number, ordered
from fastgen.evaluation.results import Row

WIDEST = 140  # characters of a table with a line a model; wider ones have a line a metric
_WIDEST_BY_METRIC = 100
# What the pictures show comes before how they are distributed.
_FIRST = ("prompt_accuracy", "parity_accuracy", "scene_accuracy", "colour_accuracy", "digit_accuracy", "relation_accuracy")

Key = tuple[str, int | None, float | None, str]  # model, steps, guidance, floor
Groups = Mapping[Key, Mapping[str, Row]]


class Column(NamedTuple):
    """`seconds` prints a rate's seconds per 1000 images as they are."""

    heading: str
    metric: str
    seconds: bool = False


def summary_table(rows: Sequence[Row]) -> str:
    """Plain text in order of appearance: a line for each model and step count, without standard deviations; or, where there are intervals or
    too many metrics for that, a line for each metric, with both and with the number of images."""
    groups = _groups(rows)
    table = aligned(_lines(groups, with_std=False))
    if any("interval" in row for row in rows) or len(table[0]) > WIDEST:
        table = list(_by_metric(groups))
    return "\n".join(table)


def markdown_table(rows: Sequence[Row]) -> str:
    """A line for each model and step count; a value with a standard deviation is printed as mean ± std, one with an
    interval as mean [from, to]."""
    head, *body = _lines(_groups(rows), with_std=True)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def aligned(lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Lines of cells as text; left: columns that are flush left, the others are flush right."""
    columns = [(_left if place in left else _right)(cells) for place, cells in enumerate(zip(*lines, strict=True))]
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def _groups(rows: Sequence[Row]) -> Groups:
    """Rows by model, then by name; rows of a single seed are left to their mean."""
    groups: dict[Key, dict[str, Row]] = {}
    for row in rows:
        if "seed" not in row:
            groups.setdefault((row["model"], row.get("steps"), row.get("guidance"), _floor(row)), {})[row["name"]] = row
    return groups


def _floor(row: Row) -> str:
    """The bootstrap floor shares a line with real rows that are no floor (accuracy, diversity): both use as many images as a model does."""
    floor = row.get("floor", "")
    return "" if floor == "bootstrap" else floor


def _names(groups: Groups) -> list[str]:
    names = ordered(name for metrics in groups.values() for name in metrics)
    return [name for name in _FIRST if name in names] + [name for name in names if name not in _FIRST]


def _label(key: Key, groups: Groups) -> str:
    model, _, guidance, floor = key
    several = len({w for m, _, w, _ in groups if m == model}) > 1
    return model + (f", {floor}" if floor else "") + (f", w {guidance:g}" if several and guidance is not None else "")


def _columns(groups: Groups) -> list[Column]:
    columns = [Column(heading(name).text, name) for name in _names(groups) if name != MEMORY]
    at = next((i for i, column in enumerate(columns) if column.metric == RATE), len(columns))
    return columns[:at] + [Column("s/1000 images", RATE, seconds=True) for _ in columns[at : at + 1]] + columns[at:]


def _lines(groups: Groups, *, with_std: bool) -> list[list[str]]:
    """Headings, then one list of cells for each model, steps, guidance and floor."""
    columns = _columns(groups)
    lines = [["model", "steps", *(column.heading for column in columns)]]
    for key, metrics in groups.items():
        cells = [_cell(metrics.get(column.metric), column, with_std=with_std) for column in columns]
        lines.append([_label(key, groups), ABSENT if key[1] is None else str(key[1]), *cells])
    return lines


def _cell(row: Row | None, column: Column, *, with_std: bool) -> str:
    if row is None:
        return ABSENT
    known = Number(row["value"], row.get("std"), None, 2) if column.seconds else number(row)
    return " ".join(filter(None, [known.text(""), known.spread("") if with_std else ""]))


def _by_metric(groups: Groups) -> Iterator[str]:
    """A line for each metric, with as many models beside each other as fit."""
    keys = list(groups)
    while keys:
        counts = range(len(keys), 0, -1)
        count, table = next((n, each) for n in counts if len((each := _block(groups, keys[:n]))[0]) <= _WIDEST_BY_METRIC or n == 1)
        yield from table
        keys = keys[count:]
        if keys:
            yield ""


def _block(groups: Groups, keys: Sequence[Key]) -> list[str]:
    """Headings, then each metric that one of these models has: value and spread for each model, and the number of images."""
    names = [name for name in _names(groups) if any(name in groups[key] for key in keys)]
    columns = [_left(["metric", *(f"{heading(name).text} {heading(name).better}".strip() for name in names)])]
    for key in keys:
        cells = [groups[key].get(name) for name in names]
        values = _right([ABSENT if row is None else number(row).text() for row in cells])
        spreads = _left(["" if row is None else number(row).spread() for row in cells])
        steps = "" if key[1] is None else f", {key[1]} step{'s' * (key[1] > 1)}"
        columns.append(_left([_label(key, groups) + steps, *(f"{value} {spread}" for value, spread in zip(values, spreads, strict=True))]))
    columns.append(_right(["images", *(_counts(name, [groups[key].get(name) for key in keys]) for name in names)]))
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def _counts(name: str, rows: Sequence[Row | None]) -> str:
    """The number of images, several where models differ; costs have none that matters."""
    counts = dict.fromkeys(f"{row.get('n', 1):,}" for row in rows if row is not None)
    return "" if name in COSTS else " / ".join(counts)


def _left(cells: Sequence[str]) -> list[str]:
    width = max(map(len, cells))
    return [cell.ljust(width) for cell in cells]


def _right(cells: Sequence[str]) -> list[str]:
    width = max(map(len, cells))
    return [cell.rjust(width) for cell in cells]
