"""Rows of features in the order of ids, read from disk a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_BLOCK = 2**24  # bytes of a block in fp64


class Table:
    """(N, ...) features, fp32 or uint8, in memory or in a `.npy` file of which only what is asked for is read; `rows` picks some, in any
    order and with repetitions (as resampling does)."""

    def __init__(self, source: Tensor | Path, count: int | None = None, rows: Tensor | None = None) -> None:
        """source: a tensor or the file; count: only the first so many rows of it; rows: (M,) int64, of those."""
        self._source, self._rows = source, rows
        shape = tuple(source.shape) if isinstance(source, Tensor) else self._opened().shape
        self._count = shape[0] if count is None else count
        self.row_shape = tuple(shape[1:])

    def __len__(self) -> int:
        return self._count if self._rows is None else len(self._rows)

    @property
    def width(self) -> int:
        """Numbers a row."""
        return int(np.prod(self.row_shape, dtype=np.int64))

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) in the stored type; a copy, so that no file stays mapped."""
        stop = len(self) if stop is None else min(stop, len(self))
        return self._read(slice(start, stop) if self._rows is None else self._rows[start:stop])

    def take(self, rows: Tensor) -> Tensor:
        """Rows (M,) int64, in that order."""
        return self._read(rows if self._rows is None else self._rows[rows])

    def select(self, rows: Tensor) -> Table:
        """The table of some rows; nothing is read."""
        return Table(self._source, self._count, rows if self._rows is None else self._rows[rows])

    def first(self, count: int) -> Table:
        return self if count >= len(self) else self.select(torch.arange(count))

    def blocks(self, size: int | None = None) -> Iterator[Tensor]:
        """All rows in order, `size` at a time (default: about 16 MiB in fp64); the same blocks whatever the rows come from."""
        size = size or max(1, _BLOCK // (8 * max(1, self.width)))
        for start in range(0, len(self), size):
            yield self.read(start, start + size)

    def _read(self, index: slice | Tensor) -> Tensor:
        if isinstance(self._source, Tensor):
            return self._source[index].clone()
        mapped = self._opened()
        return torch.from_numpy(np.array(mapped[index if isinstance(index, slice) else index.numpy()]))

    def _opened(self) -> np.ndarray:
        assert isinstance(self._source, Path)
        return np.load(self._source, mmap_mode="r", allow_pickle=False)
