"""From floats to the 8-bit pictures that extractors see: how values are rounded, and how pictures are cropped and resized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from fastgen.evaluation.protocol import PrepareBlock

_SLACK = 1e-3  # by which floats may leave [0, 1], as those of a codec do that was not clamped
_RULES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "edm": lambda y: (y * 2 - 1) * 127.5 + 128,  # on [-1, 1], in the order in which EDM computes it
    "truncate": lambda y: y * 255,
}
_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}


def quantised(images: Tensor, rule: str) -> Tensor:
    """8-bit pictures of floats (N, 3, H, W) in [0, 1]: uint8 by `edm`, floor(255 y + 0.5) as a saved PNG holds it, or `truncate`, floor(255 y).

    Raises ValueError for NaN or infinity and for values outside [0, 1] by more than 1e-3 (images in [-1, 1], most likely).
    """
    wide = images.detach().cpu().float()
    if not bool(wide.isfinite().all()):
        raise ValueError("generated images contain NaN or infinity")
    low, high = (float(wide.min()), float(wide.max())) if wide.numel() else (0.0, 0.0)
    if low < -_SLACK or high > 1 + _SLACK:
        raise ValueError(f"images must be in [0, 1], got values from {low:.4g} to {high:.4g}")
    return _RULES[rule](wide).clamp(0, 255).to(torch.uint8)


def prepared(pixels: Tensor, how: PrepareBlock) -> Tensor:
    """Pictures (N, 3, H, W) uint8 as a protocol has them: the largest centre square (an odd margin as torchvision's `center_crop` has it),
    then resized by Pillow, which filters with antialiasing and rounds to 8 bits."""
    if how.crop == "centre":
        pixels = _centre_square(pixels)
    if how.resize is None or tuple(pixels.shape[-2:]) == (how.resize, how.resize):
        return pixels
    return resized(pixels, how.resize, how.resize, how.filter)


def resized(pixels: Tensor, height: int, width: int, filter: str) -> Tensor:
    """Pictures (N, 3, H, W) uint8 resized by Pillow, whatever their shape: one of its filters, with antialiasing, rounded to 8 bits."""
    small = torch.empty(len(pixels), 3, height, width, dtype=torch.uint8)
    for index, picture in enumerate(pixels.permute(0, 2, 3, 1).contiguous().numpy()):
        image = Image.fromarray(picture).resize((width, height), _FILTERS[filter])
        small[index] = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    return small


def _centre_square(pixels: Tensor) -> Tensor:
    height, width = pixels.shape[-2:]
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    return pixels[..., top : top + side, left : left + side]
