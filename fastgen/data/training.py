"""The tensors a run draws its batches from. Which row a sample gets depends on its random stream alone, so there is no position to save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgen.conditioning import Conditioning
from fastgen.data import weighted
from fastgen.data.encoded import Keeping
from fastgen.data.encoders import of_images, of_prompts
from fastgen.data.images import CaptionedImages
from fastgen.data.latents import LatentImages
from fastgen.data.pairs import Pairs
from fastgen.data.rows import Chosen, Joined, Rows
from fastgen.families.base import Family
from fastgen.progress import Progress
from fastgen.rng import SampleRng


@dataclass(frozen=True)
class PairBatch:
    """Unit noise (B, *shape), the teacher's samples of it x0 (B, *shape), both fp32, and their conditioning (B, ...)."""

    noise: Tensor
    x0: Tensor
    cond: Conditioning


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch, all of one size: conditioning (B, ...) and its prompts, clean latents (B, *shape) where the method asks for
    them, and pairs, as many as samples but with prompts of their own, where it asks for these."""

    size: int
    cond: Conditioning
    latents: Tensor | None = None
    prompts: tuple[str, ...] = ()
    pairs: PairBatch | None = None
    place: int = 0  # of the samples' size among those of the run


@dataclass(frozen=True)
class PairTable:
    """Pairs, and for each the row of its prompt in the conditioning `cond` (P, ...)."""

    pairs: Pairs
    rows: Tensor
    cond: Rows

    def __len__(self) -> int:
        return len(self.pairs)

    def first(self, count: int) -> PairTable:
        """The first `count` pairs."""
        return PairTable(self.pairs.first(count), self.rows[:count], self.cond)

    def draw(self, rng: SampleRng) -> PairBatch:
        """One pair for each of the rng's samples, drawn with replacement."""
        index = _uniform_rows(len(self.pairs), rng.uniform("pair")).cpu()
        noise, x0 = self.pairs.select(index)
        return PairBatch(noise.to(rng.device), x0.to(rng.device), self.cond.select(self.rows[index]))


@dataclass(frozen=True)
class TrainingData:
    """prompts (P,) with their conditioning (P, ...); `latents` (N, *shape) and, per image, its captions' rows in `prompts` with cumulative
    probabilities, where the method trains on images; pairs where it trains on these."""

    prompts: list[str]
    cond: Rows
    cumulative: Tensor
    latents: Rows | None = None
    captions: list[tuple[Tensor, Tensor]] | None = None
    pairs: PairTable | None = None

    @property
    def parts(self) -> tuple[TrainingData, ...]:
        """The data of each size that a run has, here the only one."""
        return (self,)

    @property
    def num_pairs(self) -> int | None:
        """How many pairs there are to draw from; None: it trains on none."""
        return None if self.pairs is None else len(self.pairs)

    def with_first_pairs(self, count: int | None) -> TrainingData:
        """The same data with the first `count` pairs; None: with all."""
        return self if count is None or self.pairs is None else replace(self, pairs=self.pairs.first(count))

    @property
    def read_ahead(self) -> bool:
        """Whether batches take long enough to be drawn before they are needed."""
        pairs = () if self.pairs is None else (self.pairs.cond, self.pairs.pairs.rows)
        tables = (self.cond, self.latents, *pairs)
        return any(rows.read_ahead for rows in tables if rows is not None)

    def draw(self, rng: SampleRng) -> Batch:
        """One sample for each of the rng's, drawn with replacement."""
        pairs = None if self.pairs is None else self.pairs.draw(rng)
        rows, latents = self._rows(rng)
        cond = self.cond.select(rows)
        return Batch(len(rows), cond, latents, tuple(self.prompts[row] for row in rows.tolist()), pairs)

    def _rows(self, rng: SampleRng) -> tuple[Tensor, Tensor | None]:
        """Prompts' rows (B,), with the latents (B, *shape) of images whose captions they are."""
        if self.latents is None or self.captions is None:
            return weighted.rows(self.cumulative, rng.uniform("prompt")), None
        images = _uniform_rows(len(self.latents), rng.uniform("image"))
        uniform = rng.uniform("caption").cpu()
        captions = [self.captions[image] for image in images.tolist()]
        rows = torch.stack([index[weighted.rows(cumulative, uniform[i])] for i, (index, cumulative) in enumerate(captions)])
        return rows, self.latents.select(images)["latents"]

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning (B, ...) of prompts that are among its own."""
        row = {text: i for i, text in enumerate(self.prompts)}
        return self.cond.select(torch.tensor([row[prompt] for prompt in prompts]))


@dataclass(frozen=True)
class SizedData:
    """What a run of several sizes draws from: the data of each, with one table of prompts, and the cumulative probabilities of the sizes. Which
    one an update has is a number that its samples share, so that all of its micro-batches have the same, on any number of processes."""

    parts: tuple[TrainingData, ...]
    cumulative: Tensor

    @property
    def prompts(self) -> list[str]:
        return self.parts[0].prompts

    @property
    def read_ahead(self) -> bool:
        return any(part.read_ahead for part in self.parts)

    def draw(self, rng: SampleRng) -> Batch:
        """One sample for each of the rng's, all of one size, drawn with replacement."""
        place = int(weighted.rows(self.cumulative, rng.shared_uniform("size", 1)).item())
        return replace(self.parts[place].draw(rng), place=place)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning (B, ...) of prompts that are among its own."""
        return self.parts[0].conditioning(prompts)

    @property
    def num_pairs(self) -> int | None:
        """Of its only size; of several, whose pairs are no folder that may grow, None."""
        return self.parts[0].num_pairs if len(self.parts) == 1 else None

    def with_first_pairs(self, count: int | None) -> SizedData:
        """The same data with the first `count` pairs of each size; None: with all."""
        return replace(self, parts=tuple(part.with_first_pairs(count) for part in self.parts))


Data = TrainingData | SizedData


def _uniform_rows(count: int, uniform: Tensor) -> Tensor:
    return (uniform.double() * count).long().clamp(max=count - 1)


def prompt_weights(prompts: Mapping[str, float] | None, images: CaptionedImages | LatentImages | None) -> Mapping[str, float]:
    """The prompts a run draws, with their weights: those of the images' captions where it has images, else those given."""
    table = prompts if images is None else _caption_weights(images)
    assert table, "a run needs prompts or captioned images"
    return table


