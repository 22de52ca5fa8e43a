"""Result lines survive a kill, and the newest measurement of each case counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.measuring import rows
from benchmarks.measuring.case import Row

SELF = {("environment", "environment")}


def environment(run: str, gpu: str = "H100", source: str = "s") -> Row:
    return {
        "slice": "environment",
        "case": "environment",
        "run": run,
        "status": "measured",
        "gpu": gpu,
        "torch": "2",
        "triton": "3",
        "source": source,
    }


def line(run: str, case: str = "a", status: str = "measured", **more: object) -> Row:
    return {"slice": "s", "case": case, "run": run, "status": status, **more}


def test_a_torn_last_line_is_forgotten_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.jsonl"
    rows.append(path, [line("1")])
    with path.open("a") as file:
        file.write('{"slice": "s", "cas')
    assert rows.read(path) == [line("1")]
    rows.append(path, [line("2")])
    assert rows.read(path) == [line("1"), line("2")]
    path.write_text("{nonsense\n" + path.read_text())
    with pytest.raises(SystemExit, match=r"no JSON: '\{nonsense'"):
        rows.read(path)
    path.write_text('{"a": 1}\n3\n')
    with pytest.raises(SystemExit, match=r"a line that is no result of `make gpu`: '\{\"a\": 1\}'"):
        rows.read(path)


def test_measured_and_tried() -> None:
    found = [
        environment("1"), line("1", "a"), line("1", "b", "failed"),
        environment("2", source="new"), line("2", "c"), environment("3", gpu="A100"), line("3", "d"),
    ]  # fmt: skip
    assert rows.measured(found, environment("4")) - SELF == {("s", "a")}
    assert rows.measured(found, environment("4", source="new")) - SELF == {("s", "c")}
    assert rows.measured(found, environment("4", gpu="A100")) - SELF == {("s", "d")}
    assert rows.tried(found, "1") - SELF == {("s", "a"), ("s", "b")}


def test_the_newest_measurement_counts_and_a_failure_only_where_there_is_none() -> None:
    found = [
        environment("1"), line("1", "a", x=1), line("1", "b", "failed"),
        environment("2"), line("2", "a", x=2), line("2", "a", "left out", contender="y"), line("2", "b", "left out"),
        environment("3"), line("3", "a", "failed"),
        environment("4", gpu="A100"), line("4", "a", x=4),
    ]  # fmt: skip
    kept = [row for row in rows.latest(found) if row["slice"] == "s"]
    assert kept == [line("2", "a", x=2), line("2", "a", "left out", contender="y"), line("2", "b", "left out"), line("4", "a", x=4)]
