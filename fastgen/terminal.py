"""What the command line shows: progress bars on stderr, results on stdout."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from fastgen import run
from fastgen.evaluation.table import summary_table

_SHOWN = ("loss/", "grad_norm/student", "eval/")


def echo(text: str) -> None:
    """A line of output."""
    print(text)


def note(text: str) -> None:
    """A line about what happened and where it is."""
    print(text, flush=True)


def warn(text: str) -> None:
    """A line about what did not go as it may have been meant."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "–/s")


class Bars(run.Progress):
    """A rich progress bar with rate, time left and the numbers that matter."""

    def __init__(self) -> None:
        quiet()
        self.console = Console(stderr=True)
        self.bar: Progress | None = None

    def stage(self, message: str) -> None:
        self.console.print(message, style="dim", highlight=False)

    def start(self, what: str, total: int, done: int = 0) -> None:
        counts = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self.bar = Progress(*counts, TextColumn("{task.fields[numbers]}"), console=self.console)
        self.task = self.bar.add_task(what, total=total, completed=done, numbers="")
        self.bar.start()

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        shown = "  ".join(f"{key.removeprefix('loss/')} {value:.3g}" for key, value in numbers.items() if key.startswith(_SHOWN))
        if self.bar is not None:
            self.bar.update(self.task, completed=done, numbers=shown)

    def warn(self, message: str) -> None:
        # Its console is the bar's, which moves down; whole, so that no line break falls into a recipe key.
        self.console.print(message, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def finish(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def quiet() -> None:
    """Our bars are enough: no loading bars or advice from the libraries below, and what fails is said once, by our own error."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity(logging.CRITICAL)


def print_results(rows: list[Any]) -> None:
    """The short table of an evaluation."""
    echo(summary_table(rows))


def print_run(folder: Path) -> None:
    """Where a finished run's products lie, and its results."""
    results = folder / "results.json"
    if results.is_file():
        print_results(json.loads(results.read_text())["metrics"])
    newest = sorted((folder / "samples").glob("step_*.png"))[-1:]
    for name, path in [("student", folder / "student"), *(("samples", path) for path in newest), ("report", folder / "report.html")]:
        if path.exists():
            note(f"{name + ':':9s}{path}")
    note(f"{'run:':9s}{folder}")


def print_plan(plan: Mapping[str, Any]) -> None:
    """The outcome of --dry-run."""
    note(f"method      {plan['method']}, {plan['steps']} steps")
    note(f"teacher     {plan['teacher']} ({plan['family']})")
    width = max(12, *(len(name) + 2 for name in plan["roles"]))
    for name, role in plan["roles"].items():
        note(f"role        {name:<{width}}{role['tuning']:14s}{role['trains']:>14,} trained parameters")
    note(f"parameters  {plan['parameters']:,} in all")
    note(f"memory      {plan['bytes'] / 2**20:,.1f} MiB for weights, gradients, Adam moments and averages; activations come on top")
    note(f"grid        {plan['grid']} ({len(plan['grid'])} network evaluations)")
    note(f"batch       {plan['batch']} samples a step in {plan['micro_batches']} micro-batch{'es' * (plan['micro_batches'] > 1)} on 1 process")
    for warning in plan["warnings"]:
        note(f"warning     {warning}")
