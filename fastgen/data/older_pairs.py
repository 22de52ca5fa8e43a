"""Folders of pairs of an older fastgen (formats 1 and 2): `pairs.json` and shards of their own, which are read and not continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from torch import Tensor

from fastgen import records
from fastgen.data.pairs import Solver
from fastgen.errors import UserError
from fastgen.files import reading
from fastgen.fingerprints import unsealed

FILE = "pairs.json"
SHARD = 256  # pairs a file


class Manifest(BaseModel):
    """pairs.json. format: 1 for folders that recorded no hashes; teacher: what of the recipe's block decides the samples, and in format 2 its
    content as `sha256`; prompts: hash of the weighted prompts drawn from; count: pairs the folder is to hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    format: Literal[1, 2] = 2
    teacher: dict[str, Any]
    shape: tuple[Annotated[int, Field(ge=1, le=2**20)], ...]
    solver: Solver
    steps: Annotated[int, Field(ge=1, le=1000)]
    grid: tuple[float, ...]
    seed: int
    prompts: str
    count: Annotated[int, Field(ge=1, le=10**9)]


@dataclass(frozen=True)
class Shards:
    """The files beside a manifest."""

    path: Path
    manifest: Manifest

    def _files(self, count: int) -> Iterator[tuple[Path, range]]:
        """Every file that is to hold some of the first `count` pairs, with their indices."""
        for start in range(0, count, SHARD):
            yield self.path / f"pairs_{start // SHARD:06d}.safetensors", range(start, min(start + SHARD, self.manifest.count))

    def held(self, count: int) -> int:
        """How many of the first `count` pairs are there; reads headers only."""
        return sum(min(_held(file), len(ids), count - ids.start) for file, ids in self._files(count))

    def prompts(self, count: int) -> list[str]:
        """Of the first `count` pairs, as far as they are there; reads headers only."""
        return [prompt for file, _ in self._files(count) if file.is_file() for prompt in _header(file, "prompts") or ()][:count]

    def hashes(self, count: int) -> list[str]:
        """Of the first `count` pairs; of shards with hashes it reads headers only."""
        found = []
        for file, ids in self._files(count):
            recorded = _header(file, "sha256")
            found += _pair_hashes(*self._shard(file, len(ids))) if recorded is None else recorded[: len(ids)]
        return found[:count]

    def load(self, count: int) -> tuple[Tensor, list[str], Tensor]:
        """Seeds (M,), prompts and samples (M, *shape) of the first `count` pairs; UserError for a broken shard, or one whose pairs are not
        those that were written."""
        seeds, prompts, x0 = zip(*(self._shard(file, len(ids)) for file, ids in self._files(count)), strict=True)
        return torch.cat(seeds)[:count], [prompt for some in prompts for prompt in some][:count], torch.cat(x0)[:count]

    def _shard(self, file: Path, count: int) -> tuple[Tensor, list[str], Tensor]:
        prompts, recorded = _header(file, "prompts") or [], _header(file, "sha256")
        with reading(file):
            with safe_open(file, "pt") as shard:
                seeds, x0 = shard.get_tensor("seeds"), shard.get_tensor("x0")
            if not len(seeds) == len(x0) == len(prompts) or tuple(x0.shape[1:]) != self.manifest.shape:
                raise ValueError(f"{len(seeds)} seeds, {len(prompts)} prompts and samples {tuple(x0.shape)} do not fit together")
            if (recorded is not None or self.manifest.format > 1) and _pair_hashes(seeds, prompts, x0) != recorded:
                raise ValueError("its pairs are not those that were written: their hashes differ")
        return seeds[:count], prompts[:count], x0[:count]


def older(path: Path, key: str) -> Shards | None:
    """What an older fastgen has left in a folder; None where that is nothing. UserError for what cannot be read."""
    file = path / FILE
    if not file.is_file():
        return None
    try:
        record = records.read(file)
        return Shards(path, Manifest.model_validate(unsealed(record) if record.get("format") == 2 else record))
    except ValidationError as error:
        raise UserError(f"{key}: cannot read {str(file)!r}: {records.explained(error)}") from error
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    except ValueError as error:
        raise UserError(f"{key}: cannot read {str(file)!r}: {error}") from error


def _held(file: Path) -> int:
    """Pairs in a shard, 0 when it is not there; UserError when it cannot be read."""
    if not file.is_file():
        return 0
    with reading(file), safe_open(file, "pt") as shard:
        return shard.get_slice("seeds").get_shape()[0]


def _header(file: Path, key: str) -> list[str] | None:
    """A JSON list in a shard's header, None when it is not there; UserError when it cannot be read."""
    with reading(file), safe_open(file, "pt") as shard:
        text = (shard.metadata() or {}).get(key)
        try:
            return None if text is None else records.parse(text, list[str])
        except ValueError as error:
            raise ValueError(f"{key} in its header: {error}") from error


def _pair_hashes(seeds: Tensor, prompts: list[str], x0: Tensor) -> list[str]:
    """SHA-256 of each pair: its seed, its prompt, and the sample's type, shape and bytes."""
    kind = f"{x0.dtype} {tuple(x0.shape[1:])}"
    heads = [json.dumps([seed, prompt, kind]) for seed, prompt in zip(seeds.tolist(), prompts, strict=True)]
    samples = [sample.contiguous().view(torch.uint8).numpy().tobytes() for sample in x0]
    return [hashlib.sha256(head.encode() + sample).hexdigest() for head, sample in zip(heads, samples, strict=True)]
