"""Pairs that lie in a folder, a store of the kind `pairs`: how they are drawn into it, and what a run asks of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgen.config import PairsBlock
from fastgen.data.encoded import Encoder, Keeping
from fastgen.data.older_pairs import FILE as OLDER_FILE
from fastgen.data.older_pairs import Shards, older
from fastgen.data.pairs import Encode, Pairs, Solver, TeacherSampler, draw, draw_from, drawn_prompts
from fastgen.data.rows import Chosen
from fastgen.data.store import Encoded, Store, key_of, open_store
from fastgen.errors import UserError
from fastgen.files import expanded
from fastgen.fingerprints import digest
from fastgen.progress import Progress
from fastgen.sampling import Predict

KEY = key_of("pairs")
CPU = torch.device("cpu")
_OF_THE_TEACHER = ("guidance", "negative_prompt", "max_sequence_length")
_IF_STATED = ("shift", "embedded_guidance", "lora")  # the other options, size and frames, are in the samples' shape


@dataclass(frozen=True)
class Drawing:
    """What pairs are drawn with. times: the sampler's grid (N,), shape: of a sample; teacher: the recipe's block, a local folder as an absolute
    path, and its content as `sha256`; prompts: the weighted ones drawn from; precision: in which the teacher draws, by recipe keys; images: the
    content of those that noise is sought for, None where samples are sought for noise."""

    times: Tensor
    shape: tuple[int, ...]
    solver: Solver
    teacher: Mapping[str, Any]
    prompts: Mapping[str, float]
    seed: int
    precision: Mapping[str, Any] = field(default_factory=dict)
    images: str | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """What decides each pair, by what messages call it."""
        known = {key: self.teacher[key] for key in _IF_STATED if self.teacher.get(key) is not None}
        teacher = {f"teacher.{key}": value for key, value in ({key: self.teacher[key] for key in _OF_THE_TEACHER} | known).items()}
        drawn = {"--solver": self.solver, "--steps": len(self.times), "the sampling grid": self.times.tolist()}
        chosen = {"train.seed": self.seed, "data.prompts": digest(list(self.prompts.items()))[:16]}
        source = {"--from": "noise"} if self.images is None else {"--from": "data", "data.images": self.images}
        return {"teacher.pretrained": self.teacher["sha256"], **teacher, **self.precision, **drawn, **chosen, **source}

    def sampler(self, predict: Predict, device: torch.device | str) -> TeacherSampler:
        """The teacher's, by its guided predictions."""
        return TeacherSampler(predict, self.times.to(device), self.shape, self.solver)

    def of_noise(self, sampler: Callable[[], TeacherSampler], encode: Encode, count: int, batch: int) -> Encoder:
        """The first `count` pairs whose noise is drawn: their seeds and samples. sampler: asked for when the first are drawn."""

        def make(ids: Sequence[int]) -> Encoded:
            some = range(ids[0], ids[-1] + 1)
            prompts = drawn_prompts(self.prompts, some, seed=self.seed)
            seeds, x0 = draw(sampler(), encode, prompts, some, seed=self.seed)
            return Encoded({"seed": seeds, "x0": x0}, prompts, {})

        return self._encoder(count, {"seed": ("int64", ()), "x0": ("float", self.shape)}, make, batch)

    def of_data(
        self,
        sampler: Callable[[], TeacherSampler],
        encode: Encode,
        latents: Callable[[Sequence[int]], Tensor],
        captions: Sequence[Mapping[str, float]],
        batch: int,
    ) -> Encoder:
        """A pair for every image: its latents, and the noise where the teacher's ODE leads from them under one of its captions."""

        def make(ids: Sequence[int]) -> Encoded:
            some = range(ids[0], ids[-1] + 1)
            prompts = [drawn_prompts(captions[i], [i], seed=self.seed)[0] for i in some]
            x0 = latents(ids)
            return Encoded({"z": draw_from(sampler(), encode, prompts, x0, some), "x0": x0.float().cpu()}, prompts, {})

        shape = ("float", self.shape)
        return self._encoder(len(captions), {"z": shape, "x0": shape}, make, batch)

    def _encoder(self, count: int, fields: Mapping[str, Any], make: Callable[[Sequence[int]], Encoded], batch: int) -> Encoder:
        # Pair i is the same in any number of them.
        return Encoder("pairs", count, fields, lambda first: digest(self.origin), make, None, batch, self.origin, self.teacher["pretrained"])


