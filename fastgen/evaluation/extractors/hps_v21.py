"""HPS v2.1, a CLIP trained on human preferences (Wu et al. 2023, arXiv:2306.09341; github.com/tgxs002/HPSv2), by open_clip's ViT-H-14."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fastgen.evaluation.extractors.base import Extractor, Options, Pictures, Resources
from fastgen.evaluation.extractors.clip_inputs import cosines
from fastgen.evaluation.extractors.open_clip_networks import Checkpoint, Network, Precision, open_clip
from fastgen.fingerprints import known_hash

FILE, ADDRESS = "HPS_v2.1_compressed.pt", "https://huggingface.co/xswu/HPSv2"
MODEL = "ViT-H-14"


class HpsV21(Extractor):
    """Layer `score` (1): the cosine of the embeddings of the picture and of its prompt."""

    class Config(Options):
        """antialias: filter while resizing, as torchvision does with tensors from 0.17 on, and did not when the scores were published."""

        antialias: bool = True
        precision: Precision = "fp32"

    convention = (
        "pictures in floats, bicubic to 224 by the longer side, the rest black, OpenAI's mean and std, as hpsv2.score does; prompt cut to 77 "
        "tokens; cosine (the benchmark's tables multiply it by 100)"
    )

    def __init__(self, config: Any, resources: Resources) -> None:
        super().__init__(config, resources)
        open_clip()
        self._path = resources.weights.file(FILE, source=ADDRESS)
        self._network = Network(Checkpoint(MODEL, self._path), config.precision, resources.device)

    @property
    def hash(self) -> str:
        return known_hash(self._path)

    def __call__(self, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
        inputs = padded(pictures.pixels, self._network.image_size, antialias=self.config.antialias)
        scores = cosines(self._network.preprocessed(normalised(inputs)), self._network.texts(pictures.prompts))
        return dict.fromkeys(layers, scores.float()[:, None])


def padded(pixels: Tensor, size: int, *, antialias: bool) -> Tensor:
    """fp32 (B, 3, size, size), about [0, 1], of pictures (B, 3, H, W) uint8: the longer side becomes `size`, the shorter one is centred on black.
    What bicubic filtering overshoots is not clamped."""
    from torchvision.transforms.functional import InterpolationMode, pad, resize

    scaled = pixels.float() / 255
    height, width = (round(side * size / max(pixels.shape[-2:])) for side in pixels.shape[-2:])
    if max(pixels.shape[-2:]) != size:
        scaled = resize(scaled, [height, width], InterpolationMode.BICUBIC, antialias=antialias)
    top, left = (size - height) // 2, (size - width) // 2
    return pad(scaled, [left, top, size - width - left, size - height - top])


def normalised(inputs: Tensor) -> Tensor:
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD  # pyright: ignore[reportMissingImports]

    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (inputs - mean) / std
