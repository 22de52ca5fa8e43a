"""CLIP embeddings of pictures and prompts by open_clip (Ilharco et al. 2021), any of its models that has CLIP's own tokenizer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from fastgen.evaluation.extractors.base import Extractor, Options, Pictures, Resources
from fastgen.evaluation.extractors.open_clip_networks import Network, Precision, find_checkpoint
from fastgen.evaluation.preparation import prepared
from fastgen.evaluation.protocol import PrepareBlock
from fastgen.fingerprints import known_hash


class OpenClip(Extractor):
    """Layers: `image` (D), the picture's embedding, and `text` (D), that of the picture's prompt after `prefix`; fp32, of unit length."""

    class Config(Options):
        """model, pretrained: open_clip's names (`pretrained` may also be a file below the weights folder). prefix: put before each prompt. square:
        instead of the protocol's `prepare`, the largest centre square of pictures as drawn, resized to so many pixels by Pillow's LANCZOS."""

        model: str
        pretrained: str
        prefix: str = ""
        precision: Precision = "fp32"
        square: Annotated[int, Field(ge=1, le=4096)] | None = None

    convention = (
        "open_clip's own inference transform of 8-bit pictures (Pillow's bicubic to the network's size by the shorter side, centre crop, the "
        "weights' mean and std, unless they ask for another); prefix + prompt cut to 77 tokens, the last of them the end; L2-normalised"
    )

    def __init__(self, config: Any, resources: Resources) -> None:
        super().__init__(config, resources)
        self._checkpoint = find_checkpoint(resources.weights, config.model, config.pretrained)
        self._network = Network(self._checkpoint, config.precision, resources.device)

    @property
    def hash(self) -> str:
        """SHA-256 of the weights' file."""
        return known_hash(self._checkpoint.path)

    def __call__(self, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
        made = {
            "image": lambda: self._network.images(self._pixels(pictures)),
            "text": lambda: self._network.texts([self.config.prefix + prompt for prompt in pictures.prompts]),
        }
        return {layer: made[layer]() for layer in layers}

    def _pixels(self, pictures: Pictures) -> Tensor:
        if self.config.square is None:
            return pictures.pixels
        raw, how = pictures.pixels if pictures.raw is None else pictures.raw, PrepareBlock(crop="centre", resize=self.config.square)
        return torch.cat([prepared(each[None], how) for each in raw])
