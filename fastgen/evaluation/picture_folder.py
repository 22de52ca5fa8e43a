"""A folder of pictures as pictures by id, read when they are asked for."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fastgen.data.captions import contents
from fastgen.data.pixels import Header, Unreadable, check_header, picture_suffixes, read_rgb
from fastgen.data.texts import missing
from fastgen.errors import UserError, one_line
from fastgen.evaluation.dumps import MANIFEST
from fastgen.evaluation.picture_source import PictureSource, ready
from fastgen.evaluation.protocol import PrepareBlock
from fastgen.fingerprints import digest, known_hash, leads_back

T = TypeVar("T")
_THREADS = 4  # decoding and hashing leave Python's lock
_GREY = ("1", "L", "La", "LA", "I", "F")  # and I;16 with its variants
_PALETTE, _ON_WHITE = "with a palette", "with transparency (laid on white)"
_NAMES = {"P": _PALETTE, "PA": _PALETTE, "RGBA": _ON_WHITE, "RGBa": _ON_WHITE}


class PictureFolder(PictureSource):
    """The pictures of a folder, by id in the order of `names`: those directly in it, or below it where there are none directly.

    Every header is read at once: UserError that begins with `key`, what named the folder, for one without pictures, for several that were
    dumped apart, and for pictures that cannot be read. warnings: a line about what has been left aside, and one about pictures that are not RGB.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        names, aside = _listed(folder, key)
        self.names = _ordered(names)
        if not names:
            raise UserError(f"{key}: {str(folder)!r} is not a folder of pictures: {contents(folder)}")
        if len(dumps := _dumps(folder, names)) > 1:
            raise UserError(f"{key}: {str(folder)!r} holds pictures of several sets or models: name one of {one_line(', '.join(dumps), 300)}")
        self._headers = self._checked_headers()
        left = f"{key}: {aside} further pictures, in folders below {str(folder)!r}, are not read" if aside else None
        self.warnings = tuple(line for line in (left, self._conversions()) if line)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, ids: Sequence[int]) -> list[Tensor]:
        """Pictures (3, H, W) uint8, each of its own size: sRGB, upright, on white. UserError where one cannot be decoded, the same whichever it
        is: with the first of all pictures that cannot, and their number."""
        found = self._each(self._decoded, ids)
        if any(isinstance(each, Unreadable) for each in found):
            reasons = self._each(self._unreadable, range(len(self)))
            broken = [(name, reason) for name, reason in zip(self.names, reasons, strict=True) if reason is not None]
            raise self._refusal(broken, len(self))
        return [each for each in found if isinstance(each, Tensor)]

    @cached_property
    def content(self) -> str:
        """SHA-256 over names and bytes in the order of ids: equal wherever the folder lies."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return digest(list(zip(self.names, pool.map(lambda name: known_hash(self.folder / name), self.names), strict=True)))

    def name(self, index: int) -> str:
        return self.names[index]

    def check_sizes(self, how: PrepareBlock) -> None:
        """UserError, naming two sizes, unless pictures are of one size once they are prepared; by their headers, so that no work is lost."""
        first = self._headers[0].size
        for index, header in enumerate(self._headers):
            if _comparable(header.size, how) != _comparable(first, how):
                ready(self, [0, index], how)  # which says so, unless EXIF, which headers do not tell, turns one of them

    def _each(self, function: Callable[[int], T], ids: Iterable[int]) -> list[T]:
        with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:  # what threads do to the filters meanwhile ends with this block
            return list(pool.map(function, ids))

    def _unreadable(self, index: int) -> str | None:
        """Why a picture cannot be decoded."""
        found = self._decoded(index)
        return str(found) if isinstance(found, Unreadable) else None

    def _decoded(self, index: int) -> Tensor | Unreadable:
        try:
            return read_rgb(self.folder / self.names[index]).add_(0.5).to(torch.uint8)
        except Unreadable as error:
            return error

    def _checked_headers(self) -> list[Header]:
        headers: list[Header] = []
        broken: list[tuple[str, str]] = []
        for name in self.names:
            path = self.folder / name
            if problem := missing(path):
                broken.append((name, problem))
                continue
            try:
                headers.append(check_header(path))
            except Unreadable as error:
                broken.append((name, str(error)))
        if broken:
            raise self._refusal(broken, len(self.names))
        return headers

    def _refusal(self, broken: Sequence[tuple[str, str]], of: int) -> UserError:
        (name, why), count = broken[0], len(broken)
        others = f"{count} of {of} pictures cannot be read, the first: " if count > 1 else ""
        return UserError(f"{self.key}: {others}{str(self.folder / name)!r} is not a picture that can be read ({why}); replace it or take it out")

    def _conversions(self) -> str | None:
        kinds = Counter(kind for header in self._headers if (kind := _kind(header.mode)))
        if not kinds:
            return None
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        return f"{self.key}: of {len(self)} pictures {listed}; they are converted to RGB"


def _comparable(size: tuple[int, int], how: PrepareBlock) -> object:
    """What must be equal for pictures to be of one size once they are prepared."""
    return None if how.resize is not None else min(size) if how.crop == "centre" else size


def _kind(mode: str) -> str | None:
    """What pictures of one of Pillow's modes are called; None for RGB."""
    if mode in ("RGB", "RGBX"):
        return None
    if mode in _GREY or mode.startswith("I;"):
        return "grey-scale"
    return _NAMES.get(mode, mode)


def _listed(folder: Path, key: str) -> tuple[list[str], int]:
    """Relative POSIX names of the pictures, hidden ones apart, and how many more there are further below."""
    names = [name for name in _below(folder, key) if Path(name).suffix.lower() in picture_suffixes()]
    direct = [name for name in names if "/" not in name]
    return (direct, len(names) - len(direct)) if direct else (names, 0)


def _dumps(folder: Path, names: Iterable[str]) -> list[str]:
    """Folders below that each hold what an evaluation dumped of one set, as `--dump` leaves them below its own."""
    return sorted(str(folder / below) for below in {str(Path(name).parent) for name in names} - {"."} if (folder / below / MANIFEST).is_file())


def _below(folder: Path, key: str) -> Iterator[str]:
    """Names of what is no folder, links to nowhere included: a data set of which half is missing must not pass for a whole one."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UserError(f"{key}: cannot read {error.filename!r}: {error.strerror or error}") from error

    for here, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and not leads_back(here, name)]
        yield from ((Path(here) / name).relative_to(folder).as_posix() for name in files if not name.startswith("."))


def _ordered(names: Sequence[str]) -> tuple[str, ...]:
    """Sorted; names that differ in their numbers alone are in the order of these, so that 2.png comes before 10.png."""
    if len({re.sub("[0-9]+", "0", name) for name in names}) > 1:
        return tuple(sorted(names))
    return tuple(sorted(names, key=lambda name: ([int(number) for number in re.findall("[0-9]+", name)], name)))
