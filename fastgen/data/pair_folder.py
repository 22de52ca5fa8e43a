"""A folder of noise-sample pairs that several runs share: what they were drawn with, and shards that an interrupted drawing continues.

`pairs.json` says what the folder is meant to hold; `pairs_NNNNNN.safetensors` hold the seeds and samples, and the prompts in their header.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import save

from fastgen.data.pairs import Encode, Pairs, Solver, TeacherSampler, cat, make_pairs
from fastgen.errors import UserError
from fastgen.files import reading, write_atomically

KEY = "recipe key data.pairs"
SHARD = 256  # pairs a file
_OF_THE_TEACHER = ("pretrained", "guidance", "negative_prompt", "max_sequence_length")  # the size is in the samples' shape


def _identity(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe's block decides the samples; the shift only where it is stated."""
    return {key: teacher[key] for key in _OF_THE_TEACHER} | ({"shift": teacher["shift"]} if teacher.get("shift") is not None else {})


class Manifest(BaseModel):
    """pairs.json. teacher: the recipe's block, a local folder as an absolute path; prompts: hash of the weighted prompts drawn from;
    count: pairs the folder is to hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    teacher: dict[str, Any]
    shape: tuple[int, ...]
    solver: Solver
    steps: int
    grid: tuple[float, ...]
    seed: int
    prompts: str
    count: int

    @classmethod
    def describe(cls, sampler: TeacherSampler, teacher: Mapping[str, Any], prompts: Mapping[str, float], *, seed: int, count: int) -> Manifest:
        return cls(
            teacher=_identity(teacher),
            shape=sampler.shape,
            solver=sampler.solver,
            steps=len(sampler.times),
            grid=tuple(sampler.times.tolist()),
            seed=seed,
            prompts=hashlib.sha256(json.dumps(list(prompts.items())).encode()).hexdigest()[:16],
            count=count,
        )

    def difference(self, other: Manifest) -> tuple[str, Any, Any] | None:
        """The first thing, and its value in each, in which two drawings differ beyond the number of pairs."""
        mine, theirs = self._parts(), other._parts()
        for key in {**mine, **theirs}:
            if mine.get(key) != theirs.get(key):
                return key, mine.get(key), theirs.get(key)
        return None

    def _parts(self) -> dict[str, Any]:
        teacher = {f"teacher.{key}": value for key, value in self.teacher.items()}
        return teacher | {
            "the latents' shape": self.shape,
            "--solver": self.solver,
            "--steps": self.steps,
            "the sampling grid": self.grid,
            "train.seed": self.seed,
            "data.prompts": self.prompts,
        }


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

    def check(self, teacher: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        """UserError where a run's teacher did not draw these pairs, or where some are still missing; reads headers only."""
        ours, there = _identity(teacher), self.manifest.teacher
        for key in {**ours, **there}:
            if there.get(key) != ours.get(key):
                raise UserError(f"{KEY}: {str(self.path)!r} was drawn with teacher.{key} {there.get(key)!r}, this recipe has {ours.get(key)!r}")
        if self.manifest.shape != shape:
            raise UserError(f"{KEY}: {str(self.path)!r} holds latents {self.manifest.shape}, this recipe's teacher has {shape}")
        if self.held() < self.manifest.count:
            raise UserError(
                f"{KEY}: {str(self.path)!r} holds {self.held()} of {self.manifest.count} pairs; finish it with the same `fastgen cache pairs` command"
            )

    def held(self) -> int:
        """How many pairs are there already."""
        return sum(min(_held(file), len(ids)) for file, ids in self.shards())

    def load(self) -> Pairs:
        """All pairs; UserError for a broken shard."""
        return cat([self._shard(file, len(ids)) for file, ids in self.shards()])

    def _shard(self, file: Path, count: int) -> Pairs:
        with reading(file):
            with safe_open(file, "pt") as shard:
                seeds, x0, prompts = shard.get_tensor("seeds"), shard.get_tensor("x0"), tuple(json.loads(shard.metadata()["prompts"]))
            if not len(seeds) == len(x0) == len(prompts) or tuple(x0.shape[1:]) != self.manifest.shape:
                raise ValueError(f"{len(seeds)} seeds, {len(prompts)} prompts and samples {tuple(x0.shape)} do not fit together")
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
    path = Path(source).expanduser()
    file = path / "pairs.json"
    if not file.is_file():
        raise UserError(f"{KEY}: {str(source)!r} is no folder made by `fastgen cache pairs`")
    try:
        return PairFolder(path, Manifest.model_validate_json(file.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{KEY}: {str(file)!r} cannot be read ({'.'.join(map(str, first['loc']))}: {first['msg']})") from error


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
            raise UserError(f"--output: {str(path)!r} holds pairs drawn with {key} {then!r}, not {now!r}; choose another folder")
        manifest = manifest.model_copy(update={"count": max(manifest.count, before.count)})
    elif path.is_dir() and any(path.iterdir()):
        raise UserError(f"--output: {str(path)!r} holds other files and no pairs; choose an empty or new folder")
    write_atomically(path / "pairs.json", manifest.model_dump_json(indent=1) + "\n")
    return PairFolder(path, manifest)


def _held(file: Path) -> int:
    """Pairs in a shard, 0 when it is not there; UserError when it cannot be read."""
    if not file.is_file():
        return 0
    with reading(file), safe_open(file, "pt") as shard:
        return shard.get_slice("seeds").get_shape()[0]


def _write(file: Path, pairs: Pairs) -> None:
    tensors: dict[str, torch.Tensor] = {"seeds": pairs.seeds, "x0": pairs.x0.contiguous()}
    write_atomically(file, save(tensors, metadata={"prompts": json.dumps(pairs.prompts)}))
