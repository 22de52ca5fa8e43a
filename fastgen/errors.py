"""Errors whose message is written for the person who runs fastgen; the command line prints them as one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fastgen.printing import printable


class UserError(ValueError):
    """A mistake in what the user gave: the message says what was given, what is allowed, and which recipe key (exit status 2)."""


class CannotWrite(UserError):
    """A place that takes nothing, or no more: the message says which, why, and the way on."""


class NotFinite(UserError):
    """A model that the user gave, or trained, draws what is no picture: the message says which, and how many of how many."""


class TrainingFailed(RuntimeError):
    """Training cannot go on (a loss or gradient is not finite): the message names step, term and the role that diverged (exit status 1).

    role: the one that diverged, where one did.
    """

    def __init__(self, message: str, *, role: str | None = None) -> None:
        super().__init__(message)
        self.role = role


class ProcessLost(TrainingFailed):
    """Of several processes one has ended or stopped, so that the others cannot go on (exit status 1)."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Tail of an error message: the allowed name closest to `given` if there is one, then all of them."""
    names = sorted(allowed)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + "allowed: " + ", ".join(names)


def shown(value: object, most: int = 200) -> str:
    """A value as Python writes it, without its middle where that is long."""
    return _shortened(repr(value), most)


def one_line(text: str, most: int = 4000) -> str:
    """A message as one line that any terminal takes: other white space as spaces, control characters and half characters as escapes."""
    return _shortened(printable(" ".join(text.split())), most)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-(most // 4) :]}"
