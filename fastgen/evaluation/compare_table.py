"""A comparison of two results files as text: values, their difference, its interval and what that rests on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastgen.evaluation.headings import COSTS, heading, number, written
from fastgen.evaluation.results import model_key
from fastgen.evaluation.table import aligned

_MARKS = {"bootstrap": "", "jackknife": "*", "subsets": "‡", "unpaired": "†"}
_METHODS = {
    "bootstrap": "the same pictures' ids drawn again for both, {resamples} times",
    "jackknife": "* the same pictures left out of both, a tenth at a time",
    "subsets": "‡ the same random subsets of both",
    "unpaired": "† from what each file says of itself, as of independent pictures",
}


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Lines for the terminal: a block for each pair, and what the intervals are."""
    lines: list[str] = []
    for pair in comparison["pairs"]:
        lines += [*(f"{side}  {_model(pair[side])}" for side in "ab"), *_block(pair["differences"]), *pair["notes"], ""]
    used = {line.get("interval_over") for pair in comparison["pairs"] for line in pair["differences"]}
    told = [text.format(resamples=comparison["resamples"]) for method, text in _METHODS.items() if method in used]
    return "\n".join([*lines, "95 % intervals of b - a:", *told] if told else lines[:-1])


def _model(record: Mapping[str, Any]) -> str:
    return f"{record['file']}: {model_key(record['model'], record.get('steps'))}"


def _block(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["metric", "a", "b", "b - a", "95 % of b - a", "images"]
    return aligned([head, *(list(_cells(line)) for line in lines)], left=(0, 4))


def _cells(line: Mapping[str, Any]) -> Iterator[str]:
    """A difference has a decimal more than the values: it is the smaller number."""
    name = line["name"]
    a, b = (number({"name": name, "value": line[side]}) for side in "ab")
    yield f"{heading(name).text} {heading(name).better}".strip()
    yield a.text()
    yield b.text()
    decimals = a.decimals if a.decimals < 0 else max(a.decimals, b.decimals) + (name not in COSTS)
    yield _signed(b.value - a.value, decimals)
    yield _interval(line, decimals)
    yield "" if name in COSTS else f"{line['n']:,}"


def _interval(line: Mapping[str, Any], decimals: int) -> str:
    if "interval" not in line or line["name"] in COSTS:  # of seconds, where a rate is shown
        return ""
    return f"[{', '.join(_signed(end, decimals) for end in line['interval'])}]{_MARKS[line['interval_over']]}"


def _signed(value: float, decimals: int) -> str:
    return f"{'-' if value < 0 else '+' if value > 0 else ''}{written(abs(value), decimals)}"
