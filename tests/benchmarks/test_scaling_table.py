"""The table of benchmarks/scaling.py: the newest row of each case that measured what the table shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import scaling


def row(processes: int, shard: str, rate: float, **more: Any) -> dict[str, Any]:
    numbers = {"samples_per_second": rate, "communication": 0.25, "stall": 0.5, "stall_beside": 0.125, "held_bytes": 2_500_000}
    return {"processes": processes, "shard": shard, "overrides": [], "device": "cpu", "cores": 2, "load": 0.1, **numbers, **more}


def test_the_newest_row_of_each_case_is_shown_one_process_first(tmp_path: Path) -> None:
    rows = [row(4, "fsdp", 40), row(2, "ddp", 20), row(1, "none", 1), row(2, "ddp", 21, overrides=["train.precision=bf16"]), row(1, "none", 10)]
    old = {key: value for key, value in row(2, "fsdp", 99).items() if key != "held_bytes"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in [*rows, old]), encoding="utf-8")
    body = scaling.table(path).splitlines()[6:]
    assert [line.split(" | ")[:3] for line in body] == [["| 1", "none", "10"], ["| 2", "ddp", "20"], ["| 4", "fsdp", "40"]]
    assert body[1] == "| 2 | ddp | 20 | 25% | 0.50 | 0.12 | 2.5 | cpu, 2, 0.1 |"
