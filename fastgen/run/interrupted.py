"""How a run stops when it is asked to."""

from __future__ import annotations

import signal


class Interrupted(Exception):
    """Training stopped on a signal after saving; `number` is the signal's. Of several processes all stop so."""

    everywhere = True

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped at step {step} by {signal.Signals(number).name}")
        self.number = number
