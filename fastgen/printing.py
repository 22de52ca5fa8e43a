"""Lines for a terminal or a log, whose text may come from anywhere: it is shown and never obeyed, and printing it never raises."""

from __future__ import annotations

import os
import re
from typing import TextIO

# Control characters but the tab, line separators, marks that turn the direction of what follows, and halves of surrogate pairs, which
# Python makes of bytes in a path that are no UTF-8.
_UNSEEN = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Text on one line, with what a terminal would obey or could not show as an escape: `\n`, `\x1b`, `\udcff`."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def put(line: str, file: TextIO | None) -> None:
    """Print one line at once. Where nobody reads any more, or the disk is full, it is lost, and so is what follows it."""
    Unfailing(file).write(printable(line) + "\n")


class Unfailing:
    """A text stream that takes every character, those that its encoding lacks as escapes, and whose end is no error; None takes nothing."""

    def __init__(self, file: TextIO | None) -> None:
        self.file = file
        self.encoding = getattr(file, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if self.file is not None:
            try:
                self.file.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
                self.file.flush()
            except (OSError, ValueError):  # ValueError: it is closed
                _lose(self.file)
        return len(text)

    def flush(self) -> None:
        """Every write is flushed."""

    def isatty(self) -> bool:
        try:
            return self.file is not None and self.file.isatty()
        except ValueError:  # it is closed
            return False

    def fileno(self) -> int:
        if self.file is None:
            raise OSError("no file")
        return self.file.fileno()


def _lose(file: TextIO) -> None:
    """Let a stream that cannot be written end nowhere, or Python tries again when it exits, and complains."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, file.fileno())
        finally:
            os.close(nowhere)
    except (OSError, ValueError):  # it has no descriptor
        pass
