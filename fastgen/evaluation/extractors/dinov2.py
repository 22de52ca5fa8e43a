"""DINOv2 (Oquab et al. 2023, arXiv:2304.07193), by transformers from a folder of weights."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from math import isqrt
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate

from fastgen.evaluation.extractors.base import Extractor, Options, Pictures, Resources
from fastgen.evaluation.extractors.clip_inputs import pil_pictures
from fastgen.evaluation.extractors.hub_models import CONFIG, WEIGHTS, load_model
from fastgen.fingerprints import folder_hash, known_hash

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_OFFSET = 0.1


class Dinov2(Extractor):
    """Layer `cls` (1024 of dinov2-large): the class token after the last normalisation, not L2-normalised, which the original network returns."""

    class Config(Options):
        """model: the folder below the weights folder. size: to which pictures are resized, whatever their shape, a multiple of the patch's 14.
        resize: `torch`, in floats with antialiasing and no rounding after, as EDM2 does it, or `pil`, in 8 bits, as dgm-eval does."""

        model: Literal["dinov2-small", "dinov2-base", "dinov2-large", "dinov2-giant"] = "dinov2-large"
        size: Annotated[int, Field(ge=14, le=1036, multiple_of=14)] = 224
        resize: Literal["torch", "pil"] = "torch"

    convention = (
        "bicubic with antialiasing to 224x224, in floats and not rounded after (or as `resize` says); ImageNet mean and std; class token after "
        "the last LayerNorm; position embeddings interpolated as the original code does"
    )

    def __init__(self, config: Any, resources: Resources) -> None:
        super().__init__(config, resources)
        address = f"https://huggingface.co/facebook/{config.model}"
        self._folder = resources.weights.directory(config.model, source=address, files=(CONFIG, WEIGHTS))

    @property
    def hash(self) -> str:
        return folder_hash(self._folder, (CONFIG, WEIGHTS), of=known_hash)

    @torch.no_grad()
    def __call__(self, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
        inputs = normalised(_RESIZE[self.config.resize](pictures.pixels, self.config.size))
        tokens: Tensor = self._module(inputs.to(self.resources.device)).pooler_output.float().cpu()
        return dict.fromkeys(layers, tokens)

    @cached_property
    def _module(self) -> Any:
        from transformers import Dinov2Model

        module = load_model(Dinov2Model, self._folder, self.resources.device)
        embeddings = module.embeddings
        side = self.config.size // module.config.patch_size
        embeddings.position_embeddings = torch.nn.Parameter(interpolated(embeddings.position_embeddings, side), requires_grad=False)
        return module


def interpolated(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + M·M, D) for side · side patches, as the original code interpolates them: bicubic, without antialiasing, by the
    factor (side + 0.1) / M instead of side / M (dinov2/models/vision_transformer.py); transformers goes by the size alone."""
    known = isqrt(positions.shape[1] - 1)
    if known == side:
        return positions
    grid = positions[:, 1:].reshape(1, known, known, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid, scale_factor=(side + _OFFSET) / known, mode="bicubic")
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def normalised(pixels: Tensor) -> Tensor:
    """fp32 of pictures (B, 3, H, W) in [0, 255]."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def _by_torch(pixels: Tensor, size: int) -> Tensor:
    return interpolate(pixels.float(), size=(size, size), mode="bicubic", antialias=True)


def _by_pillow(pixels: Tensor, size: int) -> Tensor:
    resized = [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in pil_pictures(pixels)]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in resized])).permute(0, 3, 1, 2)


_RESIZE = {"torch": _by_torch, "pil": _by_pillow}
