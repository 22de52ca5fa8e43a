"""A folder of pictures by id: pixels against Pillow's, order, sizes, and every way in which a folder can be wrong."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgen.errors import UserError
from fastgen.evaluation.picture_folder import PictureFolder
from fastgen.evaluation.picture_source import ready
from fastgen.evaluation.protocol import PrepareBlock


def picture(path: Path, width: int = 6, height: int = 4, seed: int = 0, mode: str = "RGB") -> np.ndarray:
    """A picture of noise: its pixels (H, W, 3) as Pillow converts them."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return np.asarray(image.convert("RGB"))


def pixels(one: Tensor) -> np.ndarray:
    assert one.dtype == torch.uint8
    return one.permute(1, 2, 0).numpy()


def test_pictures_are_read_by_id_each_in_its_own_size(tmp_path: Path) -> None:
    expected = [picture(tmp_path / f"{name}.png", 5 + i, 9 - i, seed=i) for i, name in enumerate("abcd")]
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"")
    folder = PictureFolder(tmp_path, "--images")
    assert folder.names == ("a.png", "b.png", "c.png", "d.png") and len(folder) == 4 and folder.warnings == ()
    for ids in ([0, 1, 2, 3], [3], [2, 0, 2]):
        for index, one in zip(ids, folder.read(ids), strict=True):
            assert np.array_equal(pixels(one), expected[index])


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10.png", "9.png", "100.png", "1.png"], ["1.png", "9.png", "10.png", "100.png"]),
        (["x2_10.png", "x10_1.png", "x2_9.png"], ["x2_9.png", "x2_10.png", "x10_1.png"]),
        (["b.png", "10.png", "9.png"], ["10.png", "9.png", "b.png"]),
        (["07.png", "7.png", "008.png"], ["07.png", "7.png", "008.png"]),
    ],
)
def test_names_that_differ_in_their_numbers_alone_are_in_their_order(tmp_path: Path, names: list[str], order: list[str]) -> None:
    for name in names:
        picture(tmp_path / name)
    assert list(PictureFolder(tmp_path, "--images").names) == order


def test_pictures_in_folders_below_are_read_where_there_are_no_others(tmp_path: Path) -> None:
    animals, food = picture(tmp_path / "animals/a.png", seed=1), picture(tmp_path / "food/b.jpeg/c.png", seed=2)
    (tmp_path / "food/loop").symlink_to(tmp_path)
    folder = PictureFolder(tmp_path, "--images")
    assert folder.names == ("animals/a.png", "food/b.jpeg/c.png")
    assert all(np.array_equal(pixels(one), real) for one, real in zip(folder.read([0, 1]), (animals, food), strict=True))
    picture(tmp_path / "top.png")
    folder = PictureFolder(tmp_path, "--images")
    assert folder.names == ("top.png",)
    assert folder.warnings == (f"--images: 2 further pictures, in folders below '{tmp_path}', are not read",)


def test_what_is_not_rgb_is_converted_and_counted_in_one_line(tmp_path: Path) -> None:
    kinds = {"a.png": "RGB", "b.png": "L", "c.jpg": "L", "d.png": "P", "e.tif": "CMYK", "f.png": "1"}
    expected = [picture(tmp_path / name, seed=i, mode=mode) for i, (name, mode) in enumerate(kinds.items())]
    expected[2] = np.asarray(Image.open(tmp_path / "c.jpg").convert("RGB"))
    clear = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    clear.save(tmp_path / "g.png")
    folder = PictureFolder(tmp_path, "--images")
    assert folder.warnings == (
        "--images: of 7 pictures 3 grey-scale, 1 with a palette, 1 CMYK, 1 with transparency (laid on white); they are converted to RGB",
    )
    *opaque, laid = folder.read(range(7))
    for one, real in zip(opaque, expected, strict=True):
        assert np.array_equal(pixels(one), real)
    assert laid[:, 0, 0].tolist() == [0, 0, 255] and bool((laid.flatten(1)[:, 1:] == 255).all())


def test_grey_of_16_bits_is_rounded_to_the_nearest_level(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 385, 386, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    (one,) = PictureFolder(tmp_path, "--images").read([0])
    assert one[1, 0].tolist() == np.floor(values[0] / 257 + 0.5).tolist() == [0, 0, 1, 1, 2, 255]


def test_pictures_that_cannot_be_read_are_refused_with_the_first_and_their_number(tmp_path: Path) -> None:
    for name in ("a.png", "d.png", "e.png"):
        picture(tmp_path / name)
    (tmp_path / "b.png").write_text("not a picture")
    with pytest.raises(UserError, match=r"^--images: '.*/b\.png' is not a picture that can be read \(it is in no format that is read\); replace"):
        PictureFolder(tmp_path, "--images")
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "f.png")
    with pytest.raises(UserError, match=r"^--images: 3 of 6 pictures cannot be read, the first: '.*/b\.png' is not a picture"):
        PictureFolder(tmp_path, "--images")


