"""Programs that score pictures in an environment of their own, because their packages cannot live in ours.

The contract: fastgen starts the command with one more argument, a folder. In it lie PNGs and `prompts.jsonl`, a line
`{"id": 7, "file_name": "000007.png", "prompt": "...", "seed": 1}` for each picture. The last line that the program prints is JSON:
`{"scores": [...]}`, a number for each line of `prompts.jsonl` in that order, or `{"value": x, "n": n}` of a metric that is no mean of
scores. What else it prints is ignored; what it writes to stderr is kept in a log. Exit status 0.

Commands come from whoever starts an evaluation, never from a protocol file, which runs no code.
"""

from __future__ import annotations

import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fastgen import records
from fastgen.errors import UserError, one_line, shown
from fastgen.evaluation.weights import Unavailable
from fastgen.files import writing

OPTION = "--external"
TIMEOUT = 3600.0  # seconds
_LARGEST = records.LARGEST  # bytes of an answer, and of a log: three million scores
_TAIL = 4096  # bytes in which a log's last line is looked for
_TICK = 0.2  # seconds between looks at a program that says nothing
_WANTED = '{"scores": [a number for each picture]} or {"value": x, "n": pictures}'


@dataclass(frozen=True)
class External:
    """A command and the seconds it may take."""

    command: tuple[str, ...]
    timeout: float = TIMEOUT


class Answer(NamedTuple):
    """scores: (n,) fp64, in the order of prompts.jsonl, where the program gave some: `value` is their mean then."""

    value: float
    n: int
    scores: Tensor | None = None


def externals(given: Sequence[str], timeout: float = TIMEOUT) -> dict[str, External]:
    """Commands by the metric's name, from `NAME=COMMAND` as the command line has them; COMMAND is split as a shell does, but no shell runs it.
    UserError for what is none, for a name given twice and for a program that is not found."""
    if not 0 < timeout < float("inf"):
        raise UserError(f"{OPTION}-timeout: a number of seconds above 0 is needed, not {timeout:g}")
    found: dict[str, External] = {}
    for text in given:
        name, _, command = text.partition("=")
        if not re.fullmatch("[a-z][a-z0-9_]*", name) or not command.strip():
            raise UserError(f"{OPTION}: {shown(text)} is not NAME=COMMAND, such as image_reward='/envs/reward/bin/python score.py'")
        if name in found:
            raise UserError(f"{OPTION}: {name} is given twice")
        found[name] = External(_words(name, command), timeout)
    return found


def _words(name: str, command: str) -> tuple[str, ...]:
    try:
        program, *rest = shlex.split(command)
    except ValueError as error:
        raise UserError(f"{OPTION} {name}: {shown(command)} is no command ({str(error).lower()})") from error
    program = os.path.expanduser(program)
    if shutil.which(program) is None:
        raise UserError(f"{OPTION} {name}: no program {program!r}; give its whole path")
    return (program, *rest)


def ask(external: External, folder: Path, count: int, log: Path) -> Answer:
    """What the program says of the `count` pictures in `folder`; log: where its stderr goes, a new file. Unavailable, in one line that quotes the
    log's last, for a program that cannot be started, fails, takes too long, prints too much, or gives no answer to the contract."""
    try:
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as file:
                printed = _printed(external, folder, file)
        return _answer(printed, count)
    except _Failed as error:
        raise Unavailable(f"{external.command[0]!r} {error}{_last_words(log)}") from error
    except Unavailable:
        raise
    except UserError as error:  # no log: the other metrics can do without
        raise Unavailable(str(error)) from error


class _Failed(Exception):
    """What the program did, to go on after its name."""


def _printed(external: External, folder: Path, log: IO[bytes]) -> bytes:
    """What the program prints until it ends well."""
    with _running([*external.command, str(folder.absolute())]) as process:
        deadline = time.monotonic() + external.timeout
        try:
            printed = _listen(process, log, deadline)
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise _Failed(f"was stopped after {external.timeout:g} seconds; {OPTION}-timeout gives it more") from error
    if status < 0:
        raise _Failed(f"was killed by {_signal(-status)}")
    if status:
        raise _Failed(f"ended with exit status {status}")
    return printed


@contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The program in a process group of its own, of which nothing is left afterwards."""
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    except OSError as error:
        raise _Failed(f"cannot be started: {(error.strerror or str(error)).lower()}") from error
    with process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError, PermissionError):  # macOS answers so for a group of zombies
                os.killpg(process.pid, signal.SIGKILL)


def _listen(process: subprocess.Popen[bytes], log: IO[bytes], deadline: float) -> bytes:
    """What it prints, until it closes its output or has ended: a child that it leaves behind may hold the pipes open for ever."""
    assert process.stdout and process.stderr
    printed = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.get_map():
            ended = process.poll() is not None
            ready = selector.select(0 if ended else _TICK)
            for key, _ in ready:
                if not (data := os.read(key.fd, 2**16)):
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    printed += data
                elif log.tell() < _LARGEST:
                    log.write(data)
            if len(printed) > _LARGEST:
                raise _Failed(f"was stopped because it printed more than {_LARGEST // 2**20} MiB")
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(process.args, 0)
            if ended and not ready:
                break
    return bytes(printed)


class _Scores(records.Schema):
    scores: list[float]


class _Value(records.Schema):
    value: float
    n: int = Field(ge=1)


def _answer(printed: bytes, count: int) -> Answer:
    lines = [line for line in printed.split(b"\n") if line.strip()]
    if not lines:
        raise _Failed(f"printed nothing; its last line must be {_WANTED}")
    try:
        content: Any = records.parse(lines[-1], dict[str, Any])
        if ("scores" in content) == ("value" in content):
            raise ValueError("it has not one of the keys scores and value")
        records.checked(content, _Scores if "scores" in content else _Value)
    except ValueError as error:
        said = one_line(lines[-1][:200].decode(errors="replace"), 80)
        raise _Failed(f"gave no answer, for its last line must be {_WANTED}, and is {said!r}: {one_line(str(error), 200)}") from error
    if "scores" not in content:
        if content["n"] > count:
            raise _Failed(f"says that it measured {content['n']} pictures, of {count}")
        return Answer(float(content["value"]), content["n"])
    if (given := len(content["scores"])) != count:
        raise _Failed(f"gave {given} scores for {count} pictures")
    scores = torch.tensor(content["scores"], dtype=torch.float64)
    return Answer(float(scores.mean()), count, scores)


def _last_words(log: Path) -> str:
    """The last line of the log, and where the others are."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return f"; it wrote last {one_line(lines[-1], 300)!r}, and the rest is in {str(log)!r}" if lines else ""


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