def prepare(
    family: Family,
    prompts: Mapping[str, float] | None,
    images: CaptionedImages | LatentImages | None,
    keeping: Keeping,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda message: None,
    *,
    batch: int = 64,
) -> TrainingData:
    """Encode every prompt and image once, `batch` at a time, or have them encoded when they are drawn. Images bring their own captions; prompts
    serve methods that train without images. warn: of images that are left out because they cannot be decoded."""
    table, progress = prompt_weights(prompts, images), progress or Progress()
    texts = list(table)
    cond = keeping.rows(of_prompts(family, texts, batch), progress)
    data = TrainingData(texts, cond, weighted.cumulative(table.values()))
    return data if images is None else _with_images(data, family, images, keeping, progress, warn, batch)


def prepare_sizes(
    families: Sequence[Family],
    prompts: Mapping[str, float] | None,
    images: CaptionedImages | LatentImages | None,
    parts: Sequence[CaptionedImages | LatentImages],
    keepings: Sequence[Keeping],
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda message: None,
    *,
    batch: int = 64,
) -> SizedData:
    """`prepare` for several sizes, each with its family. parts: the images of each. keepings: how prompts are kept, then each size's images."""
    progress = progress or Progress()
    without = prepare(families[0], prompt_weights(prompts, images), None, keepings[0], progress, batch=batch)
    if images is None:
        return SizedData((without,) * len(families), weighted.cumulative([1.0] * len(families)))
    each = zip(families, parts, keepings[1:], strict=True)
    made = [_with_images(without, family, own, keeping, progress, warn, batch) for family, own, keeping in each]
    return SizedData(tuple(made), weighted.cumulative([float(len(data.captions or ())) for data in made]))


def _with_images(
    data: TrainingData,
    family: Family,
    images: CaptionedImages | LatentImages,
    keeping: Keeping,
    progress: Progress,
    warn: Callable[[str], None],
    batch: int,
) -> TrainingData:
    if isinstance(images, LatentImages):
        latents = images.latents(keeping, progress)
    else:
        latents = keeping.rows(of_images(family, images, keeping.device, batch), progress)
        kept = [i for i in range(len(images)) if i not in images.undecodable]
        if len(kept) < len(images):
            latents = Chosen(latents, torch.tensor(kept))
        images, warnings = images.decodable()
        for warning in warnings:
            warn(warning)
    row = {text: i for i, text in enumerate(data.prompts)}
    captions = [(torch.tensor([row[text] for text in image]), weighted.cumulative(image.values())) for image in images.captions]
    return replace(data, latents=latents, captions=captions)


def with_pairs(
    data: TrainingData, pairs: Pairs, family: Family, keeping: Keeping, progress: Progress | None = None, *, batch: int = 64
) -> TrainingData:
    """The same data with pairs beside it; their prompts need not be the data's own, and those that are not are encoded as the data's are."""
    row, cond = {text: i for i, text in enumerate(data.prompts)}, data.cond
    if new := [text for text in dict.fromkeys(pairs.prompts) if text not in row]:
        cond = Joined(cond, keeping.beside("of_pairs").rows(of_prompts(family, new, batch), progress or Progress()))
        row |= {text: i for i, text in enumerate(new, len(data.prompts))}
    return replace(data, pairs=PairTable(pairs, torch.tensor([row[prompt] for prompt in pairs.prompts]), cond))


def _caption_weights(images: CaptionedImages | LatentImages) -> dict[str, float]:
    table: dict[str, float] = {}
    for captions in images.captions:
        for text, probability in captions.items():
            table[text] = table.get(text, 0.0) + probability / len(images)
    return table
