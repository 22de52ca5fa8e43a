"""What long work says while it goes on."""

from __future__ import annotations

from collections.abc import Mapping


class Progress:
    """What long work says; this one says nothing. The command line shows bars."""

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
