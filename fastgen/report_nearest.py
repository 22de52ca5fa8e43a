"""Whether a student draws its training pictures again: the nearest of them to each of a run's samples, beside how near they are to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastgen.errors import UserError
from fastgen.pages import image_uri
from fastgen.pictures import cells, png

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from fastgen.data.images import CaptionedImages

SAMPLES = 16
MOST = 2000  # training pictures that are looked at
YARDSTICK = 500  # of them those whose own nearest neighbours are looked for
SIDE = 32  # pixels on the longer side of what is compared
_SHOWN = 128  # and of training pictures on the page


class Pair(NamedTuple):
    """A sample and the training picture nearest to it, as PNGs. distance: root mean square of pixel differences, 0 to 1. close: it is smaller than
    95 % of the training pictures' distances to their own nearest neighbours."""

    sample: str
    nearest: str
    distance: float
    close: bool


@dataclass(frozen=True)
class Nearest:
    """Pairs in the order of the samples. own: median and 5th percentile of the distances of `YARDSTICK` training pictures to the nearest other one,
    which is what new pictures of the same kind would have. looked_at: of how many training pictures in all."""

    pairs: list[Pair]
    median: float
    own: tuple[float, float]
    looked_at: int
    total: int


def nearest_training(data: Mapping[str, Any], samples: Path | None) -> Nearest | str:
    """For the pictures in the student's row of a grid of samples; or, in one sentence, why not. data: of the run's recipe.

    Training pictures are cut to the samples' aspect and both reduced to SIDE pixels with antialiasing, as they are for training; of more than MOST
    those at even distances are looked at, so what takes longest is decoding MOST files.
    """
    if not data.get("images"):
        return "The run trained without pictures (it has no data.images), so there are none to have learnt by heart."
    drawn = _drawn(samples)
    if not drawn:
        return "The samples are no grid that says where its pictures are, so nothing can be compared."
    try:
        images = _images(data)
        if images is None:
            return "The run trained on latents that had been made before, whose pictures are not here, so nothing was compared."
        chosen, pixels = _pixels(images, *_compared(drawn[0]))
    except UserError:
        return "The training pictures cannot be read any more where this page was written, so nothing was compared."
    if len(pixels) < 2:
        return "Fewer than two training pictures could be read, so nothing was compared."
    return _found(drawn, images, chosen, pixels)


def _found(drawn: list[Image.Image], images: CaptionedImages, chosen: list[int], pixels: Tensor) -> Nearest:
    import torch

    rows = pixels.flatten(1)
    ours = torch.stack([_reduced(image, *pixels.shape[2:]) for image in drawn]).flatten(1)
    scale = rows.shape[1] ** 0.5
    distances, places = (torch.cdist(ours, rows) / scale).min(1)
    some = torch.linspace(0, len(rows) - 1, min(YARDSTICK, len(rows))).round().long()
    among = torch.cdist(rows[some], rows) / scale
    among[torch.arange(len(some)), some] = torch.inf
    own = among.min(1).values
    median, low = float(own.median()), float(own.quantile(0.05))
    pairs = [
        Pair(image_uri(png(image)), _shown(images, chosen[place], image), distance, distance < low)
        for image, place, distance in zip(drawn, places.tolist(), distances.tolist(), strict=True)
    ]
    return Nearest(pairs, float(distances.median()), (median, low), len(rows), len(images))


def _drawn(samples: Path | None) -> list[Image.Image]:
    """At even distances, so that each prompt has its share."""
    from PIL import Image, UnidentifiedImageError

    if samples is None:
        return []
    try:
        with Image.open(samples) as grid:
            rows = {label: images for label, images in cells(grid).items() if label.startswith("student")}
    except (UnidentifiedImageError, OSError):
        return []
    images = next(iter(rows.values()), [])
    count = min(SAMPLES, len(images))
    return [images[i * len(images) // count].convert("RGB") for i in range(count)]


def _images(data: Mapping[str, Any]) -> CaptionedImages | None:
    """None where a recipe names latents."""
    from fastgen.config import DataBlock, validate
    from fastgen.data.images import CaptionedImages, images_of

    found = images_of(validate(DataBlock, dict(data), "data"))
    if not isinstance(found, CaptionedImages):
        return None
    return replace(found, skip_broken=True, undecodable={})


def _compared(image: Image.Image, longest: int = SIDE) -> tuple[int, int]:
    """Height and width of what stands for pictures of this size."""
    factor = min(1.0, longest / max(image.size))
    return max(1, round(image.height * factor)), max(1, round(image.width * factor))


def _pixels(images: CaptionedImages, height: int, width: int) -> tuple[list[int], Tensor]:
    """Which training pictures were decoded, and their pixels (N, 3, height, width) in [0, 1]."""
    import torch

    count = min(MOST, len(images))
    indices = [i * len(images) // count for i in range(count)]
    some = _subset(images, indices)
    parts = list(some.batches(height, width))
    kept = [index for place, index in enumerate(indices) if place not in some.undecodable]
    return kept, torch.cat(parts) / 2 + 0.5 if parts else torch.empty(0, 3, height, width)


def _subset(images: CaptionedImages, indices: list[int]) -> CaptionedImages:
    return replace(images, captions=[images.captions[i] for i in indices], sources=[images.sources[i] for i in indices], undecodable={})


def _reduced(image: Image.Image, height: int, width: int) -> Tensor:
    """(3, height, width) in [0, 1]."""
    import numpy as np
    import torch
    from torchvision.transforms.v2 import functional

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return (functional.resize(pixels, [height, width], antialias=True) / 255).clamp(0, 1)


def _shown(images: CaptionedImages, index: int, beside: Image.Image) -> str:
    from torchvision.transforms.v2.functional import to_pil_image

    (pixels,) = next(_subset(images, [index]).batches(*_compared(beside, _SHOWN)))
    return image_uri(png(to_pil_image(((pixels / 2 + 0.5) * 255 + 0.5).clamp(0, 255).byte())))
