"""What the command line shows: progress, warnings and results; of several processes, what the main one does."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from fastgen import group, run
from fastgen.evaluation.results import read_results, remarks
from fastgen.evaluation.table import summary_table
from fastgen.printing import Unfailing, printable, put
from fastgen.surgery.moe.conversion import flops_in_words
from fastgen.surgery.moe.conversion import in_words as moe_in_words
from fastgen.surgery.shrink import in_words

_SHOWN = ("loss/", "grad_norm/student", "eval/")
_FIRST, _LONGEST = 5.0, 60.0  # seconds until the first line of progress, and at most between two


def echo(text: str) -> None:
    """Lines of output."""
    for line in text.split("\n"):
        _put(line, sys.stdout)


def note(text: str) -> None:
    """A line about what happened and where it is."""
    _put(text, sys.stdout)


def warn(text: str) -> None:
    """A line about what did not go as it may have been meant."""
    _put(f"warning: {text}", sys.stderr)


def _put(line: str, file: TextIO) -> None:
    """Of several processes one alone prints."""
    if group.speaks():
        put(line, file)


def progress(*, log: TextIO | None = None) -> Several:
    """Bars where stderr is a terminal; lines in `log` where that is none, so that a file or a scheduler's log shows progress too. log:
    stdout for a command whose stdout is a log, by default stderr."""
    quiet()
    if not group.speaks():
        return Several([])
    shown = [Bars()] if _moves(sys.stderr) else []
    log = sys.stderr if log is None and not shown else log
    return Several([*shown, *([] if log is None or (shown and _moves(log)) else [Lines(log)])])


def _moves(file: TextIO) -> bool:
    """Whether a stream is a terminal with a cursor that moves. Not asked of rich, which takes FORCE_COLOR for one."""
    return Unfailing(file).isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class Several(run.Progress):
    """All that several say; a warning from the first alone."""

    def __init__(self, parts: list[run.Progress]) -> None:
        self.parts = parts

    def stage(self, message: str) -> None:
        for part in self.parts:
            part.stage(message)

    def start(self, what: str, total: int, done: int = 0) -> None:
        for part in self.parts:
            part.start(what, total, done)

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        for part in self.parts:
            part.update(done, numbers)

    def warn(self, message: str) -> None:
        for part in self.parts[:1]:
            part.warn(message)

    def finish(self) -> None:
        for part in self.parts:
            part.finish()


@dataclass
class _Counted:
    """Work that `Lines` follows. began, said: when it began, and when something was last said of it."""

    what: str
    total: int
    begin: int
    done: int
    began: float
    said: float
    numbers: str = ""
    pause: float = _FIRST


class Lines(run.Progress):
    """A line of progress every so often: step, rate, time left and the numbers that matter. The first comes after 5 seconds, then they
    grow rarer, down to one a minute. clock: seconds that never go back."""

    def __init__(self, log: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.log, self.clock = log, clock
        self.works: list[_Counted] = []  # the innermost last

    def stage(self, message: str) -> None:
        put(message, self.log)

    def start(self, what: str, total: int, done: int = 0) -> None:
        now = self.clock()
        self.works.append(_Counted(what, total, done, done, now, now))
        put(f"{what}: {done} of {total}", self.log)

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        if not self.works:
            return
        work, now = self.works[-1], self.clock()
        work.done, work.numbers = done, _numbers(numbers)
        if now - work.said >= work.pause and done < work.total:
            rate = (done - work.begin) / (now - work.began)
            left = f"{_duration((work.total - done) / rate)} left" if rate else ""
            self._say(work, _rate(rate), left, work.numbers)
            work.said, work.pause = now, min(2 * work.pause, _LONGEST)

    def warn(self, message: str) -> None:
        put(message, sys.stderr)

    def finish(self) -> None:
        if self.works:
            work = self.works.pop()
            self._say(work, f"after {_duration(self.clock() - work.began)}", work.numbers)

    def _say(self, work: _Counted, *parts: str) -> None:
        put(", ".join([f"{work.what}: {work.done} of {work.total}", *filter(None, parts)]), self.log)


def _numbers(numbers: Mapping[str, float]) -> str:
    return "  ".join(f"{key.removeprefix('loss/')} {value:.3g}" for key, value in numbers.items() if key.startswith(_SHOWN))


def _rate(speed: float | None) -> str:
    """Slow work in seconds for each piece."""
    if not speed:
        return "\N{EN DASH}/s"
    return f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"


def _duration(seconds: float) -> str:
    """As 12 s, 3:05 min or 2:00:00 h."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.speed))


class Bars(run.Progress):
    """A rich progress bar with rate, time left and the numbers that matter; below it one for the work that lies within."""

    def __init__(self) -> None:
        self.console = Console(file=cast(TextIO, Unfailing(sys.stderr)))
        self.bar: Progress | None = None
        self.tasks: list[TaskID] = []  # the innermost last

    def stage(self, message: str) -> None:
        self._line(message, "dim")

    def start(self, what: str, total: int, done: int = 0) -> None:
        if self.bar is None:
            counts = (TextColumn("{task.description}", markup=False), BarColumn(24), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
            self.bar = Progress(*counts, TextColumn("{task.fields[numbers]}", markup=False), console=self.console)
            self.bar.start()
        else:
            self.bar.update(self.tasks[-1], numbers="")  # the width is needed below
        self.tasks.append(self.bar.add_task(what, total=total, completed=done, numbers=""))

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        if self.bar is not None:
            self.bar.update(self.tasks[-1], completed=done, numbers=_numbers(numbers))

    def warn(self, message: str) -> None:
        self._line(message, "yellow")

    def finish(self) -> None:
        if self.bar is None:
            return
        task = self.tasks.pop()
        if self.tasks:
            self.bar.remove_task(task)
        else:
            self.bar.stop()
            self.bar = None

    def _line(self, message: str, style: str) -> None:
        # Through the bar's own console, which moves it down; a Text, in which nothing is markup; whole, so that no break falls into a name.
        self.console.print(Text(printable(message), style), soft_wrap=True)


def quiet() -> None:
    """Our bars are enough: no loading bars or advice from the libraries below, and what fails is said once, by our own error."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity(logging.CRITICAL)


def print_results(results: Mapping[str, Any]) -> None:
    """The short table of an evaluation, and what has to be said beside it, which its progress has not said."""
    echo(summary_table(results["metrics"]))
    for remark in remarks(results, told=True):
        note(remark)


def print_run(folder: Path) -> None:
    """Where a finished run's products lie, and its results."""
    results = folder / "results.json"
    if results.is_file():
        print_results(read_results(results))
    newest = sorted(path for path in (folder / "samples").glob("step_*.png") if re.fullmatch(r"step_\d+", path.stem))[-1:]  # at the first size
    for name, path in [("student", folder / "student"), *(("samples", path) for path in newest), ("report", folder / "report.html")]:
        if path.exists():
            note(f"{name + ':':9s}{path}")
    note(f"{'run:':9s}{folder}")


_PARTS = {
    "frozen": "weights that nothing trains",
    "trained": "weights that are trained",
    "buffers": "buffers",
    "optimizers": "optimizer states",
    "averages": "averages",
    "data": "encoded prompts and images",
    "step": "a step: activations, gradients",
    "encoders": "text encoders and VAE",
}


def print_need(found: Mapping[str, Any]) -> None:
    """The outcome of `fastgen plan`."""
    note(f"{found['method']} on {found['teacher']}")
    if "processes" in found:
        kept = "whole networks" if found["parts"] == 1 else f"one of {found['parts']} parts of each network"
        note(f"on each of {found['processes']} processes, which has {kept}")
    if "student" in found:
        note(f"student: {in_words(found['student'])}")
    if "experts" in found:
        note(f"student: {moe_in_words(found['experts'])}")
        for kind, row in found["layers"].items():
            ours, theirs = row["student"], row["dense"]
            active = f"{ours['active']:>15,} of {ours['parameters']:>15,} parameters ({theirs['parameters']:,})"
            note(f"  {kind:20s}{active}, {flops_in_words(ours['flops'])} ({flops_in_words(theirs['flops'])})")
    for name, what in _PARTS.items():
        note(f"  {what:34s}{_size(found['bytes'][name])}")
    note("at its peak")
    for name, size in found["stages"].items():
        note(f"  {name:34s}{_size(size)}")
    note("  (not counted: the VAE's activations, what the libraries themselves take, and room lost between tensors)")
    if "memory" in found:
        note(f"{'fits' if found['fits'] else 'does not fit'} into {_size(found['memory']).strip()}")
    for change in found.get("changes", ()):
        note(f"  {' '.join(change['keys']):34s}{_size(change['peak'])}   {change['what']}")
    if not found.get("fits_with_changes", True):
        note("and whatever is changed, it does not: a smaller teacher or teacher.size, or more memory, is needed")
    for warning in found["warnings"]:
        note(f"warning: {warning}")


def print_json(found: Mapping[str, Any]) -> None:
    echo(json.dumps(found, indent=1, ensure_ascii=False))


def _size(count: int) -> str:
    return f"{count / 1e9:10.2f} GB" if count >= 1e9 else f"{count / 1e6:10.2f} MB"


def print_plan(plan: Mapping[str, Any]) -> None:
    """The outcome of --dry-run."""
    note(f"method      {plan['method']}, {plan['steps']} steps")
    note(f"teacher     {plan['teacher']} ({plan['family']})")
    if "student" in plan:
        note(f"student     {in_words(plan['student'])}")
    if "experts" in plan:
        note(f"student     {moe_in_words(plan['experts'])}")
    width = max(12, *(len(name) + 2 for name in plan["roles"]))
    for name, role in plan["roles"].items():
        note(f"role        {name:<{width}}{role['tuning']:14s}{role['trains']:>14,} trained parameters")
    note(f"parameters  {plan['parameters']:,} in all")
    networks, data, at_once = plan["network_bytes"] / 2**20, plan["data_bytes"] / 2**20, plan["micro_batch"]
    note(f"memory      {networks:,.1f} MiB of weights, buffers, gradients, optimizer states and averages, {data:,.1f} MiB of encoded data")
    note(f"            on top come activations, text encoders and VAE, which take {at_once} sample{'s' * (at_once > 1)} at a time: `fastgen plan`")
    note(f"grid        {plan['grid']} ({len(plan['grid'])} network evaluations)")
    for each in plan.get("sizes", ()):
        images = f", {each['images']} images" if "images" in each else ""
        note(f"size        {each['size'][0]} x {each['size'][1]} (height x width) on {each['grid']}{images}")
    passes, several = f"{plan['micro_batches']} micro-batch{'es' * (plan['micro_batches'] > 1)}", plan["processes"] > 1
    note(f"batch       {plan['batch']} samples a step in {passes} on {plan['processes']} process{'es' * several}")
    for warning in plan["warnings"]:
        note(f"warning     {warning}")
