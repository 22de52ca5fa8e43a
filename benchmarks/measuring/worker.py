"""One slice in a process of its own: `python -m benchmarks.measuring.worker SLICE MODULE FILE RUN UNTIL [--rehearsal]`.

It measures what FILE does not hold yet, writes each case's rows as soon as it has them, and names each case on a line of standard output
before it begins, so that whoever started it knows what it died of. Exit status: 0, or 3 where it stopped because of the time.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.measuring import rows
from benchmarks.measuring.case import Case, LeftOut, Row, Target
from benchmarks.measuring.clock import free_memory

BEGINS = "case: "
OUT_OF_TIME, BROKEN_DEVICE = 3, 4


def work(slice_name: str, cases: Iterable[Case], path: Path, run: str, until: float) -> int:
    """The exit status. A case that fails is written down as failed; after one that broke the device nothing more is begun. Cases for which
    there is no time are passed over, and those that failed or were killed in an earlier run come last, lest they keep the others waiting."""
    status = 0
    failed = rows.failed(rows.read(path))
    for case in sorted(cases, key=lambda case: (slice_name, case.name) in failed):
        before = rows.read(path)
        known = rows.measured(before, rows.environments(before)[run]) | rows.tried(before, run)
        if (slice_name, case.name) in known:
            continue
        if time.time() + case.seconds > until:
            status = OUT_OF_TIME
            continue
        print(f"{BEGINS}{case.name}", flush=True)
        began = time.perf_counter()
        found, broken = _measured(case)
        rows.append(path, [{"slice": slice_name, "case": case.name, "run": run, **row} for row in found])
        said = dict.fromkeys(f"{row['status']}{': ' + row['reason'] if 'reason' in row else ''}" for row in found)
        print(f"  {'; '.join(said)} ({time.perf_counter() - began:.1f} s)", flush=True)
        if broken:
            return BROKEN_DEVICE
        free_memory()
    return status


def _measured(case: Case) -> tuple[list[Row], bool]:
    """The rows of a case, or why there are none; and whether the device can go on."""
    try:
        return [{"status": "measured", **row} for row in case.measure()], False
    except LeftOut as reason:
        return [{"status": "left out", "reason": str(reason)}], False
    except torch.OutOfMemoryError as error:
        return [{"status": "left out", "reason": f"out of memory: {first_line(error)}"}], False
    except Exception as error:  # any: the next case shall be measured, and this one is named
        traceback.print_exc()
        return [{"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}], isinstance(error, torch.AcceleratorError)


def first_line(error: BaseException) -> str:
    """What an error says, up to 200 characters."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure one slice.")
    parser.add_argument("slice")
    parser.add_argument("module")
    parser.add_argument("file", type=Path)
    parser.add_argument("run")
    parser.add_argument("until", type=float)
    parser.add_argument("--rehearsal", action="store_true")
    chosen = parser.parse_args(arguments)
    target = Target("cpu" if chosen.rehearsal else "cuda", chosen.rehearsal)
    module, _, function = chosen.module.partition(":")
    cases = getattr(importlib.import_module(module), function or "cases")(target)
    return work(chosen.slice, cases, chosen.file, chosen.run, chosen.until)


if __name__ == "__main__":
    sys.exit(main())
