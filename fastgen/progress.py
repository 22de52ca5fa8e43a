"""What long work says while it goes on."""

from __future__ import annotations

from collections.abc import Mapping


class Progress:
    """What long work says; this one says nothing. The command line shows bars. Counted work may lie within other counted work, as brackets do."""

    def stage(self, message: str) -> None:
        """A new stage begins."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """A counted piece of work begins."""

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        """`done` of the total, with the numbers that matter now."""

    def warn(self, message: str) -> None:
        """Something has gone wrong that does not stop the work."""

    def finish(self) -> None:
        """The counted work is over."""


class Once(Progress):
    """Another, to which the same warning is passed on once, however often the work is done."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._warned = progress, set[str]()

    def stage(self, message: str) -> None:
        self._progress.stage(message)

    def start(self, what: str, total: int, done: int = 0) -> None:
        self._progress.start(what, total, done)

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        self._progress.update(done, numbers)

    def warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            self._progress.warn(message)

    def finish(self) -> None:
        self._progress.finish()
