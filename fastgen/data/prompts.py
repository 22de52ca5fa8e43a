"""Prompt sets: text, with the probability each is drawn with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastgen.data import digits, weighted
from fastgen.errors import UserError

KEY = "recipe key data.prompts"


def load_prompts(source: str) -> dict[str, float]:
    """Prompts and probabilities (they sum to 1) from `fastgen:digits`, .txt (one a line), .jsonl or .parquet (`prompt`, and
    optionally `weight`). Repeated prompts add up. UserError names the key, the file and the line."""
    if source == "fastgen:digits":
        return digits.prompts()
    path = Path(source).expanduser()
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UserError(f"{KEY}: {source!r} is none of fastgen:digits, *.txt, *.jsonl, *.parquet")
    if not path.is_file():
        raise UserError(f"{KEY}: no file {source!r}")
    table: dict[str, list[float]] = {}
    for prompt, weight in readers[path.suffix](path):
        table.setdefault(prompt, []).append(weight)
    shares = dict(zip(table, weighted.shares(table.values()), strict=True))
    if not any(shares.values()):
        raise UserError(f"{KEY}: {source!r} holds no prompts with a positive weight")
    return {prompt: share for prompt, share in shares.items() if share > 0}


def _lines(path: Path) -> list[str]:
    try:
        # `splitlines` would also split at U+2028 and the like, which captions from the web contain; -sig drops a byte order mark.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{KEY}: {str(path)!r} is not UTF-8 text") from error


def _read_text(path: Path) -> Iterable[tuple[str, float]]:
    return ((line.strip(), 1.0) for line in _lines(path) if line.strip())


def _read_jsonl(path: Path) -> Iterable[tuple[str, float]]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:  # also of a number with more digits than Python reads
                raise UserError(f"{KEY}: {str(path)!r} line {number} is not JSON ({error})") from error
            yield _row(row, f"{str(path)!r} line {number}")


def _read_parquet(path: Path) -> Iterable[tuple[str, float]]:
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{KEY}: reading {str(path)!r} needs pyarrow: pip install 'fastgen-distill[data]'") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(f"{KEY}: {str(path)!r} is not a parquet file ({error})") from error
    for number, row in enumerate(rows, 1):
        yield _row(row, f"{str(path)!r} row {number}")


def _row(row: Any, where: str) -> tuple[str, float]:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f"{KEY}: {where} has no text field 'prompt'")
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= sys.float_info.max:
        raise UserError(f"{KEY}: {where} has weight {weight!r:.60}, not a number >= 0")
    return row["prompt"], float(weight)