def test_pictures_that_end_early_are_refused_when_they_are_read(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path / f"{name}.png", 64, 64)
    for name in "bd":
        (tmp_path / f"{name}.png").write_bytes((tmp_path / f"{name}.png").read_bytes()[:3000])
    folder = PictureFolder(tmp_path, "--images")
    folder.read([0, 2])
    for ids in ([0, 1], [2, 3], range(4)):  # the same line, whichever part meets it
        with pytest.raises(UserError, match=r"^--images: 2 of 4 pictures cannot be read, the first: '.*/b\.png' is not a picture .* take it out$"):
            folder.read(ids)
    picture(tmp_path / "d.png", 64, 64)
    with pytest.raises(UserError, match=r"^--images: '.*/b\.png' is not a picture that can be read \(.*\); replace it or take it out$"):
        folder.read([1])


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda folder: None, "there is nothing"),
        (lambda folder: folder.mkdir(), "it is empty"),
        (lambda folder: folder.write_text("x"), "it is no folder"),
        (lambda folder: (folder.mkdir(), (folder / "a.txt").write_text("x"), (folder / "b.json").write_text("x")), r"it holds a\.txt, b\.json"),
        (lambda folder: (folder.mkdir(), (folder / "a.png").mkdir()), "it holds a.png/"),
    ],
)
def test_a_folder_without_pictures_is_refused_with_what_it_holds(tmp_path: Path, made, said: str) -> None:
    made(tmp_path / "set")
    with pytest.raises(UserError, match=rf"^--images: '.*/set' is not a folder of pictures: {said}$"):
        PictureFolder(tmp_path / "set", "--images")


def test_different_sizes_are_refused_by_their_headers_unless_they_are_resized(tmp_path: Path) -> None:
    first, second = picture(tmp_path / "a.png", 6, 4, seed=1), picture(tmp_path / "b.png", 5, 8, seed=2)
    folder = PictureFolder(tmp_path, "--images")
    message = r"^--images: pictures differ in size: 'a\.png' has 6 x 4 pixels \(width x height\), 'b\.png' 5 x 8; prepare\.resize of a protocol"
    for how in (PrepareBlock(), PrepareBlock(crop="centre")):
        with pytest.raises(UserError, match=message):
            folder.check_sizes(how)
        with pytest.raises(UserError, match=message):
            ready(folder, [0, 1], how)
    how = PrepareBlock(crop="centre", resize=3, filter="bicubic")
    folder.check_sizes(how)
    pictures = ready(folder, [0, 1], how)
    crops = (first[:, 1:5], second[2:7])  # a margin of 1.5 is 2, as in torchvision
    for one, crop in zip(pictures.pixels, crops, strict=True):
        assert np.array_equal(pixels(one), np.asarray(Image.fromarray(crop).resize((3, 3), Image.Resampling.BICUBIC)))
    assert pictures.raw is not None and [tuple(one.shape) for one in pictures.raw] == [(3, 4, 6), (3, 8, 5)]


def test_upright_and_lying_pictures_have_one_centre_square(tmp_path: Path) -> None:
    lying, upright = picture(tmp_path / "a.png", 6, 4, seed=1), picture(tmp_path / "b.png", 4, 6, seed=2)
    folder, how = PictureFolder(tmp_path, "--images"), PrepareBlock(crop="centre")
    folder.check_sizes(how)
    first, second = ready(folder, [0, 1], how).pixels
    assert np.array_equal(pixels(first), lying[:, 1:5]) and np.array_equal(pixels(second), upright[1:5])


def test_what_exif_turns_is_compared_upright(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 6)).save(tmp_path / "b.jpg", exif=exif)
    folder = PictureFolder(tmp_path, "--images")
    folder.check_sizes(PrepareBlock())
    assert ready(folder, [0, 1], PrepareBlock()).pixels.shape == (2, 3, 4, 6)


def test_content_is_of_names_and_bytes_and_not_of_the_place(tmp_path: Path) -> None:
    picture(tmp_path / "one/a.png", seed=1)
    picture(tmp_path / "one/b.png", seed=2)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two/notes.txt").write_text("no picture")

    def content() -> str:
        return PictureFolder(tmp_path / "two", "--images").content

    whole = PictureFolder(tmp_path / "one", "--images").content
    assert re.fullmatch("[0-9a-f]{64}", whole) and content() == whole
    (tmp_path / "two/b.png").rename(tmp_path / "two/c.png")
    renamed = content()
    picture(tmp_path / "two/c.png", seed=3)
    assert len({whole, renamed, content()}) == 3


def test_reading_leaves_pythons_warnings_as_they_were(tmp_path: Path) -> None:
    import warnings

    for name in "abcdefgh":
        picture(tmp_path / f"{name}.png", 32, 32)
    before = list(warnings.filters)
    PictureFolder(tmp_path, "--images").read(list(range(8)) * 20)
    assert warnings.filters == before
