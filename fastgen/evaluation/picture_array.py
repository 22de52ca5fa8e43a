"""Pictures in one array: ADM's sample batches (`.npz` with `arr_0`), or any `.npz` or `.npy` of 8-bit pictures, read a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.evaluation.archives import Archive
from fastgen.evaluation.picture_source import PictureSource
from fastgen.files import loading
from fastgen.fingerprints import digest, known_hash

_ADM = "arr_0"


class PictureArray(PictureSource):
    """A uint8 array (N, H, W, 3) or (N, 3, H, W). UserError that begins with `key`, what named the file, where it holds none."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._member, self._shape, self._rows = _opened(path, key)
        self._is_first = self._shape[3] != 3  # channels come before the pixels

    def __len__(self) -> int:
        return self._shape[0]

    @cached_property
    def content(self) -> str:
        return digest([known_hash(self.path), self._member])

    def read(self, ids: Sequence[int]) -> list[Tensor]:
        pictures = torch.from_numpy(np.concatenate([self._rows(start, stop) for start, stop in _runs(ids)]))
        return list(pictures if self._is_first else pictures.permute(0, 3, 1, 2).contiguous())

    def name(self, index: int) -> str:
        return f"picture {index}"


def has_pictures(archive: Archive) -> bool:
    """Whether an archive holds an array of pictures."""
    return bool(_candidates(archive))


def _candidates(archive: Archive) -> list[str]:
    found = [name for name, member in archive.members.items() if _is_pictures(member.shape, member.dtype) and not member.is_fortran]
    return [_ADM] if _ADM in found else found


def _opened(path: Path, key: str) -> tuple[str, tuple[int, ...], Callable[[int, int], np.ndarray]]:
    """The name of the array, its shape, and what reads rows of it."""
    if path.suffix.lower() == ".npy":
        with loading(path):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not _is_pictures(array.shape, array.dtype):
            raise UserError(f"{key}: {str(path)!r} holds no pictures, which are uint8 (N, H, W, 3): {array.dtype} {array.shape}")
        return "", array.shape, lambda start, stop: np.array(array[start:stop])
    archive = Archive(path)
    found = _candidates(archive)
    if len(found) != 1:
        listed = ", ".join(f"{name} {member.dtype} {member.shape}" for name, member in archive.members.items())
        what = f"several arrays of pictures, none of them {_ADM}" if found else "no pictures, which are uint8 (N, H, W, 3)"
        raise UserError(f"{key}: {str(path)!r} holds {what}: {listed or 'no arrays'}")
    (name,) = found
    return name, archive.members[name].shape, lambda start, stop: archive.rows(name, start, stop)


def _is_pictures(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    return dtype == np.uint8 and len(shape) == 4 and 0 not in shape and 3 in (shape[1], shape[3])


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Ids that follow one another as [start, stop)."""
    runs: list[tuple[int, int]] = []
    for index in ids:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs
