"""The pictures themselves, made small: what is compared where the same noise should give the same picture."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fastgen.evaluation.extractors.base import Extractor, Options, Pictures
from fastgen.evaluation.preparation import resized
from fastgen.fingerprints import digest


class Thumbnails(Extractor):
    """Layer `rgb` (3, h, w) uint8: a picture whose longer side has `size` pixels, or as it is where that is smaller. Layer `size` (2): height and
    width before."""

    class Config(Options):
        size: Annotated[int, Field(ge=1, le=4096)] = 64

    convention = "8-bit pictures reduced by Pillow's BOX filter, the mean over the area of each pixel, to a longer side of `size`"

    @property
    def hash(self) -> str:
        return digest("thumbnails")

    def __call__(self, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
        height, width = pictures.pixels.shape[-2:]
        found = {"size": torch.tensor([[height, width]], dtype=torch.float32).expand(len(pictures.pixels), 2).contiguous()}
        if "rgb" in layers:
            found["rgb"] = self._reduced(pictures.pixels, height, width)
        return {layer: found[layer] for layer in layers}

    def _reduced(self, pixels: Tensor, height: int, width: int) -> Tensor:
        scale = self.config.size / max(height, width)
        return pixels if scale >= 1 else resized(pixels, max(1, round(height * scale)), max(1, round(width * scale)), "box")
