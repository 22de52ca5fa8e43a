"""NumPy's `.npz` archives that anybody may have written: what is in them is known from their headers, and read a few rows at a time.

Nothing is unpickled, and nothing is allocated but for what the file really holds.
"""

from __future__ import annotations

import math
import zipfile
from functools import cached_property
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from fastgen.files import loading

_VERSIONS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Member(NamedTuple):
    """An array in an archive. start: of its data, in bytes from the member's beginning."""

    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool
    start: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Archive:
    """An `.npz` file. UserError where it is none, or broken; members that are no arrays of numbers or text are not listed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with loading(path):
            self._zip = zipfile.ZipFile(path)
        self._streams: dict[str, IO[bytes]] = {}

    @cached_property
    def members(self) -> dict[str, Member]:
        """Arrays by name, without the suffix .npy."""
        found: dict[str, Member] = {}
        with loading(self.path):
            for info in self._zip.infolist():
                if info.filename.endswith(".npy"):
                    with self._zip.open(info) as stream:
                        member = _header(stream)
                    if not member.dtype.hasobject:
                        self._check_length(info, member)
                        found[info.filename.removesuffix(".npy")] = member
        return found

    def array(self, name: str) -> np.ndarray:
        """A whole array, a copy."""
        member = self.members[name]
        with loading(self.path):
            content = self._zip.read(f"{name}.npy")[member.start :]  # and its checksum is compared
            return np.frombuffer(content, member.dtype).reshape(member.shape, order="F" if member.is_fortran else "C").copy()

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of an array. Those that follow the last ones read cost least: what is compressed is read from the beginning on."""
        member = self.members[name]
        with loading(self.path):
            stream = self._streams.setdefault(name, self._zip.open(f"{name}.npy"))
            stream.seek(member.start + start * member.row_bytes)
            content = stream.read((stop - start) * member.row_bytes)
            return np.frombuffer(content, member.dtype).reshape(stop - start, *member.shape[1:])

    def _check_length(self, info: zipfile.ZipInfo, member: Member) -> None:
        expected = member.start + math.prod(member.shape) * member.dtype.itemsize
        if info.file_size != expected:
            raise ValueError(f"{info.filename} holds {info.file_size} bytes, its header says {expected}")


def _header(stream: IO[bytes]) -> Member:
    version = np.lib.format.read_magic(stream)
    if version not in _VERSIONS:
        raise ValueError(f"an array of format {version}, which holds no numbers")
    shape, is_fortran, dtype = _VERSIONS[version](stream)
    return Member(shape, dtype, is_fortran, stream.tell())
