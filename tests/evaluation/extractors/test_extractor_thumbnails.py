"""Pictures made small: means over areas, in 8 bits."""

from __future__ import annotations

import pytest
import torch

from fastgen.evaluation.extractors.base import Pictures, Resources
from fastgen.evaluation.extractors.thumbnails import Thumbnails


def thumbnails(pixels: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    return Thumbnails(Thumbnails.Config(size=size), Resources())(Pictures(pixels, ("",) * len(pixels)), ["rgb", "size"])


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("factor", [2, 5])
def test_a_pixel_is_the_mean_of_its_area(factor: int) -> None:
    pixels = noise(2, 3, 8 * factor, 12 * factor)
    found = thumbnails(pixels, 12)
    areas = pixels.double().unflatten(3, (12, factor)).unflatten(2, (8, factor)).mean((3, 5))
    assert found["rgb"].dtype == torch.uint8 and found["rgb"].shape == (2, 3, 8, 12)
    assert (found["rgb"].double() - areas).abs().max() <= 1  # Pillow rounds after each direction
    assert torch.equal(found["size"], torch.tensor([[8.0 * factor, 12.0 * factor]]).expand(2, 2))


@pytest.mark.parametrize(("shape", "size", "small"), [((100, 30), 64, (64, 19)), ((1, 200), 10, (1, 10)), ((33, 65), 64, (32, 64))])
def test_the_shape_is_kept_by_the_longer_side(shape: tuple[int, int], size: int, small: tuple[int, int]) -> None:
    assert thumbnails(noise(1, 3, *shape), size)["rgb"].shape == (1, 3, *small)


def test_what_is_small_already_stays_as_it_is() -> None:
    pixels = noise(2, 3, 8, 8)
    assert torch.equal(thumbnails(pixels, 64)["rgb"], pixels)
    assert torch.equal(thumbnails(pixels, 8)["rgb"], pixels)
