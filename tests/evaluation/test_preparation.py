"""Quantisation against its formulas, value by value; cropping and resizing against Pillow and torchvision directly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from fastgen.evaluation.preparation import prepared, quantised
from fastgen.evaluation.protocol import PrepareBlock

FILTERS = {"lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4}  # Pillow's own numbers


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_edm_rounds_to_the_nearest_level_as_its_formula_does() -> None:
    y = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantised(y, "edm"), ((y * 2 - 1) * 127.5 + 128).clamp(0, 255).to(torch.uint8))
    exact = np.floor(y.double().numpy() * 255 + 0.5).clip(0, 255)
    clear = np.abs(y.double().numpy() * 255 % 1 - 0.5) > 1e-3  # elsewhere fp32 may fall on either side
    assert clear.mean() > 0.99 and np.array_equal(quantised(y, "edm").numpy()[clear], exact[clear])


def test_truncation_drops_the_fraction() -> None:
    y = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantised(y, "truncate"), (y * 255).byte())  # torchmetrics' `normalize=True`
    edm, cut = quantised(y, "edm").int(), quantised(y, "truncate").int()
    assert set((edm - cut).unique().tolist()) == {0, 1} and 0.49 < float((edm - cut).double().mean()) < 0.51


@pytest.mark.parametrize("rule", ["edm", "truncate"])
def test_pictures_of_8_bits_stay_what_they_are(rule: str) -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(quantised(levels.float() / 255, rule), levels)


@pytest.mark.parametrize("rule", ["edm", "truncate"])
def test_what_is_slightly_outside_is_clipped_and_what_is_far_outside_refused(rule: str) -> None:
    y = torch.tensor([-9e-4, 0.0, 1.0, 1 + 9e-4]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert quantised(y, rule)[0, 0].flatten().tolist() == [0, 0, 255, 255]
    with pytest.raises(ValueError, match=r"^images must be in \[0, 1\], got values from -1 to 1$"):
        quantised(torch.stack([torch.full((3, 2, 2), -1.0), torch.ones(3, 2, 2)]), rule)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^generated images contain NaN or infinity$"):
            quantised(torch.full((1, 3, 2, 2), bad), rule)


def test_any_float_type_and_any_number_of_pictures_is_quantised() -> None:
    y = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(quantised(y, "edm"), quantised(y.float(), "edm"))
    assert quantised(y[:0], "edm").shape == (0, 3, 5, 7)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("height", "width"), [(31, 20), (20, 31), (24, 24), (9, 40)])
def test_a_crop_and_a_resize_are_pillows(name: str, height: int, width: int) -> None:
    pictures = noise(3, 3, height, width)
    ready = prepared(pictures, PrepareBlock(crop="centre", resize=16, filter=name))  # type: ignore[arg-type]
    side = min(height, width)
    for picture, one in zip(pictures, ready, strict=True):
        image = Image.fromarray(functional.center_crop(picture, [side, side]).permute(1, 2, 0).numpy())
        expected = np.asarray(image.resize((16, 16), FILTERS[name]))  # type: ignore[arg-type]
        assert np.array_equal(one.permute(1, 2, 0).numpy(), expected)


def test_a_resize_without_a_crop_changes_the_aspect_as_pillow_does() -> None:
    (picture,) = noise(1, 3, 12, 30)
    (one,) = prepared(picture[None], PrepareBlock(resize=8, filter="bicubic"))
    expected = np.asarray(Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(one.permute(1, 2, 0).numpy(), expected)


def test_nothing_is_done_where_nothing_is_asked() -> None:
    pictures = noise(2, 3, 12, 30)
    assert torch.equal(prepared(pictures, PrepareBlock()), pictures)
    assert torch.equal(prepared(pictures, PrepareBlock(crop="centre")), pictures[..., 9:21])
    assert torch.equal(prepared(pictures[..., :12], PrepareBlock(resize=12)), pictures[..., :12])


def test_each_picture_is_prepared_by_itself() -> None:
    pictures, how = noise(5, 3, 33, 47), PrepareBlock(crop="centre", resize=16)
    assert torch.equal(prepared(pictures, how), torch.cat([prepared(picture[None], how) for picture in pictures]))
