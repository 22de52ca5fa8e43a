"""Encoded data by row, wherever they lie: what a batch is put together from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastgen import conditioning


class Rows(Protocol):
    """N rows of tensors by name. `read_ahead`: reading them takes long enough to be done before they are needed."""

    @property
    def read_ahead(self) -> bool: ...

    def __len__(self) -> int: ...

    def select(self, index: Tensor) -> dict[str, Tensor]:
        """Rows `index` (B,) int64 of every tensor, (B, ...), on the run's device, floating-point ones in fp32."""
        ...


@dataclass(frozen=True)
class Held:
    """Rows in memory, on the run's device, in the dtype in which they are kept."""

    tensors: Mapping[str, Tensor]
    read_ahead = False

    def __len__(self) -> int:
        return conditioning.batch_size(dict(self.tensors))

    def select(self, index: Tensor) -> dict[str, Tensor]:
        return widened(conditioning.select(dict(self.tensors), index))


@dataclass(frozen=True)
class Chosen:
    """Some rows of others, by their place among these."""

    rows: Rows
    index: Tensor

    @property
    def read_ahead(self) -> bool:
        return self.rows.read_ahead

    def __len__(self) -> int:
        return len(self.index)

    def select(self, index: Tensor) -> dict[str, Tensor]:
        return self.rows.select(self.index[index.to(self.index.device)])


@dataclass(frozen=True)
class Joined:
    """Others' rows, one after the other."""

    first: Rows
    second: Rows

    @property
    def read_ahead(self) -> bool:
        return self.first.read_ahead or self.second.read_ahead

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def select(self, index: Tensor) -> dict[str, Tensor]:
        index = index.cpu()
        places = [torch.nonzero(index < len(self.first)).flatten(), torch.nonzero(index >= len(self.first)).flatten()]
        some = [(self.first, index[places[0]]), (self.second, index[places[1]] - len(self.first))]
        parts = [rows.select(own) for rows, own in some if len(own)]
        return conditioning.select(conditioning.cat(parts), torch.argsort(torch.cat(places)))


@dataclass(frozen=True)
class Column:
    """One of others' tensors, by another name and on another device."""

    rows: Rows
    source: str
    name: str
    device: torch.device

    @property
    def read_ahead(self) -> bool:
        return self.rows.read_ahead

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, index: Tensor) -> dict[str, Tensor]:
        return {self.name: self.rows.select(index)[self.source].to(self.device)}


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Half precision as fp32; all else as it is."""
    return {key: value.float() if value.dtype in (torch.bfloat16, torch.float16) else value for key, value in tensors.items()}


def narrowed(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in the dtype in which they are kept."""
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
