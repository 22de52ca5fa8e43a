"""Result lines: one JSON object a line, on disk as soon as it is measured.

Every line has `slice`, `case`, `run` and `status`: measured, left out (with the `reason`) or failed (with the `reason`). A run is one start of
benchmarks/gpu.py; its line of slice `environment` says where and with what it measured, and what that machine's ceilings were then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.measuring.case import Row

# A measurement is made again where one of these differs. source: SHA-256 of the code that is measured.
IDENTITY = ("gpu", "torch", "triton", "source", "rehearsal")


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file. A last line that was torn when its writer was killed is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [row for i, line in enumerate(lines) if (row := _parsed(line, path, is_last=i == len(lines) - 1)) is not None]


def _parsed(line: str, path: Path, *, is_last: bool) -> Row | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        if is_last:
            return None
        raise SystemExit(f"{path}: a line that is no JSON: {line[:60]!r} ({error})") from error
    if not isinstance(row, dict) or not {"slice", "case", "run", "status"} <= row.keys():
        raise SystemExit(f"{path}: a line that is no result of `make gpu`: {line[:60]!r}")
    return row


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows and wait until they are on disk; a torn last line makes room for them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def environments(rows: Sequence[Row]) -> dict[str, Row]:
    """The environment of each run."""
    return {row["run"]: row for row in rows if row["slice"] == "environment"}


def like(rows: Sequence[Row], environment: Row) -> list[Row]:
    """The rows of all runs in the same environment, with the same code."""
    same = {run for run, other in environments(rows).items() if all(other.get(key) == environment.get(key) for key in IDENTITY)}
    return [row for row in rows if row["run"] in same]


def measured(rows: Sequence[Row], environment: Row) -> set[tuple[str, str]]:
    """(slice, case) of everything that has been measured in the same environment, by the same code."""
    return {(row["slice"], row["case"]) for row in like(rows, environment) if row["status"] == "measured"}


def tried(rows: Sequence[Row], run: str) -> set[tuple[str, str]]:
    """(slice, case) of everything that one run has measured, left out or seen fail."""
    return {(row["slice"], row["case"]) for row in rows if row["run"] == run}


def failed(rows: Sequence[Row]) -> set[tuple[str, str]]:
    """(slice, case) of everything that has failed or was killed, in any run."""
    return {(row["slice"], row["case"]) for row in rows if row["status"] == "failed"}


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of each case on each GPU the rows of the newest run that measured something of it; where none has, of the newest that tried."""
    gpus = {run: environment["gpu"] for run, environment in environments(rows).items()}
    rows = [row for row in rows if row["run"] in gpus]  # of a run that says not where it was, nothing is known
    chosen: dict[tuple[str, str, str], tuple[bool, str]] = {}
    for row in rows:  # in the order of time
        key, found = (gpus[row["run"]], row["slice"], row["case"]), row["status"] == "measured"
        if found or not chosen.get(key, (False, ""))[0]:
            chosen[key] = (found, row["run"])
    return [row for row in rows if chosen[gpus[row["run"]], row["slice"], row["case"]][1] == row["run"]]
