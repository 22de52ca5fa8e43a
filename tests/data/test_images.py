"""Captioned images: crop, resize and range by value on PNGs with known pixels; captions with their probabilities; clear mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgen.config import DataBlock
from fastgen.data import digits
from fastgen.data.images import CaptionedImages, images_of, load_images
from fastgen.errors import UserError


def noise_png(path: Path, width: int, height: int, seed: int = 0, mode: str = "RGB") -> np.ndarray:
    """A PNG of uniform noise: its RGB pixels (H, W, 3) uint8."""
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)
    assert image.mode == mode
    path.parent.mkdir(exist_ok=True, parents=True)
    image.save(path)
    return np.asarray(image.convert("RGB"))


def imagefolder(folder: Path, *rows: Any) -> str:
    (folder / "metadata.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(folder)


def only(images: CaptionedImages, resolution: int) -> Tensor:
    (batch,) = images.batches(resolution, resolution)
    return batch


def in_range(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) as fp32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("width", "height", "columns", "rows"),
    [
        (10, 6, slice(2, 8), slice(0, 6)),
        (6, 10, slice(0, 6), slice(2, 8)),
        (6, 6, slice(0, 6), slice(0, 6)),
        (12, 6, slice(3, 9), slice(0, 6)),
    ],
)
def test_the_largest_centre_square_at_its_own_size_is_exact(tmp_path: Path, width: int, height: int, columns: slice, rows: slice) -> None:
    pixels = noise_png(tmp_path / "a.png", width, height)
    batch = only(load_images(imagefolder(tmp_path, {"file_name": "a.png", "text": "noise"})), 6)
    assert batch.dtype == torch.float32
    torch.testing.assert_close(batch, in_range(pixels[rows, columns])[None], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("width", "height", "size", "columns", "rows"),
    [
        (13, 6, (6, 9), slice(2, 11), slice(0, 6)),
        (12, 10, (4, 6), slice(0, 12), slice(1, 9)),
        (6, 13, (9, 6), slice(0, 6), slice(2, 11)),
        (8, 8, (2, 8), slice(0, 8), slice(3, 5)),
    ],
)
def test_the_largest_centre_crop_has_the_asked_aspect(
    tmp_path: Path, width: int, height: int, size: tuple[int, int], columns: slice, rows: slice
) -> None:
    pixels = noise_png(tmp_path / "a.png", width, height)
    (batch,) = load_images(imagefolder(tmp_path, {"file_name": "a.png", "text": "noise"})).batches(*size)
    crop = Image.fromarray(pixels[rows, columns]).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    assert batch.shape == (1, 3, *size)
    assert (batch - in_range(np.asarray(crop))[None]).abs().max() <= 1.01 / 127.5


def test_an_odd_margin_crops_within_half_a_pixel_of_the_centre(tmp_path: Path) -> None:
    pixels = noise_png(tmp_path / "a.png", 9, 6)
    picture = only(load_images(imagefolder(tmp_path, {"file_name": "a.png", "text": "noise"})), 6)[0]
    assert any((picture - in_range(pixels[:, start : start + 6])).abs().max() < 1e-6 for start in (1, 2))


def test_random_crops_are_parts_all_over_and_the_same_whatever_the_batches(tmp_path: Path) -> None:
    names = [f"{i:03d}.png" for i in range(120)]
    pixels = noise_png(tmp_path / names[0], 12, 6)
    for name in names[1:]:
        (tmp_path / name).write_bytes((tmp_path / names[0]).read_bytes())
    folder = imagefolder(tmp_path, *({"file_name": name, "text": "noise"} for name in names))
    one, other = (torch.cat(list(load_images(folder, crop="random").batches(6, 6, size))) for size in (7, 120))
    assert torch.equal(one, other)
    columns = [in_range(pixels[:, start : start + 6]) for start in range(7)]
    found = [[bool((picture - column).abs().max() < 1e-6) for column in columns].index(True) for picture in one]
    assert set(found) == set(range(7))


@pytest.mark.parametrize(("side", "resolution"), [(24, 8), (20, 8), (8, 12)])
def test_resizing_is_antialiased_and_agrees_with_pillow(tmp_path: Path, side: int, resolution: int) -> None:
    pixels = noise_png(tmp_path / "a.png", side + 6, side)
    picture = only(load_images(imagefolder(tmp_path, {"file_name": "a.png", "text": "noise"})), resolution)[0]
    square = Image.fromarray(pixels[:, 3 : 3 + side])
    expected = np.asarray(square.resize((resolution, resolution), Image.Resampling.BILINEAR))
    assert (picture - in_range(expected)).abs().max() <= 1.01 / 127.5
    if side > resolution:  # noise is averaged, not picked
        assert picture.std() < 0.7 * in_range(pixels).std()


def test_range_and_colours_of_flat_images(tmp_path: Path) -> None:
    colours = {"black.png": (0, 0, 0), "white.png": (255, 255, 255), "red.png": (255, 0, 51)}
    for name, colour in colours.items():
        Image.new("RGB", (7, 5), colour).save(tmp_path / name)
    batch = only(load_images(imagefolder(tmp_path, *({"file_name": name, "text": name} for name in colours))), 4)
    expected = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0], [1.0, -1.0, -0.6]])
    torch.testing.assert_close(batch, expected[:, :, None, None].expand(3, 3, 4, 4), rtol=0, atol=1e-6)


def test_grey_becomes_rgb(tmp_path: Path) -> None:
    pixels = noise_png(tmp_path / "a.png", 6, 6, mode="L")
    batch = only(load_images(imagefolder(tmp_path, {"file_name": "a.png", "text": "noise"})), 6)
    torch.testing.assert_close(batch, in_range(pixels)[None], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("background", "shown"), [(None, (1, 1, 1)), ("black", (-1, -1, -1)), ("#f00", (1, -1, -1)), ("rgb(0, 51, 102)", (-1, -0.6, -0.2))]
)
def test_clear_pixels_show_the_background_and_hide_their_colour(tmp_path: Path, background: str | None, shown: tuple[float, ...]) -> None:
    """Also beside opaque ones, when the picture is reduced: no part of it is the hidden green."""
    image = Image.new("RGBA", (4, 4), (0, 255, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.save(tmp_path / "a.png")
    folder = imagefolder(tmp_path, {"file_name": "a.png", "text": "noise"})
    images = load_images(folder) if background is None else load_images(folder, background)
    ground, red = torch.tensor(shown, dtype=torch.float32), torch.tensor([1.0, -1, -1])
    torch.testing.assert_close(only(images, 4)[0, :, 2, 2], ground)
    torch.testing.assert_close(only(images, 4)[0, :, 0, 0], red)
    weights = torch.outer(torch.tensor([3.0, 3, 1, 0]) / 7, torch.tensor([3.0, 3, 1, 0]) / 7)  # of a triangle two pixels wide
    torch.testing.assert_close(only(images, 2)[0, :, 0, 0], weights[0, 0] * red + (1 - weights[0, 0]) * ground)


def test_grey_of_16_bits_keeps_its_levels(tmp_path: Path) -> None:
    Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)).save(tmp_path / "a.png")
    batch = only(load_images(imagefolder(tmp_path, {"file_name": "a.png", "text": "ramp"})), 16)
    torch.testing.assert_close(batch, in_range(np.arange(256).reshape(16, 16, 1).repeat(3, 2))[None])


def test_a_photo_stored_sideways_is_turned_upright(tmp_path: Path) -> None:
    pixels = noise_png(tmp_path / "a.png", 8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    batch = only(load_images(imagefolder(tmp_path, {"file_name": "a.png", "text": "noise"})), 8)
    torch.testing.assert_close(batch[0], in_range(np.ascontiguousarray(np.rot90(pixels, -1))), rtol=0, atol=1e-6)


def test_batches_cover_every_image_in_order(tmp_path: Path) -> None:
    pixels = [noise_png(tmp_path / "deep" / f"{i}.png", 5, 5, seed=i) for i in range(5)]
    images = load_images(imagefolder(tmp_path, *({"file_name": f"deep/{i}.png", "text": str(i)} for i in range(5))))
    batches = list(images.batches(5, 5, size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(batches), torch.stack([in_range(p) for p in pixels]), rtol=0, atol=1e-6)
    assert len(images) == 5


def test_captions_share_their_images_probability(tmp_path: Path) -> None:
    for name in "ab":
        noise_png(tmp_path / f"{name}.png", 4, 4)
    rows = [{"file_name": "a.png", "text": "one\u2028caption"}, {"file_name": "b.png", "text": ["x", "y", "x", "z"], "source": "kept out"}]
    images = load_images(imagefolder(tmp_path, *(json.dumps(row, ensure_ascii=False) for row in rows), "  "))
    assert images.captions == [{"one\u2028caption": 1.0}, {"x": 0.5, "y": 0.25, "z": 0.25}]


def test_the_embedded_digits() -> None:
    images = load_images("fastgen:digits")
    pixels, labels = digits.load_images()
    assert len(images) == 1797
    assert torch.equal(torch.cat(list(images.batches(8, 8))), pixels)
    assert images.captions == [digits.captions(label) for label in labels.tolist()]
    with pytest.raises(UserError, match=r"data\.images: these images are 8 pixels wide, the teacher needs 16"):
        list(images.batches(16, 16))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "metadata.jsonl' is empty"),
        (['{"file_name": "a.png", "text": "x"}', "{"], r"line 2 is not JSON \("),
        (['{"file_name": "a.png"}'], "line 1 has no caption: no 'text' among its keys 'file_name'"),
        (['{"text": "x"}'], "line 1 has no 'file_name' among its keys 'text'"),
        (['["a.png", "x"]'], r"line 1 is not a JSON object, but \['a\.png', 'x'\]"),
        (['{"file_name": 5, "text": "x"}'], "line 1 has the 'file_name' 5, which is no name of a file"),
        (['{"file_name": null, "text": "x"}'], "line 1 has the 'file_name' None"),
        (['{"file_name": "", "text": "x"}'], "line 1 has the 'file_name' ''"),
        (['{"file_name": "a.png", "text": []}'], r"line 1 has no caption: 'text' is \[\]"),
        (['{"file_name": "a.png", "text": ""}'], "line 1 has no caption: 'text' is ''"),
        (['{"file_name": "a.png", "text": [" ", ""]}'], r"line 1 has no caption: 'text' is \[' ', ''\]"),
        (['{"file_name": "a.png", "text": ["a", null]}'], r"line 1 has no caption: 'text' is \['a', None\]"),
        (['{"file_name": "a.png", "text": 1e999}'], "line 1 has no caption: 'text' must be a caption or a list of captions, not inf"),
        (['{"file_name": "a.png", "text": ' + "[" * 900 + "]" * 900 + "}"], r"line 1 has no caption: 'text' must be .*, not \[\[\["),
        (["[" * 100_000], r"line 1 is not JSON \(it is nested too deeply\)"),
        (['{"file_name": "a.png", "text": ' + "1" * 5000 + "}"], r"line 1 is not JSON \(Exceeds the limit"),
        ([r'{"file_name": "a.png", "text": "a \udfff"}'], r"line 1 has a caption that holds half a surrogate pair, '\\udfff'"),
        ([r'{"file_name": "a.png", "text": ["a", "\u0000"]}'], "line 1 has a caption that holds a NUL character"),
        ([r'{"file_name": "a\u0000.png", "text": "x"}'], r"line 1: no file '.*a\\x00\.png'"),
        ([r'{"file_name": "a\ud800.png", "text": "x"}'], r"line 1: no file '.*a\\ud800\.png'"),
        (['{"file_name": "' + "a" * 300 + '.png", "text": "x"}'], r"line 1: no file '.*aaa\.png'"),
        (['{"file_name": ".", "text": "x"}'], r"line 1: '.*' is a folder, not a file"),
        (['{"file_name": "a.png", "text": ["x", 5]}'], "line 1 has no caption: 'text' must be a caption or a list of captions"),
        (['{"file_name": "a.png", "text": null}'], "line 1 has no caption: 'text' is None"),
        (["", '{"file_name": "b.png", "text": "x"}'], "line 2: no file '.*b.png'"),
    ],
)
def test_mistakes_name_the_key_the_file_and_the_line(tmp_path: Path, rows: list[str], message: str) -> None:
    noise_png(tmp_path / "a.png", 4, 4)
    with pytest.raises(UserError, match=rf"^recipe key data\.images: .*{message}"):
        load_images(imagefolder(tmp_path, *rows))


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    """Already when the set is listed, where its first bytes tell; else when it is decoded."""
    folder = imagefolder(tmp_path, {"file_name": "a.png", "text": "x"})
    for content, reason in {
        b"not an image": "it is in no format that is read",
        b"": "in no format",
        b"%!PS-Adobe-3.0 EPSF-3.0\n": "in no format",
    }.items():
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(UserError, match=rf"^recipe key data\.images: '.*a\.png' is not an image .*{reason}"):
            load_images(folder)
    Image.fromarray(np.full((4, 4), 3.5, dtype=np.float32)).save(tmp_path / "a.png", format="TIFF")
    images = load_images(folder)
    with pytest.raises(UserError, match=r"^recipe key data\.images: '.*a\.png' is not an image .*its float values run from 3\.5 to 3\.5"):
        list(images.batches(4, 4))
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"^recipe key data\.images: '.*a\.png' is not an image .*No such file"):
        list(images.batches(4, 4))


def test_a_file_that_ends_early_or_is_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise_png(tmp_path / "a.png", 40, 40)
    folder = imagefolder(tmp_path, {"file_name": "a.png", "text": "x"})
    images = load_images(folder)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"^recipe key data\.images: '.*a\.png' is not an image"):
        list(images.batches(4, 4))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(
        UserError, match=r"^recipe key data\.images: '.*a\.png' is not an image .*its 1600 pixels exceed the limit of 1400; scale it down"
    ):
        load_images(folder)


def test_what_is_broken_is_left_out_only_when_asked(tmp_path: Path) -> None:
    pixels = noise_png(tmp_path / "a.png", 4, 4)
    noise_png(tmp_path / "short.png", 40, 40)
    (tmp_path / "short.png").write_bytes((tmp_path / "short.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("text")
    names = ["gone.png", "a.png", "text.png", "short.png", "a.png", "text.png"]
    folder = imagefolder(tmp_path, *({"file_name": name, "text": f"{i}"} for i, name in enumerate(names)), {"file_name": "a.png", "text": None})
    with pytest.raises(UserError, match=r"line 1: no file '.*gone\.png'; data\.skip_broken: true leaves such pictures out"):
        load_images(folder)
    images = load_images(folder, skip_broken=True)
    assert images.captions == [{"1": 1.0}, {"3": 1.0}, {"4": 1.0}]
    (warning,) = images.warnings
    assert re.fullmatch(r"recipe key data\.images: 4 of 7 pictures are left out, such as: '.*metadata\.jsonl' line 1: no file '.*gone\.png'", warning)
    for size in (1, 2, 64):
        batches = list(images.batches(4, 4, size))
        torch.testing.assert_close(torch.cat(batches), in_range(pixels).expand(2, 3, 4, 4), rtol=0, atol=1e-6)
    kept, (warning,) = images.decodable()
    assert kept.captions == [{"1": 1.0}, {"4": 1.0}] and [file.name for file in kept.sources] == ["a.png", "a.png"]
    assert re.match(r"recipe key data\.images: 1 of 3 pictures are left out, such as: '.*short\.png' is not an image", warning)
    assert kept.decodable() == (kept, [])


def test_a_set_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    folder = imagefolder(tmp_path, {"file_name": "a.png", "text": "x"}, {"file_name": "b.png", "text": "x"})
    with pytest.raises(UserError, match=r"^recipe key data\.images: all of 2 pictures are broken, the first: '.*' line 1: no file '.*a\.png'$"):
        load_images(folder, skip_broken=True)
    noise_png(tmp_path / "a.png", 40, 40)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    images = load_images(folder, skip_broken=True)
    assert list(images.batches(4, 4)) == []
    with pytest.raises(UserError, match=r"^recipe key data\.images: all of 1 pictures are broken, the first: '.*a\.png' is not an image"):
        images.decodable()


def test_a_file_may_have_several_rows_and_lie_anywhere(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    pixels = noise_png(folder / "a.png", 4, 4)
    other = noise_png(tmp_path / "b.PNG", 4, 4, seed=1)
    (folder / "link.jpg").symlink_to("../b.PNG")
    names = ["a.png", "a.png", "../b.PNG", str(tmp_path / "b.PNG"), "link.jpg"]
    images = load_images(imagefolder(folder, *({"file_name": name, "text": f"{i}"} for i, name in enumerate(names))))
    assert images.captions == [{f"{i}": 1.0} for i in range(5)]
    torch.testing.assert_close(only(images, 4), torch.stack([in_range(p) for p in (pixels, pixels, other, other, other)]), rtol=0, atol=1e-6)


def test_keys_that_have_nothing_to_say_are_refused() -> None:
    for key, value in {"background": "black", "caption_key": "caption", "skip_broken": True, "crop": "random"}.items():
        with pytest.raises(UserError, match=rf"^recipe key data\.{key}: needs data\.images"):
            images_of(DataBlock.model_validate({key: value}))
        with pytest.raises(UserError, match=rf"^recipe key data\.{key}: .*fastgen:digits has none"):
            images_of(DataBlock.model_validate({"images": "fastgen:digits", key: value}))
    assert images_of(DataBlock()) is None
