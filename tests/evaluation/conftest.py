"""A classifier for protocol digits that needs no training: random projections as features, least squares on one-hot labels as logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastgen.data import digits
from fastgen.evaluation.protocols import Digits


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


@pytest.fixture(scope="session")
def classifier() -> LinearClassifier:
    return LinearClassifier()


@pytest.fixture(scope="session")
def protocol(classifier: LinearClassifier) -> Digits:
    return Digits(classifier)


@pytest.fixture(scope="session")
def real() -> Tensor:
    """All real images, (1797, 3, 8, 8) in [0, 1]."""
    return (digits.load_images()[0] + 1) / 2
