"""The folder of a run: whose it is, what may lie in it, and who may write to it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import fastgen
from fastgen import checkpoint, inputs, records
from fastgen.errors import UserError
from fastgen.files import PARTIAL, recover, refuse_special, remove, remove_partial, write_atomically, writing

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

MARKER = "run.json"
LOCK = ".lock"
# What a run writes: the checkpoints first, so that a kill meanwhile leaves none of a run whose recipe is gone.
_WRITTEN = ("checkpoints", "student", "results.json", "report.html", "samples", "tensorboard", "metrics.jsonl", inputs.FILE, "recipe.yaml")


def plain(folder: str | Path) -> Path:
    """A folder's path without `..`, which could turn into a folder that holds other things while the run makes its own."""
    path = Path(folder)
    return path if path.name and ".." not in path.parts else Path(os.path.abspath(path))


def check_parents(folder: Path) -> None:
    """UserError for a folder that cannot be made, or not with what is written into it: JSON, HTML and TensorBoard know no other names."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"--output: {str(folder)!r} is a path that is not UTF-8; choose another name") from error
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"--output: {str(folder)!r} cannot be made, because {str(above)!r} is a file")


class _Marker(records.Schema):
    resumed: list[Any]


class RunFolder:
    """A run's folder. `run.json` marks it from the first moment, so that after a kill at any time one of the flags accepts it; it also says
    of what was warned, when the run was resumed, and what was changed then. `.lock` keeps a second trainer out, and stays."""

    def __init__(self, output: str | Path) -> None:
        self.path = plain(output)
        self._file: IO[str] | None = None
        self._undo: list[Path] = []  # what `claim` has made of a run that has not begun

    @property
    def holds_run(self) -> bool:
        """Whether there is a run, however far it has come; older versions had no marker."""
        with writing(self.path, "--output"):
            return (self.path / MARKER).is_file() or all((self.path / name).is_file() for name in ("recipe.yaml", "metrics.jsonl"))

    @property
    def has_checkpoint(self) -> bool:
        return bool(checkpoint.checkpoints(self.path / "checkpoints"))

    def check(self, *, resume: bool, overwrite: bool = False, or_start: bool = False) -> bool:
        """Whether a run is to be resumed; UserError where the folder and the flags do not go together."""
        if (resume or or_start) and overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        check_parents(self.path)
        with writing(self.path, "--output"):
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"--output: {str(self.path)!r} is a file, a folder is needed")
            refuse_special(self.path)  # what is written into a FIFO waits for a reader
            others = self._others()
        if resume and not or_start and not self.holds_run:
            raise UserError(f"--resume: {str(self.path)!r} holds no run to resume; --resume-or-start starts one where there is none")
        if others and not self.holds_run:
            raise UserError(f"--output: {str(self.path)!r} holds other files and no run ({others[0]}); choose an empty or new folder")
        if self.holds_run and not (resume or or_start or overwrite):
            raise UserError(f"--output: {str(self.path)!r} already holds a run; pass --resume to go on with it or --overwrite to replace it")
        return self.holds_run and (resume or or_start)

    def _others(self) -> list[str]:
        """What lies there beside what a kill before the marker can have left."""
        return (
            sorted(path.name for path in self.path.iterdir() if path.name != LOCK and not path.name.startswith(PARTIAL)) if self.path.is_dir() else []
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other trainers out: from now on where there is a run, else from `claim` on. What ends before its run has begun leaves nothing."""
        try:
            if (self.path / LOCK).is_file():
                self._lock()
            yield
        finally:
            if self._undo:
                self._remove_made()
            if self._file is not None:
                self._file.close()

    def claim(self, check: Callable[[], object]) -> None:
        """Make the folder, lock it, and mark it as a run's. check: repeated once nobody else changes the folder any more."""
        before, made = self.holds_run, [folder for folder in (self.path, *self.path.absolute().parents) if not folder.exists()]
        with writing(self.path, "--output"):
            self.path.mkdir(parents=True, exist_ok=True)
            if self._file is None:
                self._lock()
                check()
        assert self._file is not None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        if not before:
            self._undo = [self.path / MARKER, self.path / LOCK, *made]
        if not (self.path / MARKER).is_file():
            self.mark()

    def _lock(self) -> None:
        with writing(self.path, "--output"):
            self._file = (self.path / LOCK).open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            who = self._file.read(200).strip() or "another process"
            raise UserError(f"--output: {who} is training into {str(self.path)!r} now; wait for it, stop it, or choose another folder") from None
        except OSError:  # a file system without locks
            pass

    def _remove_made(self) -> None:
        with suppress(OSError):
            remove_partial(self.path)
            for path in self._undo:
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)

    def begin(self, resumed: Mapping[str, Any] | None) -> None:
        """From here on the folder is the run's. resumed: what to record of a continuation; None: everything that a former run wrote is deleted."""
        self._undo = []
        if resumed is None:
            self.recover()
            with writing(self.path, "--output"):
                for name in _WRITTEN:
                    remove(self.path / name)
        self.mark(resumed)

    def mark(self, resumed: Mapping[str, Any] | None = None) -> None:
        """Make it a run's; resumed: what to record of a continuation."""
        if resumed is None:
            self._write({})
        else:
            before = self._record()
            self._write({**before, "resumed": [*before.get("resumed", []), {"date": _now(), **resumed}]})

    def note(self, **products: Any) -> None:
        """Record what is known of a run's products; None: nothing any more."""
        self._write({key: value for key, value in {**self._record(), **products}.items() if value is not None})

    def noted(self, product: str) -> Any:
        """What is recorded of a product; None for nothing."""
        return self._record().get(product)

    def _write(self, record: Mapping[str, Any]) -> None:
        whole = {"format": 1, "fastgen": fastgen.__version__, "began": _now(), "resumed": [], **record}
        write_atomically(self.path / MARKER, json.dumps(whole, indent=1) + "\n")

    def _record(self) -> dict[str, Any]:
        """What the marker says; nothing where it is missing or broken, for what else the run needs stands elsewhere."""
        try:
            return records.read(self.path / MARKER, _Marker)
        except UserError:
            return {}

    def recover(self) -> None:
        """Put back or remove what kills have left."""
        with writing(self.path, "--output"):
            checkpoint.recover_all(self.path / "checkpoints")
            recover(self.path / "student")
            for folder in (self.path, self.path / "samples", self.path / "student"):
                remove_partial(folder)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
