"""The tensors a run draws its batches from. Which row a sample gets depends on its random stream alone, so there is no position to save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen import conditioning
from fastgen.conditioning import Conditioning
from fastgen.data.images import CaptionedImages
from fastgen.families.base import Family
from fastgen.rng import SampleRng


def _cumulative(weights: Sequence[float]) -> Tensor:
    total = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    return total / total[-1]


def _draw(cumulative: Tensor, uniform: Tensor) -> Tensor:
    return torch.searchsorted(cumulative, uniform.double().cpu(), right=True).clamp(max=len(cumulative) - 1)


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch: conditioning (B, ...) and its prompts, and clean latents (B, *shape) where the method asks for them."""

    size: int
    cond: Conditioning
    latents: Tensor | None = None
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingData:
    """prompts (P,) with their conditioning (P, ...) on the device; latents (N, *shape) and, per image, its captions' rows in
    `prompts` with cumulative probabilities, where the method trains on images."""

    prompts: list[str]
    cond: Conditioning
    cumulative: Tensor
    latents: Tensor | None = None
    captions: list[tuple[Tensor, Tensor]] | None = None

    def draw(self, rng: SampleRng) -> Batch:
        """One sample for each of the rng's, drawn with replacement."""
        if self.latents is None or self.captions is None:
            return self._batch(_draw(self.cumulative, rng.uniform("prompt")))
        images = (rng.uniform("image").double() * len(self.latents)).long().clamp(max=len(self.latents) - 1)
        uniform = rng.uniform("caption").cpu()
        captions = [self.captions[image] for image in images.tolist()]
        rows = torch.stack([index[_draw(cumulative, uniform[i])] for i, (index, cumulative) in enumerate(captions)])
        return self._batch(rows, self.latents[images.to(self.latents.device)])

    def _batch(self, rows: Tensor, latents: Tensor | None = None) -> Batch:
        return Batch(len(rows), conditioning.select(self.cond, rows), latents, tuple(self.prompts[row] for row in rows.tolist()))


def prepare(
    family: Family,
    prompts: Mapping[str, float] | None,
    images: CaptionedImages | None,
    device: torch.device,
    progress: Callable[[str], None] = lambda message: None,
) -> TrainingData:
    """Encode every prompt and image once. Images bring their own captions; prompts serve methods that train without images."""
    table = prompts if images is None else _caption_weights(images)
    assert table, "a run needs prompts or captioned images"
    texts = list(table)
    progress(f"encoding {len(texts)} prompts")
    cond = conditioning.to(family.encode_prompts(texts), device)
    cumulative = _cumulative(list(table.values()))
    if images is None:
        return TrainingData(texts, cond, cumulative)
    progress(f"encoding {len(images)} images")
    resolution = family.latent.size[-1] * family.pixels_per_latent
    latents = torch.cat([family.encode_latents(batch.to(device)) for batch in images.batches(resolution)]).to(device)
    row = {text: i for i, text in enumerate(texts)}
    captions = [(torch.tensor([row[text] for text in image]), _cumulative(list(image.values()))) for image in images.captions]
    return TrainingData(texts, cond, cumulative, latents, captions)


def _caption_weights(images: CaptionedImages) -> dict[str, float]:
    table: dict[str, float] = {}
    for captions in images.captions:
        for text, probability in captions.items():
            table[text] = table.get(text, 0.0) + probability / len(images)
    return table
