"""CLIP embeddings of pictures and prompts by open_clip (Ilharco et al. 2021), any of its models that has CLIP's own tokenizer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from fastgen.evaluation.extractors.base import Extractor, Options, Pictures, Resources
from fastgen.evaluation.extractors.open_clip_networks import Network, Precision, find_checkpoint
from fastgen.fingerprints import known_hash


class OpenClip(Extractor):
    """Layers: `image` (D), the picture's embedding, and `text` (D), that of the picture's prompt after `prefix`; fp32, of unit length."""

    class Config(Options):
        """model, pretrained: open_clip's names (`pretrained` may also be a file below the weights folder). prefix: put before each prompt."""

        model: str
        pretrained: str
        prefix: str = ""
        precision: Precision = "fp32"

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
            "image": lambda: self._network.images(pictures.pixels),
            "text": lambda: self._network.texts([self.config.prefix + prompt for prompt in pictures.prompts]),
        }
        return {layer: made[layer]() for layer in layers}
