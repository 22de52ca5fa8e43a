"""Text files of any Unicode encoding that says which it is, and JSON of any shape: what cannot be read is a UserError."""

from __future__ import annotations

import codecs
import json
import os
import re
import reprlib
from pathlib import Path
from typing import Any

from fastgen.errors import UserError

# UTF-32's mark begins with UTF-16's.
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_SHOWN = 60  # characters
_SHORT = reprlib.Repr()  # whose limit on nested levels keeps it from recursing
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 2 * _SHOWN


def missing(path: Path) -> str | None:
    """What is at `path` in place of a file; None where a file, or a link to one, is. Opens nothing: a FIFO would wait for ever."""
    if os.path.isfile(path):
        return None
    if os.path.isdir(path):
        return f"{str(path)!r} is a folder, not a file"
    if os.path.exists(path):
        return f"{str(path)!r} is no file, but a device, a pipe or a socket"
    if os.path.islink(path):
        return f"no file {str(path)!r}: it is a link to {os.readlink(path)!r}, where there is nothing"
    return f"no file {str(path)!r}"


def read_text(path: Path, key: str) -> str:
    """A file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. UserError that begins with `key` for other bytes."""
    if problem := missing(path):
        raise UserError(f"{key}: {problem}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: cannot read {str(path)!r}: {error.strerror or error}") from error
    return text_of(content, str(path), key)


def text_of(content: bytes, name: str, key: str) -> str:
    """The text in a file's bytes, as `read_text` has it. name: of the file, for messages."""
    encoding = next((known for mark, known in _MARKS.items() if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        known = "not UTF-8 text" if encoding == "utf-8-sig" else f"neither UTF-8 text nor the {encoding.upper()} that its first bytes say"
        raise UserError(f"{key}: {name!r} is {known} (at byte {error.start})") from error
    if "\0" in text:
        raise UserError(f"{key}: {name!r} holds NUL bytes, which are no text; UTF-16 and UTF-32 are read with a byte order mark only")
    return text


def read_lines(path: Path, key: str) -> list[str]:
    """`read_text`, split at newlines alone: `splitlines` would also split at U+2028 and the like, which captions from the web contain."""
    return read_text(path, key).split("\n")


def parse_json(text: str, where: str) -> Any:
    """The JSON value in `text`; UserError that begins with `where`, also for too many digits or brackets for Python to read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where} is not JSON ({reason})") from error


def flaw(text: str) -> str | None:
    """Why a string is no text that a tokenizer could read; None where it is one."""
    if "\0" in text:
        return "holds a NUL character"
    if lone := re.search("[\ud800-\udfff]", text):
        return f"holds half a surrogate pair, {lone.group()!a}"
    return None


def short(value: Any) -> str:
    """The beginning of any JSON value's repr, however long or deep it is."""
    return _SHORT.repr(value)[:_SHOWN]
