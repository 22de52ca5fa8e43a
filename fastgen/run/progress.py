"""What a run says while it works, and how it stops when it is asked to."""

from __future__ import annotations

import signal
from collections.abc import Mapping


class Interrupted(Exception):
    """Training stopped on a signal after saving; `number` is the signal's."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped at step {step} by {signal.Signals(number).name}")
        self.number = number


class Progress:
    """What a run says while it works; this one says nothing. The command line shows bars."""

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
