"""What does an evaluation cost: memory, whatever the number of pictures, and time beside torch-fidelity's?

    python benchmarks/evaluation.py                    # everything, some hours on two cores; appends to benchmarks/results/evaluation.jsonl
    python benchmarks/evaluation.py --only speed fid   # only these
    python benchmarks/evaluation.py --write            # measures nothing: puts the table into fastgen/evaluation/README.md

`line`: 5,000 and 50,000 synthetic pictures of 256 x 256 against as many JPEGs, from drawing to metrics, in a process each, whose resident memory
is read stage by stage. The Inception network is replaced by one small convolution with as many features: 100,000 real passes would take hours
here, and need the same memory at each count. `speed`: the real network with random weights, beside `torch_fidelity.calculate_metrics`. `fid`,
`neighbours`: FID's and precision and recall's arithmetic on random features, beside torch-fidelity's; the latter grows with the square.

Each measurement is a process of its own with so many threads. Seconds are processor time of that process, unless they are called wall time:
others may be using the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.evaluating import beside_torch_fidelity, line  # noqa: E402
from benchmarks.measuring.case import THREADS, Row  # noqa: E402
from benchmarks.table import between  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "evaluation.jsonl"
PAGE = ROOT / "fastgen" / "evaluation" / "README.md"


@dataclass(frozen=True)
class Measurement:
    """measure: gives a row of `count` pictures, in a process with so many threads."""

    what: str
    measure: Callable[[int], Row]
    count: int
    threads: int = 1


MEASUREMENTS = (
    *(Measurement("speed", beside_torch_fidelity.speed, 64, threads) for threads in (1, 2)),
    *(Measurement("fid", beside_torch_fidelity.fid_arithmetic, count) for count in (5_000, 50_000)),
    *(Measurement("neighbours", beside_torch_fidelity.neighbours, count) for count in (5_000, 10_000)),
    *(Measurement("line", line.measure, count) for count in (5_000, 50_000)),
)


def apart(one: Measurement) -> Row:
    """A measurement in a new process, which nothing has left memory in. Threads are counted when libraries are loaded."""
    os.environ |= dict.fromkeys(THREADS, str(one.threads))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(one.measure, one.count).result()


def origin() -> Row:
    """load: processes that wanted a processor in the last 15 minutes, on average."""
    packages = {name: version(name) for name in ("torch", "torch-fidelity", "numpy")}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **packages},
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[2], 1),
    }


def newest(path: Path) -> list[Row]:
    """Of each measurement in a file of lines the last, in the order of MEASUREMENTS."""
    rows = [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    found = {(row["what"], row["count"], row["threads"]): row for row in rows}
    return [found[key] for one in MEASUREMENTS if (key := (one.what, one.count, one.threads)) in found]


def markdown(rows: Sequence[Row]) -> str:
    """Two tables: of the whole line, and beside torch-fidelity."""
    lines = [row for row in rows if row["what"] == "line"]
    return "\n\n".join(["\n".join(table) for table in (_line_table(lines), _beside_table([row for row in rows if row["what"] != "line"])) if table])


_STAGES = {
    "start": "start", "reference": "reference", "pictures": "pictures", "fid": "FID", "fid_infinity": "FID∞", "kid": "KID",
    "inception_score": "IS", "sfid": "sFID",
}  # fmt: skip


def _line_table(rows: Sequence[Row]) -> list[str]:
    """Peak memory and seconds of each stage."""
    if not rows:
        return []
    titles = ["pictures, generated and real", "", *_STAGES.values(), "whole"]
    cells = []
    for row in rows:
        costs = [row["stages"][stage] for stage in _STAGES]
        cells.append([f"{row['count']:,}", "peak, GB", *(_giga(cost["peak_bytes"]) for cost in costs), f"**{_giga(row['peak_bytes'])}**"])
        seconds = [cost["cpu_seconds"] for cost in costs]
        cells.append(["", "seconds", *(_number(each) for each in seconds), _number(sum(seconds))])
    return _table(titles, cells, left=2)


def _beside_table(rows: Sequence[Row]) -> list[str]:
    """One line for what a row says of both: time, and memory."""
    cells = [cell for row in rows for cell in _BESIDE[row["what"]](row)]
    return _table(["", "fastgen", "torch-fidelity", "fastgen's share"], cells, left=1) if cells else []


def _speed(row: Row) -> list[list[str]]:
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    rates = {name: {**row[name], "rate": row["count"] / row[name]["cpu_seconds"], "wall": row["count"] / row[name]["seconds"]} for name in _BOTH}
    said = f"pictures a second, Inception, {threads}"
    per_core = [_pair(f"{said}, of processor time", rates, "rate", _number)]
    return [*per_core, _pair(f"{said}, wall time", rates, "wall", _number), _pair(f"its peak memory, GB, {threads}", row, "peak_bytes", _giga)]


def _arithmetic(title: str) -> Callable[[Row], list[list[str]]]:
    def cells(row: Row) -> list[list[str]]:
        said = f"{title}, {row['count']:,} and {row['count']:,} pictures"
        return [_pair(f"{said}: seconds", row, "cpu_seconds", _number), _pair(f"{said}: peak, GB", row, "peak_bytes", _giga)]

    return cells


_BOTH = ("fastgen", "torch_fidelity")
_BESIDE: Mapping[str, Callable[[Row], list[list[str]]]] = {
    "speed": _speed,
    "fid": _arithmetic("FID of features"),
    "neighbours": _arithmetic("precision and recall of features"),
}


def _pair(title: str, row: Row, key: str, shown: Callable[[float], str]) -> list[str]:
    ours, theirs = (row[name][key] for name in _BOTH)
    return [title, shown(ours), shown(theirs), f"{ours / theirs:.2f}"]


def _table(titles: Sequence[str], cells: Sequence[Sequence[str]], left: int) -> list[str]:
    rule = "|" + "---|" * left + "---:|" * (len(titles) - left)
    return [f"| {' | '.join(titles)} |", rule, *(f"| {' | '.join(row)} |" for row in cells)]


def _giga(count: float) -> str:
    return f"{count / 1e9:.2f}"


def _number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def write(page: Path, table: str) -> None:
    """Into a page that has the markers."""
    if page.is_file() and "<!-- evaluation:begin -->" in (text := page.read_text(encoding="utf-8")):
        page.write_text(between(text, "evaluation", table), encoding="utf-8")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted({one.what for one in MEASUREMENTS}))
    parser.add_argument("--counts", nargs="+", type=int, help="only measurements of so many pictures")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="measure nothing, put the table into the page")
    chosen = parser.parse_args(given)
    for one in () if chosen.write else MEASUREMENTS:
        if (chosen.only is None or one.what in chosen.only) and (chosen.counts is None or one.count in chosen.counts):
            row = {"what": one.what, "count": one.count, "threads": one.threads, **apart(one), **origin()}
            print(json.dumps(row), flush=True)
            with chosen.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    table = markdown(newest(chosen.output))
    print(table)
    if chosen.write:
        write(PAGE, table)


if __name__ == "__main__":
    main()
