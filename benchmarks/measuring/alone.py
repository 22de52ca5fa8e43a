"""A benchmark by itself: `python -m benchmarks.NAME --device cpu` prints its rows, and writes nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence

from benchmarks.measuring.case import Case, LeftOut, Row, Target
from benchmarks.measuring.clock import free_memory


def main(cases: Callable[[Target], Iterable[Case]], what: str, arguments: Sequence[str] | None = None) -> None:
    """what: the benchmark in a sentence, for --help. A case that fails ends it, with its traceback."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rehearsal", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="by the beginning of their names")
    chosen = parser.parse_args(arguments)
    for case in cases(Target(chosen.device, chosen.rehearsal)):
        if chosen.only is None or case.name.startswith(tuple(chosen.only)):
            for row in _rows(case):
                print(json.dumps({"case": case.name, **row}), flush=True)
            free_memory()


def _rows(case: Case) -> Iterable[Row]:
    try:
        return list(case.measure())
    except LeftOut as reason:
        return [{"status": "left out", "reason": str(reason)}]
