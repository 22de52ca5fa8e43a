"""A folder of noise-sample pairs that several runs share: what they were drawn with, and shards that an interrupted drawing continues.

`pairs.json` says what the folder is meant to hold; `pairs_NNNNNN.safetensors` hold the seeds and samples, and in their header the prompts
and a hash of each pair. So a shard is whole in itself, and the first pairs of a folder are the same however far it has grown.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save

from fastgen import records
from fastgen.data.pairs import Encode, Pairs, Solver, TeacherSampler, cat, make_pairs
from fastgen.errors import UserError
from fastgen.files import PARTIAL, expanded, reading, write_atomically
from fastgen.fingerprints import digest, sealed, unsealed

KEY = "recipe key data.pairs"
SHARD = 256  # pairs a file
_OF_THE_TEACHER = ("pretrained", "guidance", "negative_prompt", "max_sequence_length")
_IF_STATED = ("shift", "embedded_guidance")  # the other options, size and frames, are in the samples' shape


def _identity(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe's block decides the samples; the content and some options only where they are known."""
    known = {key: teacher[key] for key in (*_IF_STATED, "sha256") if teacher.get(key) is not None}
    return {key: teacher[key] for key in _OF_THE_TEACHER} | known


class Manifest(BaseModel):
    """pairs.json. format: 1 for folders of an older fastgen, which recorded no hashes; teacher: the recipe's block, a local folder as an
    absolute path, and its content as `sha256`; prompts: hash of the weighted prompts drawn from; count: pairs the folder is to hold."""

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

    @classmethod
    def describe(cls, sampler: TeacherSampler, teacher: Mapping[str, Any], prompts: Mapping[str, float], *, seed: int, count: int) -> Manifest:
        return cls(
            teacher=_identity(teacher),
            shape=sampler.shape,
            solver=sampler.solver,
            steps=len(sampler.times),
            grid=tuple(sampler.times.tolist()),
            seed=seed,
            prompts=digest(list(prompts.items()))[:16],
            count=count,
        )

    def difference(self, other: Manifest) -> tuple[str, Any, Any] | None:
        """The first thing, and its value in each, in which two drawings differ beyond the number of pairs."""
        key = _difference(self.teacher, other.teacher)
        if key is not None:
            return f"teacher.{key}", self.teacher.get(key), other.teacher.get(key)
        for key, value in self._parts().items():
            if value != other._parts()[key]:
                return key, value, other._parts()[key]
        return None

    def _parts(self) -> dict[str, Any]:
        return {
            "the latents' shape": self.shape,
            "--solver": self.solver,
            "--steps": self.steps,
            "the sampling grid": self.grid,
            "train.seed": self.seed,
            "data.prompts": self.prompts,
        }


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key in which two teachers differ. Which one it is counts by content, and by name where one of them has no hash recorded."""
    identity = "sha256" if "sha256" in then and "sha256" in now else "pretrained"
    return next((key for key in (*_OF_THE_TEACHER, *_IF_STATED) if then.get(by := identity if key == "pretrained" else key) != now.get(by)), None)


@dataclass(frozen=True)
class PairFolder:
    """A folder with a manifest that could be read."""

    path: Path
    manifest: Manifest

    def shards(self) -> list[tuple[Path, range]]:
        """Every file the folder is to hold, with the indices of its pairs."""
        return [
            (self.path / f"pairs_{start // SHARD:06d}.safetensors", range(start, min(start + SHARD, self.manifest.count)))
            for start in range(0, self.manifest.count, SHARD)
        ]

    def check(self, teacher: Mapping[str, Any], shape: tuple[int, ...], recipe_key: str = KEY) -> None:
        """UserError, beginning with `recipe_key`, where a run's teacher did not draw these pairs, or where some are missing; reads headers only."""
        there = self.manifest.teacher
        key = _difference(there, teacher)
        if key is not None:
            now = "which has changed since" if there.get(key) == teacher.get(key) else f"this recipe has {teacher.get(key)!r}"
            raise UserError(f"{recipe_key}: {str(self.path)!r} was drawn with teacher.{key} {there.get(key)!r}, {now}")
        if self.manifest.shape != shape:
            raise UserError(f"{recipe_key}: {str(self.path)!r} holds latents {self.manifest.shape}, this recipe's teacher has {shape}")
        if self.held() < self.manifest.count:
            raise UserError(
                f"{recipe_key}: {str(self.path)!r} holds {self.held()} of {self.manifest.count} pairs; finish it with the same `fastgen cache pairs` "
                "command"
            )

    def held(self) -> int:
        """How many pairs are there already."""
        return sum(min(_held(file), len(ids)) for file, ids in self.shards())

    def prompts(self) -> list[str]:
        """Each pair's, of those that are there; reads headers only."""
        return [prompt for file, _ in self.shards() if file.is_file() for prompt in _header(file, "prompts") or ()]

    def content(self, count: int) -> str:
        """What the first `count` pairs are, wherever they lie; UserError where there are fewer. Of shards with hashes it reads headers only."""
        if self.manifest.count < count:
            raise UserError(f"{KEY}: {str(self.path)!r} holds {self.manifest.count} pairs, but the run began with {count}")
        hashes = [value for file, ids in self.shards() if ids.start < count for value in self._hashes(file, len(ids))]
        return digest(hashes[:count])

    def _hashes(self, file: Path, count: int) -> list[str]:
        recorded = _header(file, "sha256")
        return _pair_hashes(self._shard(file, count)) if recorded is None else recorded[:count]

    def load(self) -> Pairs:
        """All pairs; UserError for a broken shard, or one whose pairs are not those that were written."""
        return cat([self._shard(file, len(ids)) for file, ids in self.shards()])

    def _shard(self, file: Path, count: int) -> Pairs:
        prompts, recorded = tuple(_header(file, "prompts") or ()), _header(file, "sha256")
        with reading(file):
            with safe_open(file, "pt") as shard:
                seeds, x0 = shard.get_tensor("seeds"), shard.get_tensor("x0")
            if not len(seeds) == len(x0) == len(prompts) or tuple(x0.shape[1:]) != self.manifest.shape:
                raise ValueError(f"{len(seeds)} seeds, {len(prompts)} prompts and samples {tuple(x0.shape)} do not fit together")
            pairs = Pairs(seeds, prompts, x0)
            if (recorded is not None or self.manifest.format > 1) and _pair_hashes(pairs) != recorded:
                raise ValueError("its pairs are not those that were written: their hashes differ")
        return Pairs(seeds[:count], prompts[:count], x0[:count])

    def complete(
        self,
        sampler: TeacherSampler,
        encode: Encode,
        prompts: Mapping[str, float],
        *,
        batch: int = 64,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Draw the pairs that are not there yet, a shard at a time; `progress` is told the last finished index + 1."""
        for file, ids in self.shards():
            held = min(_held(file), len(ids))
            if held < len(ids):
                rest = range(ids.start + held, ids.stop)
                new = make_pairs(sampler, encode, prompts, rest, seed=self.manifest.seed, batch=batch, progress=progress)
                _write(file, cat([self._shard(file, held), new]) if held else new)


def open_folder(source: str | Path) -> PairFolder:
    """What `data.pairs` names; UserError when that is no folder of pairs."""
    path = expanded(source)
    file = path / "pairs.json"
    if not file.is_file():
        raise UserError(f"{KEY}: {str(source)!r} is no folder made by `fastgen cache pairs`")
    try:
        record = records.read(file)
        content = unsealed(record) if record.get("format") == 2 else record
        return PairFolder(path, Manifest.model_validate(content))
    except ValidationError as error:
        raise UserError(f"{KEY}: cannot read {str(file)!r}: {records.explained(error)}") from error
    except UserError as error:
        raise UserError(f"{KEY}: {error}") from error
    except ValueError as error:
        raise UserError(f"{KEY}: cannot read {str(file)!r}: {error}") from error


def create_folder(path: Path, manifest: Manifest) -> PairFolder:
    """A folder that is to hold `manifest.count` pairs: a new one, or one of the same drawing, which keeps what it has.

    UserError naming --output when there is something else, or pairs drawn in another way.
    """
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"--output: {str(path)!r} cannot be made, because {str(there)!r} is a file")
    if (path / "pairs.json").is_file():
        before = open_folder(path).manifest
        differs = before.difference(manifest)
        if differs is not None:
            key, then, now = differs
            other = "which has changed since" if then == now else f"not {now!r}"  # a teacher of the same name
            raise UserError(f"--output: {str(path)!r} holds pairs drawn with {key} {then!r}, {other}; choose another folder")
        manifest = before.model_copy(update={"count": max(manifest.count, before.count)})  # of an older format, if it is
        if manifest.format == 1 and PairFolder(path, before).held() < manifest.count:
            raise UserError(
                f"--output: {str(path)!r} holds pairs of an older fastgen, which drew their seeds otherwise: they can be used, but not continued; "
                "choose another folder"
            )
    elif path.is_dir() and any(not name.startswith(PARTIAL) for name in os.listdir(path)):  # a kill may have left the first file half written
        raise UserError(f"--output: {str(path)!r} holds other files and no pairs; choose an empty or new folder")
    record = manifest.model_dump(mode="json")
    write_atomically(path / "pairs.json", json.dumps(sealed(record) if manifest.format > 1 else record, indent=1) + "\n")
    return PairFolder(path, manifest)


def _held(file: Path) -> int:
    """Pairs in a shard, 0 when it is not there; UserError when it cannot be read."""
    if not file.is_file():
        return 0
    with reading(file), safe_open(file, "pt") as shard:
        return shard.get_slice("seeds").get_shape()[0]


def _write(file: Path, pairs: Pairs) -> None:
    tensors: dict[str, torch.Tensor] = {"seeds": pairs.seeds, "x0": pairs.x0.contiguous()}
    write_atomically(file, save(tensors, metadata={"prompts": json.dumps(pairs.prompts), "sha256": json.dumps(_pair_hashes(pairs))}))


def _header(file: Path, key: str) -> Any:
    """A JSON list in a shard's header, None when it is not there; UserError when it cannot be read."""
    with reading(file), safe_open(file, "pt") as shard:
        text = (shard.metadata() or {}).get(key)
        try:
            return None if text is None else records.parse(text, list[str])
        except ValueError as error:
            raise ValueError(f"{key} in its header: {error}") from error


def _pair_hashes(pairs: Pairs) -> list[str]:
    """SHA-256 of each pair: its seed, its prompt, and the sample's type, shape and bytes."""
    kind = f"{pairs.x0.dtype} {tuple(pairs.x0.shape[1:])}"
    heads = [json.dumps([seed, prompt, kind]) for seed, prompt in zip(pairs.seeds.tolist(), pairs.prompts, strict=True)]
    samples = [x0.contiguous().view(torch.uint8).numpy().tobytes() for x0 in pairs.x0]
    return [hashlib.sha256(head.encode() + sample).hexdigest() for head, sample in zip(heads, samples, strict=True)]
