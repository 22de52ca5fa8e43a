"""LPIPS between the pictures of one prompt (Zhang et al. 2018, arXiv:1801.03924), by the authors' package and torchvision's backbone."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.evaluation.extractors.base import Extractor, Options, Pictures, Resources
from fastgen.evaluation.preparation import resized
from fastgen.evaluation.weights import Unavailable
from fastgen.fingerprints import digest, known_hash
from fastgen.perceptual import SMALLEST, backbone_url, large_enough, network_from, pairwise


class Lpips(Extractor):
    """Layer `pairs` (per_prompt): a picture's distance to each picture of its prompt, 0 to itself."""

    class Config(Options):
        """net: the backbone, `alex` (the authors' choice for measuring) or `vgg`. size: to which pictures are resized by Pillow's LANCZOS,
        whatever their shape; None: their own, but at least 64. range: of the values that the network is fed, `signed` [-1, 1], for which it was
        made, or `unit` [0, 1]. DMD2's diversity score is that of `size: 512, range: unit`; its public code does not say the backbone."""

        net: Literal["alex", "vgg"] = "alex"
        size: Annotated[int, Field(ge=SMALLEST, le=4096)] | None = None
        range: Literal["signed", "unit"] = "signed"

    convention = (
        "LPIPS 0.1 of 8-bit pictures, resized by Pillow's LANCZOS where `size` says so, bilinearly up to 64 pixels where they are smaller; TF32 off"
    )

    def __init__(self, config: Any, resources: Resources) -> None:
        super().__init__(config, resources)
        if importlib.util.find_spec("lpips") is None:
            raise Unavailable("needs the package lpips: pip install lpips")
        url = backbone_url(config.net)
        name = url.rpartition("/")[2]
        sha256 = Path(name).stem.rpartition("-")[2]
        self._backbone = resources.weights.file(name, source=url, sha256=sha256)

    @property
    def hash(self) -> str:
        return digest([known_hash(self._backbone), known_hash(self._heads)])

    @torch.no_grad()
    def __call__(self, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
        size = pictures.per_prompt
        if size == 1:  # no pairs, nothing to compute
            return dict.fromkeys(layers, torch.zeros(len(pictures.pixels), 1))
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            groups = [pairwise(self._network, self._inputs(group)) for group in pictures.pixels.split(size)]
        return dict.fromkeys(layers, torch.cat(groups).float())

    def _inputs(self, pixels: Tensor) -> Tensor:
        if self.config.size is not None:
            pixels = resized(pixels, self.config.size, self.config.size, "lanczos")
        unit = large_enough(pixels.to(self.resources.device).float() / 255)
        return 2 * unit - 1 if self.config.range == "signed" else unit

    @property
    def _heads(self) -> Path:
        """The linear weights that the package brings."""
        found = importlib.util.find_spec("lpips")
        assert found and found.origin
        return Path(found.origin).parent / "weights" / "v0.1" / f"{self.config.net}.pth"

    @cached_property
    def _network(self) -> Any:
        return network_from(self.config.net, self._backbone).to(self.resources.device)
