"""The bundled classifier of scenes, whose features stand in for Inception's on the bundled scenes."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastgen.data import scenes
from fastgen.evaluation.extractors.base import Extractor, Pictures, weights_hash


class ScenesClassifier(Extractor):
    """Layers: `features` (128) before the last layer, `shown` (4), the most likely digit of each colour or 10 for none, and `moments` (12), mass of
    each colour and its sums of mass times row and column. fp32."""

    convention = "pictures as fp32 in [-1, 1]; no resizing; features of the bundled classifier's last hidden layer (128); centres of pure colour"

    @property
    def hash(self) -> str:
        """SHA-256 over the classifier's parameter names, shapes and fp32 bytes."""
        return weights_hash(self._classifier)

    @torch.no_grad()
    def __call__(self, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
        unit = pictures.pixels.float() / 255
        made = {
            "features": lambda: self._classifier.features(unit * 2 - 1),
            "shown": lambda: self._classifier(unit * 2 - 1).argmax(2).float(),
            "moments": lambda: scenes.moments(unit).flatten(1),
        }
        return {layer: made[layer]() for layer in layers}

    @cached_property
    def _classifier(self) -> Any:
        from fastgen.assets import classifier

        return classifier.load_scene_classifier()
