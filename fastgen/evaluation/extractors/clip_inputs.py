"""Pictures and prompts as networks that embed both take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor


def pil_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pictures (B, 3, H, W) uint8, as Pillow's RGB."""
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).contiguous().numpy()]


def each_once(prompts: Sequence[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
    """A row of `encode` for each prompt (B, D); equal prompts are encoded once."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    return encode(list(places))[torch.tensor([places[prompt] for prompt in prompts])]


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """(B,) fp64: cosine of each picture's embedding (B, D) and its prompt's."""
    return torch.nn.functional.cosine_similarity(images.double(), texts.double(), dim=1)
