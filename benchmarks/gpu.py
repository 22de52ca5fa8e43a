"""Measure everything in the few minutes a GPU is there: `make gpu`. benchmarks/README.md says what to install or carry.

    python benchmarks/gpu.py                            # up to eight minutes; the same command again goes on where this one stopped
    python benchmarks/gpu.py --budget 3m --only attention train_step
    python benchmarks/gpu.py --wheels wheels --output out/gpu.jsonl    # on a borrowed machine: packages to use, and where to write
    python benchmarks/gpu.py --rehearse                 # everything with tiny shapes on the CPU; writes no results

Each slice runs in a process of its own, and each case's lines are on disk before the next case begins. What fails, runs over or cannot run
here is named and left out, and the rest goes on. Exit status: 0 when everything asked for has been measured, else 1; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

BEGAN = time.time()  # before anything slow is imported

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import table  # noqa: E402
from benchmarks.measuring import rows, wheels  # noqa: E402
from benchmarks.measuring.session import Session  # noqa: E402
from benchmarks.slices import SLICES, Slice  # noqa: E402

BUDGET, REHEARSAL = 480.0, 1800.0  # seconds; a rehearsal fails for what is broken, not for what else the machine has to do
ENDING = 15.0  # of the budget, that killing and the tables may take


def seconds(text: str) -> float:
    """`8m`, `90s` or a number of seconds, as seconds. ArgumentTypeError for anything else, and for less than half a minute."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text)
    value = float(match[1]) * {"s": 1, "m": 60, "h": 3600, None: 1}[match[2]] if match else 0.0
    if value < 30:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: such as 8m, 90s or 480, and at least 30s")
    return value


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--budget", type=seconds, help="time for all of it (default 8m; a rehearsal: 30m, all of it for any slice)")
    found.add_argument("--only", nargs="+", choices=[part.name for part in SLICES], metavar="SLICE", help="of " + ", ".join(p.name for p in SLICES))
    found.add_argument("--output", type=Path, help="the file of result lines; a new one begins with those of benchmarks/results/gpu.jsonl")
    found.add_argument("--wheels", type=Path, help="a folder of wheels (benchmarks/wheels.txt) to use without installing them")
    found.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, results in a temporary folder")
    return found


def main(arguments: list[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="fastgen-gpu-") as temporary:
        if not chosen.rehearse and not _has_gpu():
            print("error: no CUDA GPU is visible to PyTorch here, so nothing is measured; --rehearse tries everything on the CPU", file=sys.stderr)
            return 2
        packages = [] if chosen.wheels is None else [Path(temporary) / "packages"]
        if chosen.wheels is not None:
            wheels.install(chosen.wheels, packages[0])
        try:
            path = output(chosen.output, Path(temporary) if chosen.rehearse else None)
            log = path.with_suffix(".log").open("a", encoding="utf-8")
            rows.read(path)
        except OSError as error:
            print(f"error: --output: {error}", file=sys.stderr)
            return 2
        with log:
            budget = chosen.budget or (REHEARSAL if chosen.rehearse else BUDGET)
            slices = [part for part in SLICES if chosen.only is None or part.name in chosen.only]
            if chosen.rehearse:
                slices = [replace(part, seconds=budget) for part in slices]
            return measure(Session(path, log, BEGAN + budget - ENDING, chosen.rehearse, packages), slices)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def output(given: Path | None, rehearsing_in: Path | None) -> Path:
    """Where the lines go. A new file begins with the lines that the repository has, so that what they hold is not measured again."""
    path = given.resolve() if given else (table.RESULTS if rehearsing_in is None else rehearsing_in / "gpu.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder, not a file of lines")
    if not path.exists() and rehearsing_in is None and table.RESULTS.is_file():
        shutil.copyfile(table.RESULTS, path)
    return path


def measure(session: Session, slices: Sequence[Slice]) -> int:
    """Every slice, then the tables and what is missing. The exit status."""
    interrupted = False
    try:
        if session.begin():
            for part in slices:
                session.measure(part)
    except KeyboardInterrupt:
        interrupted = True
    session.say("\n" + table.markdown(rows.read(session.path)))
    for name, reason in session.unfinished.items():
        session.say(f"not measured in full: {name}: {reason}")
    if interrupted:
        session.say("interrupted: the same command again goes on there")
    if not session.rehearsal:
        session.say(f"lines: {session.path}, log: {session.path.with_suffix('.log')}; python benchmarks/table.py --write puts them into the pages")
    return 1 if interrupted or session.unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
