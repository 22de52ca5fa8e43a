"""Pickles that hold nothing but numbers, text, dicts, lists and NumPy arrays of numbers, read without running anything that they name.

A pickle is a program: loading one calls what it names. Here every name that NumPy's arrays need leads to a class of this file, and any other
one ends the reading.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.errors import UserError, one_line
from fastgen.files import loading

_LARGEST = 2**30  # bytes


def read_plain_pickle(path: Path) -> Any:
    """The content of a pickle, its arrays as NumPy arrays. UserError where it names anything but arrays of numbers, or is broken."""
    with loading(path), path.open("rb") as file:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"larger than {_LARGEST // 2**20} MiB, which no statistics are")
        return _plain(_Unpickler(file).load())


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _KNOWN.get((re.sub(r"^numpy\.core\b", "numpy._core", module), name))
        if found is None:
            asked = one_line(f"{module}.{name}", 100)
            raise UserError(f"the pickle asks for {asked}, which is no array of numbers; it is not loaded, for that might run anything")
        return found


class _Type:
    """A NumPy type of plain numbers."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch("[fiu][1248]|b1", str(code)):
            raise ValueError(f"an array of {code!r}, which are no numbers")
        self.type = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.type = self.type.newbyteorder(">" if state[1] == ">" else "<")


class _Array:
    """An array whose bytes come after it (protocols up to 4)."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        self.value = _numbers(content, kind, shape, "F" if is_fortran else "C")


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any, *_: Any) -> _Array:
    """An array by protocol 5."""
    array = _Array()
    array.value = _numbers(content, kind, shape, "F" if order == "F" else "C")
    return array


def _scalar(kind: Any, content: Any = b"") -> Any:
    return _numbers(content, kind, (), "C").item()


def _numbers(content: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(kind, _Type) or not isinstance(content, bytes | bytearray):
        raise ValueError("an array that is not one of numbers")
    return np.frombuffer(content, kind.type).reshape(shape, order=order).copy()


def _encoded(text: str, encoding: str) -> bytes:
    """How protocols up to 2 write bytes."""
    if encoding != "latin1":
        raise ValueError(f"bytes as {encoding!r}, which pickles do not have")
    return text.encode("latin1")


def _empty() -> bytes:
    """How protocols up to 2 write no bytes."""
    return b""


class _Call:
    """A function that a pickle may call and not change, as it could the attributes of a plain one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes what it calls")


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "scalar"): _Call(_scalar),
    ("numpy._core.numeric", "_frombuffer"): _Call(_from_buffer),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _Call(_encoded),
    ("__builtin__", "bytes"): _Call(_empty),
}


def _plain(value: Any, depth: int = 0) -> Any:
    """Dicts and lists with arrays in place of what stood for them."""
    if depth > 8:
        raise ValueError("nested deeper than statistics are")
    if isinstance(value, dict):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    return value.value if isinstance(value, _Array) else value
