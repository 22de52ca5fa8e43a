"""Features on disk by picture: what a killed evaluation goes on from, what several processes fill together, and what comparisons read again.

A store is a folder with an array `NAME.npy` for each feature, a row for each picture of one set in the order of ids, and a record for each chunk
that is whole, with the SHA-256 of its rows. Chunks are written with plain writes, never through a mapping: on a full disk that would kill.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastgen import records
from fastgen.errors import UserError
from fastgen.evaluation.tables import Table
from fastgen.files import PARTIAL, loading, write_atomically, writing
from fastgen.fingerprints import sealed, unsealed

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


class _Chunk(records.Schema):
    sha256: dict[str, str]
    costs: dict[str, float]


class Store:
    """The features of `count` pictures, written `chunk` at a time. Processes that share a folder may write different chunks at once."""

    def __init__(self, folder: Path, count: int, chunk: int) -> None:
        self.folder, self.count, self.chunk = folder, count, chunk
        self._sound: set[tuple[int, str]] = set()

    def ids(self, chunk: int) -> range:
        """Rows of a chunk; the last one may be smaller."""
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.count))

    @property
    def chunks(self) -> range:
        return range(-(-self.count // self.chunk))

    def missing(self, names: Collection[str]) -> list[int]:
        """Chunks of which a feature is not there, or is not as it was written."""
        return [chunk for chunk in self.chunks if not all(self._is_sound(chunk, name) for name in names)]

    def write(self, chunk: int, features: Mapping[str, Tensor], costs: Mapping[str, float]) -> None:
        """Put a chunk's rows on disk, then its record. costs: what drawing it took, by name. UserError where the disk takes no more."""
        ids = self.ids(chunk)
        digests: dict[str, str] = {}
        self._sound -= {(chunk, name) for name in features}
        for name, rows in features.items():
            if len(rows) != len(ids):
                raise ValueError(f"feature {name}: {len(rows)} rows for the {len(ids)} pictures of chunk {chunk}")
            array = np.ascontiguousarray(rows.numpy())
            self._put(name, ids.start, array)
            digests[name] = hashlib.sha256(array.tobytes()).hexdigest()
        with writing(self._place(chunk)), _alone(self.folder):  # another process may be adding other features to the same record
            before = self._record(chunk)
            record = {"sha256": {**before["sha256"], **digests}, "costs": {**before["costs"], **costs}}
            write_atomically(self._place(chunk), json.dumps(sealed(record)) + "\n")
        self._sound |= {(chunk, name) for name in features}

    def table(self, name: str) -> Table:
        """A feature of all pictures. UserError unless every chunk is there."""
        if lacking := self.missing([name]):
            raise UserError(f"{str(self.folder)!r} lacks {len(lacking)} of {len(self.chunks)} chunks of {name}")
        return Table(self._array(name))

    def costs(self) -> list[dict[str, float]]:
        """What each chunk that is whole took."""
        return [record["costs"] for chunk in self.chunks if (record := self._record(chunk))["costs"]]

    def _is_sound(self, chunk: int, name: str) -> bool:
        """Whether a chunk's rows are those that were written. Once they are, they are not read again in this object's life; once they are
        not, another process may be writing them."""
        if (chunk, name) not in self._sound:
            recorded = self._record(chunk)["sha256"].get(name)
            if recorded is None or recorded != self._digest(chunk, name):
                return False
            self._sound.add((chunk, name))
        return True

    def _digest(self, chunk: int, name: str) -> str | None:
        mapped = _mapped(self._array(name))
        if mapped is None or len(mapped) != self.count:
            return None
        ids = self.ids(chunk)
        return hashlib.sha256(mapped[ids.start : ids.stop].tobytes()).hexdigest()

    def _record(self, chunk: int) -> dict[str, Any]:
        """A chunk's record; an empty one where it is missing or damaged, so that the chunk is made again."""
        try:
            return records.checked(unsealed(records.read(self._place(chunk))), _Chunk)
        except ValueError:
            return {"sha256": {}, "costs": {}}

    def _place(self, chunk: int) -> Path:
        return self.folder / "chunks" / f"{chunk:06d}.json"

    def _array(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _put(self, name: str, row: int, array: np.ndarray) -> None:
        path = self._array(name)
        with writing(path):
            mapped = self._fitting(path, array)
            if mapped is None:
                self._allocate(path, array)
                mapped = self._fitting(path, array)
                assert mapped is not None
            place = mapped.offset + row * (mapped.nbytes // max(1, self.count))
            with path.open("r+b") as file:
                file.seek(place)
                file.write(array.tobytes())
                file.flush()
                os.fsync(file.fileno())

    def _fitting(self, path: Path, like: np.ndarray) -> np.memmap | None:
        """The array there, if it takes such rows."""
        mapped = _mapped(path)
        return mapped if mapped is not None and mapped.shape == (self.count, *like.shape[1:]) and mapped.dtype == like.dtype else None

    def _allocate(self, path: Path, like: np.ndarray) -> None:
        """A sparse array for all rows in place of what is there, unless another process has been faster: it may have written to its own."""
        with _alone(path.parent):
            if self._fitting(path, like) is None:
                for leftover in path.parent.glob(f"{PARTIAL}{glob.escape(path.name)}.*"):  # of a kill
                    leftover.unlink(missing_ok=True)
                partial = path.with_name(f"{PARTIAL}{path.name}.{os.getpid()}")
                np.lib.format.open_memmap(partial, mode="w+", dtype=like.dtype, shape=(self.count, *like.shape[1:])).flush()
                os.replace(partial, path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process is in here with this folder, which is made, on file systems that have locks."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab") as lock:
        with suppress(OSError):
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _mapped(path: Path) -> np.memmap | None:
    """The array in a file; None where there is none."""
    try:
        with loading(path):
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except UserError:
        return None
    return mapped if isinstance(mapped, np.memmap) and mapped.ndim > 0 else None


def total(costs: Iterable[Mapping[str, float]], name: str) -> float:
    """The sum of one cost over chunks."""
    return sum(each.get(name, 0.0) for each in costs)
