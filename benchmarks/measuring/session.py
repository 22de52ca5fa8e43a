"""One start of benchmarks/gpu.py: slices one after another, each in a process that may die without harm to the others."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from benchmarks.measuring import rows
from benchmarks.measuring.case import Row
from benchmarks.measuring.environment import ROOT
from benchmarks.measuring.wheels import to_carry
from benchmarks.measuring.worker import BEGINS, BROKEN_DEVICE, OUT_OF_TIME
from benchmarks.slices import Slice

GRACE = 10.0  # seconds beyond its end after which a slice is killed
GO_ON = "the same command again goes on there"


@dataclass
class Session:
    """path: the file of result lines; log: everything that is said; until: when the budget is spent; packages: folders that the slices' processes
    import from first. unfinished: what could not be measured, by slice, with the reason."""

    path: Path
    log: TextIO
    until: float
    rehearsal: bool
    packages: Sequence[Path] = ()
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    unfinished: dict[str, str] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """To the terminal and to the log."""
        print(line, flush=True)
        print(line, file=self.log, flush=True)

    def begin(self) -> bool:
        """Write this run's own line, ceilings included; False where even that fails."""
        command = [sys.executable, "-m", "benchmarks.measuring.environment", str(self.path), self.run, *self._rehearsal()]
        if self._process(command, min(self.until, time.time() + 120)) != 0:
            self.unfinished["environment"] = "could not be read"
            return False
        here = self.here()
        self.say(f"{here['gpu']}: copies {here['copy_gb_per_s']:.0f} GB/s, bf16 products {here['bf16_tflop_per_s']:.1f} TFLOP/s")
        return True

    def here(self) -> Row:
        """The environment of this run."""
        return rows.environments(rows.read(self.path))[self.run]

    def measure(self, part: Slice) -> None:
        """Run one slice, again after each case that broke its process, until it is done or its time is over."""
        if reason := self.obstacle(part):
            self._leave_out(part, reason)
            return
        until = min(self.until, time.time() + part.seconds)
        self.say(f"\n{part.name}: up to {until - time.time():.0f} s")
        while (begun := self._worked(part, until)) is not None:
            case, reason, again = begun
            rows.append(self.path, [{"slice": part.name, "case": case, "run": self.run, "status": "failed", "reason": reason}])
            self.say(f"  failed: {reason}")
            if not again:
                break
        self._note(part)

    def obstacle(self, part: Slice) -> str | None:
        """Why a slice cannot be measured here."""
        if time.time() >= self.until:
            return f"no time was left for it: {GO_ON}"
        if missing := [name for name in part.needs if importlib.util.find_spec(name) is None]:
            return f"needs {', '.join(to_carry(name) for name in missing)}"
        have = tuple(int(number) for number in self.here().get("capability", "0.0").split("."))
        if not self.rehearsal and have < part.capability:
            return f"needs a GPU of compute capability {_version(part.capability)}, this one has {_version(have)}"
        red = [row for row in self._newest(part.after) if row.get("failed")] if part.after else []  # not those that only took too long
        return f"slice {part.after!r} is red, and the speed of what is wrong is none: {red[0]['reason']}" if red else None

    def _worked(self, part: Slice, until: float) -> tuple[str, str, bool] | None:
        """Start the slice's process; where that did not end by itself: the case it was at, why, and whether to start it again."""
        begun: list[str] = []
        command = [sys.executable, "-m", "benchmarks.measuring.worker", part.name, part.module, str(self.path), self.run, str(until)]
        status = self._process([*command, *self._rehearsal()], until + GRACE, lambda line: begun.extend(_begun(line)))
        if status == OUT_OF_TIME:
            self.unfinished[part.name] = f"its time was over: {GO_ON}"
        if status in (0, OUT_OF_TIME):
            return None
        if status == BROKEN_DEVICE:
            return self._worked(part, until)
        reason = f"ran over the slice's {part.seconds:.0f} s" if status is None else f"its process ended with status {status}"
        return (begun[-1], reason, status is not None) if begun else ("*", reason, False)

    def _leave_out(self, part: Slice, reason: str) -> None:
        self.unfinished[part.name] = reason
        self.say(f"\n{part.name}: left out: {reason}")
        rows.append(self.path, [{"slice": part.name, "case": "*", "run": self.run, "status": "left out", "reason": reason}])

    def _newest(self, name: str) -> list[Row]:
        """The rows of a slice in this environment, of the newest run that tried it."""
        same = [row for row in rows.like(rows.read(self.path), self.here()) if row["slice"] == name]
        return [row for row in same if row["run"] == same[-1]["run"]]

    def _note(self, part: Slice) -> None:
        """Remember what failed, and which cases were left out."""
        own = [row for row in rows.read(self.path) if row["run"] == self.run and row["slice"] == part.name]
        measured = {row["case"] for row in own if row["status"] == "measured"}
        # A contender that no card or no CPU takes is not missing beside others; one whose package was not brought is, on a GPU.
        own = [row for row in own if row["status"] != "left out" or row["case"] not in measured or ("carry" in row["reason"] and not self.rehearsal)]
        said = [f"its time was over: {GO_ON}"] if part.name in self.unfinished else []
        for status, what in (("left out", "left out, whole or in part"), ("failed", "failed")):
            if names := sorted({row["case"] for row in own if row["status"] == status}):
                said.insert(0, f"{len(names)} {what}: {', '.join(names[:4])}{', …' * (len(names) > 4)}")
        if said:
            self.unfinished[part.name] = "; ".join(said)

    def _rehearsal(self) -> list[str]:
        return ["--rehearsal"] if self.rehearsal else []

    def _process(self, command: Sequence[str], until: float, heard: Callable[[str], None] = lambda line: None) -> int | None:
        """The exit status of a command, whose output is shown and logged; None where it ran on after `until` and was killed."""
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        path = [str(folder) for folder in (*self.packages, ROOT, ROOT / "kernels", *given) if folder]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        # A process group to kill, in this session, so that whoever kills the session kills it too.
        process = subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0, **pipes)

        def listen() -> None:
            for line in process.stdout or ():
                self.say(line.rstrip())
                heard(line)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            return process.wait(max(1.0, until - time.time()))
        except subprocess.TimeoutExpired:
            return None
        finally:  # also when this command is interrupted
            _kill_group(process)
            listener.join(5)


def _begun(line: str) -> list[str]:
    return [line.removeprefix(BEGINS).strip()] if line.startswith(BEGINS) else []


def _version(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def _kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
