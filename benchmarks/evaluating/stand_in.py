"""Pictures and a network that cost little, so that what is left is what an evaluation itself costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from fastgen.evaluation.subjects import Subject
from fastgen.fingerprints import digest

SIDE = 256


class Synthetic(Subject):
    """Smooth random colours, each picture from its seed alone."""

    name: Literal["student"] = "student"
    steps = 1

    @property
    def record(self) -> dict[str, Any]:
        return {"source": "synthetic", "steps": 1}

    @property
    def content(self) -> str:
        return digest("smooth random colours")

    def draw(self, prompts: list[str], seeds: list[int], ids: Sequence[int]) -> Tensor:
        return torch.stack([smooth(seed) for seed in seeds])


def smooth(seed: int, contrast: float = 1.0) -> Tensor:
    """(3, SIDE, SIDE) uint8."""
    coarse = 0.5 + contrast * (torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) - 0.5)
    return nn.functional.interpolate(255 * coarse, size=(SIDE, SIDE), mode="bilinear")[0].to(torch.uint8)


def write_pictures(folder: Path, count: int) -> Path:
    """A folder of JPEGs as reference: paler than `Synthetic`, of other seeds."""
    folder.mkdir()
    for index in range(count):
        Image.fromarray(smooth(2**40 + index, contrast=0.9).permute(1, 2, 0).numpy()).save(folder / f"{index}.jpg", quality=90)
    return folder


@dataclass(frozen=True)
class Size:
    """width: features of pool3. kernel, stride: of the only convolution of pictures of 299 x 299, from which follows how many `spatial` are."""

    width: int
    kernel: int
    stride: int


AS_INCEPTION = Size(2048, 32, 16)  # 17 x 17 places, as in Inception's Mixed_6d


class _Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch1x1 = nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.branch1x1(x)


class StandIn(nn.Module):
    """In place of the Inception network, with as many features and classes, and of its parts those that the extractor asks for by name."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Sequential(nn.Conv2d(3, 64, size.kernel, size.stride), nn.ReLU())
            self.Mixed_6d = _Mixed()
            self.Mixed_7c = nn.Sequential(nn.Conv2d(64, size.width, 1, stride=2), nn.ReLU())
            self.AvgPool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(size.width, 1008)
        self.eval().requires_grad_(False)
