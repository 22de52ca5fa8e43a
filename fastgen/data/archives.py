"""Pictures inside tar archives as WebDataset packs them: `0001.jpg` beside `0001.txt`, or beside `0001.json` with the caption among its keys.

Nothing is unpacked. A picture is read where it lies, so that any one can be drawn at any time; that takes archives without compression.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from fastgen.data.texts import text_of
from fastgen.fingerprints import known_hash

SUFFIX = ".tar"


@dataclass(frozen=True)
class Member:
    """A file of an archive: `size` bytes from `offset` on."""

    archive: Path
    name: str
    offset: int
    size: int

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file alone, for reading."""
        assert mode == "rb"
        return io.BufferedReader(Window(self.archive.open("rb"), self.offset, self.size))

    def content(self) -> str:
        return f"{known_hash(self.archive)}/{self.name}"

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


class Window(io.RawIOBase):
    """`size` bytes of a file from `offset` on, and none beyond; closes the file with itself."""

    def __init__(self, file: Any, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"no place {start + offset} in a file")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        self._file.seek(self._offset + self._at)
        read = self._file.readinto(memoryview(buffer)[:count])
        self._at += read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()


def samples(archive: Path) -> tuple[dict[str, dict[str, Member]], list[str]]:
    """Each sample's files by what follows the first dot of their names, lower case, in the order of the archive; and what is wrong: it is no tar
    archive, breaks off, or holds a file twice."""
    found: dict[str, dict[str, Member]] = {}
    problems: list[str] = []
    try:
        for member in _members(archive):
            path = PurePosixPath(member.name)
            stem, dot, rest = path.name.partition(".")
            if not stem or not dot:  # hidden, or without a suffix
                continue
            if found.setdefault(str(path.with_name(stem)), {}).setdefault(rest.lower(), member) is not member:
                problems.append(f"{str(archive)!r} holds {member.name!r} twice")
    except (tarfile.TarError, OSError, ValueError) as error:
        count = sum(map(len, found.values()))
        after = f" after {count} files" if count else ""
        problems.append(f"{str(archive)!r} is no tar archive that can be read{after} ({' '.join(str(error).split())[:200]})")
    return found, problems


def _members(archive: Path) -> Iterator[Member]:
    end = archive.stat().st_size
    with tarfile.open(archive, "r:") as tar:
        for info in tar:
            if info.isfile() and info.offset_data + info.size > end:
                raise tarfile.ReadError(f"{info.name!r} is cut off")
            if info.isfile():
                yield Member(archive, info.name, info.offset_data, info.size)
        # After its first header tarfile takes whatever is none for the end.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it breaks off before its end is marked")


def text_in(member: Member, key: str) -> str:
    """Its text. UserError that begins with `key` for other bytes."""
    with member.open("rb") as file:
        return text_of(file.read(), str(member), key)
