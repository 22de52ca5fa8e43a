"""A classifier for protocol digits that needs no training: random projections as features, least squares on one-hot labels as logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgen.data import digits


class LinearClassifier(nn.Module):
    """features: 64 fixed random projections of the grey pixels, rectified; logits: the least-squares fit of the one-hot labels."""

    def __init__(self) -> None:
        super().__init__()
        images, labels = digits.load_images()
        generator = torch.Generator().manual_seed(0)
        self.projection = nn.Buffer(torch.randn(64, 64, generator=generator) / 8)
        features = self.features(images)
        design = torch.cat([features, torch.ones(len(features), 1)], 1).double()
        self.head = nn.Buffer(torch.linalg.lstsq(design, torch.eye(10).double()[labels], driver="gelsd").solution.float())

    def features(self, images: Tensor) -> Tensor:
        return (images.mean(1).flatten(1) @ self.projection).relu()

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images) @ self.head[:-1] + self.head[-1]
