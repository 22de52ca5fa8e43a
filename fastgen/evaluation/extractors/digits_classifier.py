"""The bundled digit classifier, whose features stand in for Inception's on the bundled digits."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastgen.evaluation.extractors.base import Extractor, Pictures, weights_hash


class DigitsClassifier(Extractor):
    """Layers: `features` (64) before the last layer, `logits` (10), `pixels` (64), the grey values in [-1, 1]. fp32."""

    convention = "pictures as fp32 in [-1, 1]; no resizing; features of the bundled classifier's last hidden layer (64)"

    @property
    def hash(self) -> str:
        """SHA-256 over the classifier's parameter names, shapes and fp32 bytes."""
        return weights_hash(self._classifier)

    @torch.no_grad()
    def __call__(self, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
        signed = pictures.pixels.float() / 127.5 - 1
        made = {
            "features": lambda: self._classifier.features(signed),
            "logits": lambda: self._classifier(signed),
            "pixels": lambda: signed.mean(1).flatten(1),
        }
        return {layer: made[layer]() for layer in layers}

    @cached_property
    def _classifier(self) -> Any:
        from fastgen.assets import classifier

        return classifier.load_classifier()
