"""What a run writes down at every step: a line of metrics.jsonl, and the same numbers as TensorBoard events."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Annotated, Any

from pydantic import Field

from fastgen import records
from fastgen.errors import UserError
from fastgen.files import reading, write_atomically, writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = Mapping[str, Any]  # "step", scalars by name, and "warnings": [text, …] where something has gone wrong


class _Row(records.Schema):
    step: Annotated[int, Field(ge=0, lt=10**18)]
    warnings: Annotated[list[str], Field(default_factory=list)]
    seconds: float | None = None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in their order; a last line cut short is left out. UserError naming another line that is no row."""
    with reading(path):
        lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [records.parse(line, _Row)] if line.strip() else []
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"line {number} of {str(path)!r} is no row: {error}") from error
    return rows


class RunLog:
    """metrics.jsonl and tensorboard/ of a run folder; writes only as a context manager.

    A resumed run appends to metrics.jsonl, once `truncate` has dropped what is to be done again, and starts another event file with its
    first row. That one tells TensorBoard to forget what it has read of this step and of later ones.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path, self.events = run_dir / "metrics.jsonl", run_dir / "tensorboard"
        self._file: IO[str] | None = None
        self._board: SummaryWriter | None = None

    def __enter__(self) -> RunLog:
        with writing(self.path):
            self._file = self.path.open("a", buffering=1, encoding="utf-8")
        return self

    def __exit__(self, *failure: object) -> None:
        with suppress(Exception) if any(failure) else writing(self.path):  # a second failure would hide the first
            if self._file is not None:
                self._file.close()
            if self._board is not None:
                self._board.close()

    def rows(self) -> list[dict[str, Any]]:
        """What stands in metrics.jsonl; a last line that a kill cut short is left out. UserError for a line that is no row."""
        return read_rows(self.path) if os.path.lexists(self.path) else []

    def truncate(self, step: int) -> None:
        """Drop the lines of steps after `step`, which an interrupted run had logged past its last checkpoint, and half a line."""
        if self.path.is_file():
            write_atomically(self.path, "".join(_line(row) for row in self.rows() if row["step"] <= step))

    def write(self, row: Row, *, sync: bool = False) -> None:
        """Add a row: its line is on disk at once, its events after `flush`. sync: the events before the line, which says that all is there."""
        assert self._file is not None, "a RunLog writes only as a context manager"
        with writing(self.path):
            self._board = self._board or _board(self.events, row["step"])
            for name, value in row.items():
                if name == "warnings":
                    self._board.add_text(name, "  \n".join(value), row["step"])
                elif name != "step":
                    self._board.add_scalar(name, value, row["step"])
            if sync:
                self.flush()
            self._file.write(_line(row))

    def flush(self) -> None:
        """Put the events on disk. Due before each checkpoint, or a run killed after it would go on with a gap in its events."""
        if self._board is not None:
            with writing(self.events):
                self._board.flush()


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _board(folder: Path, first_step: int) -> SummaryWriter:
    # tensorboard's own switch for working without TensorFlow, which is slow to import and talks on stderr.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
    from torch.utils.tensorboard import SummaryWriter

    _hush_its_thread()
    return SummaryWriter(str(folder), purge_step=first_step)


def _hush_its_thread() -> None:
    """What TensorBoard's thread cannot write is raised again by the next call of its writer; Python would print it besides."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            before(failed)

    if not getattr(before, "hushes_tensorboard", False):
        hook.hushes_tensorboard = True  # type: ignore[attr-defined]
        threading.excepthook = hook