class PairFolder(Protocol):
    """A folder of pairs, or the first `count` of one. teacher: what drew them, by keys of a recipe's block."""

    @property
    def path(self) -> Path: ...
    @property
    def count(self) -> int: ...
    @property
    def teacher(self) -> Mapping[str, Any]: ...
    @property
    def drawn(self) -> Mapping[str, Any]:
        """dtype, solver and steps, and the samples' shape."""
        ...

    def held(self) -> int:
        """How many of them are there; reads headers only."""
        ...

    def prompts(self) -> list[str]:
        """Each pair's, of those that are there; reads headers only."""
        ...

    def hashes(self) -> list[str]:
        """Each pair's."""
        ...

    def load(self, keeping: Keeping, progress: Progress) -> Pairs:
        """UserError for what is broken, when it is read."""
        ...


@dataclass(frozen=True)
class Stored:
    """A folder that `fastgen cache pairs` has made."""

    store: Store
    count: int

    @property
    def path(self) -> Path:
        return self.store.path

    @property
    def teacher(self) -> Mapping[str, Any]:
        origin = {key.removeprefix("teacher."): value for key, value in self.store.manifest.origin.items() if key.startswith("teacher.")}
        return {**origin, "pretrained": self.store.manifest.teacher, "sha256": origin["pretrained"]}

    @property
    def drawn(self) -> Mapping[str, Any]:
        manifest = self.store.manifest
        return {
            "solver": manifest.origin["--solver"],
            "steps": manifest.origin["--steps"],
            "shape": manifest.fields["x0"][1],
            "dtype": manifest.dtype,
        }

    def held(self) -> int:
        missing = [self.store.ids(shard) for shard in self.store.missing()]
        return self.count - sum(max(0, min(ids.stop, self.count) - ids.start) for ids in missing)

    def prompts(self) -> list[str]:
        return [text for i, text in self.store.about(self.count) if i < self.count]

    def hashes(self) -> list[str]:
        return self.store.hashes(self.count)

    def load(self, keeping: Keeping, progress: Progress) -> Pairs:
        rows = keeping.of_pairs().opened(replace(self.store, device=CPU), progress)
        return Pairs(rows if self.count == len(self.store) else Chosen(rows, torch.arange(self.count)), tuple(self.prompts()))


@dataclass(frozen=True)
class Older:
    """A folder of an older fastgen."""

    shards: Shards
    count: int

    @property
    def path(self) -> Path:
        return self.shards.path

    @property
    def teacher(self) -> Mapping[str, Any]:
        return self.shards.manifest.teacher

    @property
    def drawn(self) -> Mapping[str, Any]:
        return {**self.shards.manifest.model_dump(include={"solver", "steps", "shape"}), "dtype": "fp32"}

    def held(self) -> int:
        return self.shards.held(self.count)

    def prompts(self) -> list[str]:
        return self.shards.prompts(self.count)

    def hashes(self) -> list[str]:
        return self.shards.hashes(self.count)

    def load(self, keeping: Keeping, progress: Progress) -> Pairs:
        return Pairs.held(*self.shards.load(self.count))


