"""A report's table of measurements: lines of models, columns of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastgen.evaluation.headings import ABSENT, heading, number

Row = Mapping[str, Any]  # an entry of results.json["metrics"]


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
        "numbers": [name for name, shown in ends.items() if shown] + [f"{heading(name).text} {heading(name).better}".strip() for name in used],
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


def formatted(row: Row, *, with_std: bool = False) -> str:
    """A measurement as text, in the unit of its heading; with_std: and its interval or its standard deviation."""
    known = number(row)
    return " ".join(filter(None, [known.text(), known.spread() if with_std else ""]))


def remark(row: Row) -> str:
    """What a number's tooltip says: unrounded value, number of images, what its spread is over, its interval."""
    parts = [f"{row['name']} = {row['value']:.6g}"] + ([f"n = {row['n']}"] if "n" in row else [])
    parts += [f"± over {row['std_over']}"] if "std_over" in row else []
    if interval := row.get("interval"):
        parts.append(f"95 % in [{interval[0]:.6g}, {interval[1]:.6g}]" + (f" over {row['interval_over']}" if "interval_over" in row else ""))
    return ", ".join(parts + ([row["remark"]] if "remark" in row else []))
