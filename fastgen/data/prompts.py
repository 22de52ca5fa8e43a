"""Prompt sets: text, with the probability each is drawn with."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastgen.data import digits, scenes, weighted
from fastgen.data.tables import csv_rows, parquet_rows
from fastgen.data.texts import flaw, missing, parse_json, read_lines, short
from fastgen.errors import UserError
from fastgen.files import expanded

KEY = "recipe key data.prompts"


def load_prompts(source: str) -> dict[str, float]:
    """Prompts and probabilities (they sum to 1) from `fastgen:digits`, `fastgen:scenes`, .txt (one a line), .jsonl, .csv or .parquet
    (`prompt`, and optionally `weight`), in upper case too. Repeated prompts add up. UserError names the key, the file and the line."""
    if source in (bundled := {"fastgen:digits": digits.prompts, "fastgen:scenes": scenes.prompts}):
        return bundled[source]()
    path = expanded(source)
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise UserError(f"{KEY}: {source!r} is none of {', '.join(bundled)}, *.txt, *.jsonl, *.csv, *.parquet")
    if problem := missing(path):
        raise UserError(f"{KEY}: {problem}")
    table: dict[str, list[float]] = {}
    for prompt, weight in readers[suffix](path):
        table.setdefault(prompt, []).append(weight)
    shares = dict(zip(table, weighted.shares(table.values()), strict=True))
    if not any(shares.values()):
        raise UserError(f"{KEY}: {source!r} holds no prompts with a positive weight")
    return {prompt: share for prompt, share in shares.items() if share > 0}


def _read_text(path: Path) -> Iterable[tuple[str, float]]:
    return ((line.strip(), 1.0) for line in read_lines(path, KEY) if line.strip())


def _read_jsonl(path: Path) -> Iterable[tuple[str, float]]:
    for number, line in enumerate(read_lines(path, KEY), 1):
        if line.strip():
            where = f"{str(path)!r} line {number}"
            yield _row(parse_json(line, f"{KEY}: {where}"), where)


def _read_csv(path: Path) -> Iterable[tuple[str, float]]:
    for row, where in csv_rows(path, KEY, "prompt"):
        weight = row.get("weight", 1.0)
        with suppress(ValueError):
            weight = float(weight)
        yield _row({**row, "weight": weight}, where)


def _read_parquet(path: Path) -> Iterable[tuple[str, float]]:
    return (_row(row, where) for row, where in parquet_rows(path, KEY, "prompt", ("weight",)))


def _row(row: Any, where: str) -> tuple[str, float]:
    prompt, weight = (row.get("prompt"), row.get("weight", 1.0)) if isinstance(row, dict) else (None, None)
    if not isinstance(prompt, str):
        raise UserError(f"{KEY}: {where} has no text field 'prompt': {short(row)}")
    if problem := flaw(prompt):
        raise UserError(f"{KEY}: {where}: the prompt {problem}")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= sys.float_info.max:
        raise UserError(f"{KEY}: {where} has weight {short(weight)}, not a number >= 0")
    return prompt, float(weight)