def open_folder(source: str | Path, asked: PairsBlock | None = None) -> PairFolder:
    """What `data.pairs` names, a folder or the one that `fastgen cache pairs` has made in it; UserError when that is no folder of pairs, or one of
    other or of fewer pairs than the recipe asks for."""
    path = expanded(source)
    found = next(
        (store for home in (path, path / "pairs") if (store := open_store(home, key=KEY)) is not None and store.manifest.kind == "pairs"), None
    )
    if found is not None:
        folder: PairFolder = Stored(found, len(found))
    elif (shards := older(path, KEY)) is not None:
        folder = Older(shards, shards.manifest.count)
    else:
        raise UserError(f"{KEY}: {str(source)!r} is no folder made by `fastgen cache pairs`")
    for name in ("solver", "steps"):
        wanted = getattr(asked, name, None)
        if wanted is not None and folder.drawn[name] != wanted:
            raise UserError(f"{KEY}.{name}: {str(source)!r} was drawn with {folder.drawn[name]!r}, this recipe asks for {wanted!r}")
    if asked is not None and asked.count is not None:
        if folder.count < asked.count:
            raise UserError(f"{KEY}.count: {str(source)!r} is to hold {folder.count} pairs, this recipe asks for {asked.count}")
        folder = replace(folder, count=asked.count)  # type: ignore[type-var]
    return folder


def check(folder: PairFolder, teacher: Mapping[str, Any], shape: Sequence[int], dtype: str, key: str = KEY) -> None:
    """UserError, beginning with `key`, where a run's teacher did not draw these pairs, where they are kept in another dtype than the recipe says,
    or where some are missing; reads headers only. teacher: the resolved block with its content as `sha256`."""
    there, where = folder.teacher, str(folder.path)
    differs = _difference(there, teacher)
    if differs is not None:
        now = "which has changed since" if there.get(differs) == teacher.get(differs) else f"this recipe has {teacher.get(differs)!r}"
        raise UserError(f"{key}: {where!r} was drawn with teacher.{differs} {there.get(differs)!r}, {now}")
    if tuple(folder.drawn["shape"]) != tuple(shape):
        raise UserError(f"{key}: {where!r} holds latents {tuple(folder.drawn['shape'])}, this recipe's teacher has {tuple(shape)}")
    if folder.drawn["dtype"] != dtype:
        raise UserError(f"{key}: {where!r} holds samples in {folder.drawn['dtype']}, this recipe has data.dtype {dtype!r}")
    check_whole(folder, key)


def check_whole(folder: PairFolder, key: str = KEY) -> None:
    """UserError, beginning with `key`, where some pairs are missing; reads headers only."""
    if (held := folder.held()) < folder.count:
        raise UserError(f"{key}: {str(folder.path)!r} holds {held} of {folder.count} pairs; finish it with the same `fastgen cache pairs` command")


def weighted_prompts(folder: PairFolder, count: int) -> dict[str, float]:
    """The prompts of the first `count` pairs with their shares, for a run that has no others; reads headers only."""
    return {text: times / count for text, times in Counter(folder.prompts()[:count]).items()}


def content(folder: PairFolder, count: int) -> str:
    """What the first `count` pairs are, wherever they lie; UserError where there are fewer."""
    if folder.count < count:
        raise UserError(f"{KEY}: {str(folder.path)!r} holds {folder.count} pairs, but the run began with {count}")
    return digest(folder.hashes()[:count])


def check_unused(output: Path) -> None:
    """UserError where a folder holds pairs that are not continued."""
    if (output / OLDER_FILE).is_file():
        raise UserError(
            f"--output: {str(output)!r} holds pairs of an older fastgen, in files of another kind: they can be used, but not continued; "
            "choose another folder"
        )


def kept_before(folder: Path) -> int:
    """How many pairs the store in a folder is to hold already."""
    found = open_store(folder, key=KEY)
    return 0 if found is None else len(found)


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key in which two teachers differ. Which one it is counts by content, and by name where one of them has no hash recorded."""
    if then.get("lora") != now.get("lora"):
        return "lora"
    identity = "sha256" if "sha256" in then and "sha256" in now else "pretrained"
    if then.get(identity) != now.get(identity):
        return "pretrained"
    return next((key for key in (*_OF_THE_TEACHER, *_IF_STATED) if then.get(key) != now.get(key)), None)
