"""Pictures that lie somewhere already, by id, whatever they lie in: real ones, and such as somebody else has drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.evaluation.extractors.base import Pictures
from fastgen.evaluation.preparation import prepared
from fastgen.evaluation.protocol import PrepareBlock


class PictureSource(ABC):
    """Pictures by id, from 0. key: what named them, with which messages begin. warnings: lines to show."""

    key: str
    warnings: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def content(self) -> str:
        """SHA-256 of what the pictures are, wherever they lie."""

    @abstractmethod
    def read(self, ids: Sequence[int]) -> list[Tensor]:
        """Pictures (3, H, W) uint8, each of its own size. UserError for those that cannot be decoded."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What a message calls a picture."""

    def check_sizes(self, how: PrepareBlock) -> None:
        """UserError, before much is read, where pictures are known to differ in size once they are prepared."""
        return


def ready(source: PictureSource, ids: Sequence[int], how: PrepareBlock) -> Pictures:
    """Pictures as extractors get them, each prepared by itself. UserError that names both sizes where two still differ."""
    pictures = source.read(ids)
    done = [prepared(picture[None], how) for picture in pictures]
    for index, picture, one in zip(ids, pictures, done, strict=True):
        if one.shape != done[0].shape:
            names = f"{source.name(ids[0])!r} has {_size(pictures[0])} pixels (width x height), {source.name(index)!r} {_size(picture)}"
            raise UserError(f"{source.key}: pictures differ in size: {names}; prepare.resize of a protocol brings them to one")
    return Pictures(torch.cat(done), ("",) * len(done), raw=pictures)


def _size(picture: Tensor) -> str:
    return f"{picture.shape[2]} x {picture.shape[1]}"
