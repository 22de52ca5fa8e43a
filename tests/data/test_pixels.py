"""Every mode that a picture file can have, read back from disk, against colours worked out by hand: depth, transparency, turning, profiles."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from raw_pictures import ADOBE_GAMMA, ADOBE_TO_XYZ, GREY, GREY_ALPHA, INDEXED, RGB, adobe_rgb, linear_grey, png, printer, profile, xyz
from torch import Tensor
from torchvision.transforms.v2 import functional

from fastgen.data.pixels import Colour, read_rgb, upright_rgb

WHITE, CLEAR = (255, 255, 255), (-1.0, -1.0, -1.0)
WORDS = np.array([[0, 257, 32768], [65535, 1000, 300]], dtype=np.uint16)


def read(path: Path, background: Colour = WHITE) -> Tensor:
    pixels = read_rgb(path, background)
    assert pixels.dtype == torch.float32
    assert pixels.ndim == 3 and pixels.shape[0] == 3
    return pixels


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def row(path: Path, background: Colour = WHITE) -> list[tuple[float, ...]]:
    """The colours of a picture that is one pixel high."""
    pixels = read(path, background)
    assert pixels.shape[1] == 1
    return [tuple(colour) for colour in pixels[:, 0].T.tolist()]


def close(found: list[tuple[float, ...]], *expected: tuple[float, ...], within: float = 1e-4) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=within)


def greys(*levels: float) -> list[tuple[float, ...]]:
    return [(level,) * 3 for level in levels]


def of_pixels(mode: str, *pixels: Any) -> Image.Image:
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return image


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.png", {}), ("a.tif", {}), ("a.tif", {"compression": "tiff_lzw"}), ("a.jp2", {"irreversible": False})],
)
def test_grey_of_16_bits_is_divided_by_257(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    path = saved(tmp_path / name, Image.fromarray(WORDS), **options)
    assert Image.open(path).mode == "I;16"
    torch.testing.assert_close(read(path), torch.from_numpy(WORDS / 257).float().expand(3, 2, 3))


def test_grey_of_16_bits_with_the_high_byte_first(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", Image.frombytes("I;16B", (3, 2), WORDS.astype(">u2").tobytes()))
    assert Image.open(path).mode == "I;16B"
    torch.testing.assert_close(read(path), torch.from_numpy(WORDS / 257).float().expand(3, 2, 3))


def test_integers_of_32_bits_hold_16(tmp_path: Path) -> None:
    for path in (saved(tmp_path / "a.tif", Image.fromarray(WORDS.astype(np.int32))), saved(tmp_path / "a.pgm", Image.fromarray(WORDS))):
        assert Image.open(path).mode == "I"
        torch.testing.assert_close(read(path), torch.from_numpy(WORDS / 257).float().expand(3, 2, 3))


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_beyond_16_bits_are_refused(tmp_path: Path, value: int) -> None:
    path = saved(tmp_path / "a.tif", Image.fromarray(np.array([[5, value]], dtype=np.int32)))
    with pytest.raises(ValueError, match=rf"its values run from {min(5, value)} to {max(5, value)}; integers must fit into 16 bits"):
        read(path)


def test_float_grey_runs_from_0_to_1_or_in_levels(tmp_path: Path) -> None:
    unit = saved(tmp_path / "unit.tif", Image.fromarray(np.array([[0, 0.25, 1]], dtype=np.float32)))
    close(row(unit), *greys(0, 63.75, 255))
    levels = saved(tmp_path / "levels.tif", Image.fromarray(np.array([[0, 2, 255]], dtype=np.float32)))
    close(row(levels), *greys(0, 2, 255))


@pytest.mark.parametrize("values", [(0, 1.5), (-0.1, 1), (0, 256), (0, float("nan")), (0, float("inf"))])
def test_other_float_grey_is_refused(tmp_path: Path, values: tuple[float, float]) -> None:
    path = saved(tmp_path / "a.tif", Image.fromarray(np.array([values], dtype=np.float32)))
    with pytest.raises(ValueError, match="they must be from 0 to 1, or whole numbers from 0 to 255"):
        read(path)


@pytest.mark.parametrize("depth", [8, 16])
def test_a_tiff_whose_zero_is_white(tmp_path: Path, depth: int) -> None:
    pixels = np.array([[0, 255]], dtype=np.uint8) if depth == 8 else np.array([[0, 257 * 55, 65535]], dtype=np.uint16)
    path = saved(tmp_path / "a.tif", Image.fromarray(pixels))
    black_is_zero, white_is_zero = (struct.pack("<HHIHH", 262, 3, 1, value, 0) for value in (1, 0))
    assert path.read_bytes().count(black_is_zero) == 1
    path.write_bytes(path.read_bytes().replace(black_is_zero, white_is_zero))
    close(row(path), *(greys(255, 0) if depth == 8 else greys(255, 200, 0)))


def test_a_tiff_of_12_bits(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", of_pixels("L", 0xFF, 0xF8, 0x19))  # 24 bits: 4095, 0x819
    content = path.read_bytes()
    for tag, old, new in ((258, 8, 12), (256, 3, 2)):
        entry = struct.pack("<HHIHH", tag, 3, 1, old, 0) if content.count(struct.pack("<HHIHH", tag, 3, 1, old, 0)) else b""
        entry, kind = (entry, "<HHIHH") if entry else (struct.pack("<HHII", tag, 4, 1, old), "<HHII")
        assert content.count(entry) == 1
        content = content.replace(entry, struct.pack(kind, tag, 3, 1, new, 0) if kind == "<HHIHH" else struct.pack(kind, tag, 4, 1, new))
    path.write_bytes(content)
    close(row(path), *greys(255, 0x819 * 255 / 4095))


@pytest.mark.parametrize("background", [WHITE, (0, 0, 0), (0, 100, 200)])
def test_alpha_mixes_with_the_background(tmp_path: Path, background: Colour) -> None:
    """Colours c with alpha a show a c + (1 - a) background; a = 51/255 is a fifth."""
    image = of_pixels("RGBA", (200, 100, 50, 255), (200, 100, 50, 51), (200, 100, 50, 0))
    fifth = tuple(0.2 * colour + 0.8 * ground for colour, ground in zip((200, 100, 50), background, strict=True))
    for name, options in (("a.png", {}), ("a.tif", {}), ("a.webp", {"lossless": True, "exact": True})):
        close(row(saved(tmp_path / name, image, **options), background), (200, 100, 50), fifth, background)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.tga"])
def test_grey_with_alpha(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / name, of_pixels("LA", (100, 255), (100, 51), (100, 0)), **({"lossless": True, "exact": True} if name == "a.webp" else {}))
    close(row(path, (255, 0, 50)), (100, 100, 100), (224, 20, 60), (255, 0, 50))


def test_premultiplied_and_palette_modes() -> None:
    """Modes that Pillow has, but writes to no file."""
    palette = of_pixels("PA", (0, 51), (1, 255))
    palette.putpalette([200, 100, 50, 40, 50, 60])
    own = of_pixels("P", 0, 1)
    own.putpalette([200, 100, 50, 51, 40, 50, 60, 255], "RGBA")
    for image in (palette, own):
        assert torch.equal(upright_rgb(image)[:, 0].T.round(), torch.tensor([[244.0, 224, 214], [40, 50, 60]]))
    for mode, pixel in (("La", (40, 51)), ("RGBa", (40, 40, 40, 51))):
        assert upright_rgb(of_pixels(mode, pixel)).flatten().tolist() == pytest.approx([244] * 3)  # 200 in full
    assert upright_rgb(of_pixels("HSV", (0, 255, 255), (0, 0, 128)))[:, 0].T.tolist() == [[255, 0, 0], [128, 128, 128]]


def test_palettes_with_alpha_with_a_clear_index_and_without(tmp_path: Path) -> None:
    plte = bytes([10, 20, 30, 200, 100, 50, 7, 8, 9, 1, 2, 3])
    path = png(tmp_path / "a.png", 4, 2, INDEXED, [bytes([0b00_01_10_11])], PLTE=plte, tRNS=bytes([0, 51]))
    close(row(path), WHITE, (244, 224, 214), (7, 8, 9), (1, 2, 3))
    image = of_pixels("P", 0, 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    close(row(saved(tmp_path / "plain.png", image)), (10, 20, 30), (40, 50, 60))
    for name in ("b.png", "b.gif"):
        close(row(saved(tmp_path / name, image, transparency=1), (1, 2, 3)), (10, 20, 30), (1, 2, 3))


@pytest.mark.parametrize(
    ("width", "depth", "kind", "data", "key", "expected"),
    [
        (2, 8, RGB, bytes([1, 2, 3, 1, 2, 4]), (1, 2, 3), [CLEAR, (1, 2, 4)]),
        (2, 16, RGB, struct.pack(">6H", 1000, 2000, 3000, 0, 512, 65535), (1000, 2000, 3000), [CLEAR, (0, 2, 255)]),
        (2, 8, GREY, bytes([7, 8]), (7,), [CLEAR, *greys(8)]),
        (2, 16, GREY, struct.pack(">2H", 2570, 2571), (2570,), [CLEAR, *greys(2571 / 257)]),
        (2, 4, GREY, bytes([0x1F]), (1,), [CLEAR, *greys(255)]),
        (4, 2, GREY, bytes([0b00_01_10_11]), (2,), [*greys(0, 85), CLEAR, *greys(255)]),
        (2, 1, GREY, bytes([0b01_000000]), (0,), [CLEAR, *greys(255)]),
    ],
    ids=["RGB", "RGB16", "L", "I;16", "L4", "L2", "1"],
)
def test_a_colour_key_is_compared_at_the_files_own_depth(
    tmp_path: Path, width: int, depth: int, kind: int, data: bytes, key: tuple[int, ...], expected: list[tuple[float, ...]]
) -> None:
    path = png(tmp_path / "a.png", width, depth, kind, [data], tRNS=struct.pack(f">{len(key)}H", *key))
    for background in (WHITE, (9, 8, 7)):
        close(row(path, background), *(background if colour is CLEAR else colour for colour in expected))


def test_grey_with_alpha_of_16_bits(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", 2, 16, GREY_ALPHA, [struct.pack(">4H", 257 * 100, 257 * 51, 257 * 100, 65535)])
    close(row(path), *greys(224, 100))


def test_one_bit(tmp_path: Path) -> None:
    for name in ("a.png", "a.tif", "a.bmp"):
        close(row(saved(tmp_path / name, of_pixels("1", 1, 0))), *greys(255, 0))


PATTERN = np.array([[10, 60, 110], [160, 210, 250]], dtype=np.uint8)
# What EXIF's orientation says of the stored picture, as what must be done to see it upright.
TURNED = {
    1: PATTERN,
    2: PATTERN[:, ::-1],
    3: PATTERN[::-1, ::-1],
    4: PATTERN[::-1],
    5: PATTERN.T,
    6: np.rot90(PATTERN, -1),
    7: PATTERN[::-1, ::-1].T,
    8: np.rot90(PATTERN, 1),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.tif", {}),
        ("a.tif", {"compression": "tiff_lzw"}),
        ("a.webp", {"lossless": True, "exact": True}),
        ("a.jpg", {"quality": 100, "subsampling": 0}),
    ],
)
def test_pictures_are_turned_upright_and_their_alpha_with_them(tmp_path: Path, name: str, options: dict[str, Any], orientation: int) -> None:
    exif, upright = Image.Exif(), TURNED[orientation]
    exif[0x0112] = orientation
    image, expected, within = Image.fromarray(PATTERN).convert("RGB"), torch.from_numpy(upright.copy()).float(), 3
    if name != "a.jpg":
        image.putalpha(Image.fromarray(np.where(PATTERN == 60, 51, 255).astype(np.uint8)))
        expected, within = torch.where(expected == 60, 216, expected), 1e-4
    pixels = read(saved(tmp_path / name, image, exif=exif, **options))
    assert pixels.shape[1:] == expected.shape
    assert (pixels - expected).abs().max() <= within


def test_deep_grey_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "a.png", Image.fromarray(PATTERN.astype(np.uint16) * 257), exif=exif)
    torch.testing.assert_close(read(path)[0], torch.from_numpy(TURNED[6].copy()).float())


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
def test_broken_metadata_spoil_no_picture(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / name, Image.new("RGB", (9, 1), (100, 100, 100)), exif=b"Exif\0\0neither II nor MM")
    close(row(path), *greys(*[100] * 9), within=1)


def test_inks(tmp_path: Path) -> None:
    """(1 - C)(1 - K), in files that store inks upside down (Adobe's JPEG) and in those that do not."""
    for name in ("a.tif", "a.jpg"):
        path = saved(tmp_path / name, Image.new("CMYK", (8, 1), (0, 255, 51, 51)), **({"quality": 100} if name == "a.jpg" else {}))
        assert Image.open(path).mode == "CMYK"
        close(row(path), *[(204.0, 0.0, 163.2)] * 8, within=2)


def test_a_jpeg_of_ycck(tmp_path: Path) -> None:
    """Adobe's other way, told by a marker: YCC of R = 255 - C', where C' = 255 - C is the ink as Adobe stores it, and K' = 255 - K beside it.
    A pixel that shows C'K' and so on; the file is one of plain inks with the other marker."""
    path = saved(tmp_path / "a.jpg", Image.new("CMYK", (8, 1), (102, 102, 102, 51)), quality=100)
    marker = b"Adobe\0\x64\0\0\0\0"
    assert path.read_bytes().count(marker + b"\0") == 1
    path.write_bytes(path.read_bytes().replace(marker + b"\0", marker + b"\2"))
    y, chroma = 153, 153 - 128  # stored are 153, 153, 153 and 204, which is .8
    rgb = (y + 1.402 * chroma, y - 0.344136 * chroma - 0.714136 * chroma, y + 1.772 * chroma)
    close(row(path), *[tuple(0.8 * (255 - value) for value in rgb)] * 8, within=2)


def test_lab_and_ycbcr(tmp_path: Path) -> None:
    """Pillow holds a* and b* with 128 on top. L* 50 is sRGB's 119."""
    close(row(saved(tmp_path / "a.tif", of_pixels("LAB", (128, 128, 128), (255, 128, 128), (0, 128, 128)))), *greys(119, 255, 0), within=1)
    close(row(saved(tmp_path / "b.tif", of_pixels("LAB", (127, 168, 148)))), lab_to_srgb(127 * 100 / 255, 40, 20), within=2)
    close(row(saved(tmp_path / "c.tif", of_pixels("YCbCr", (76, 85, 255), (128, 128, 128)))), (254, 0, 0), (128, 128, 128), within=1.5)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_the_first_frame_of_an_animation(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (4, 1), (level, level, level)) for level in (40, 90, 140)]
    path = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], **({"lossless": True} if name == "a.webp" else {}))
    assert getattr(Image.open(path), "n_frames", 1) == 3
    close(row(path), *greys(40, 40, 40, 40))


SRGB_TO_XYZ = np.array([[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]])  # D50


def xyz_to_srgb(xyz: np.ndarray) -> tuple[float, ...]:
    linear = np.linalg.solve(SRGB_TO_XYZ, xyz).clip(0, 1)
    return tuple(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))


def lab_to_srgb(lightness: float, a: float, b: float) -> tuple[float, ...]:
    f = (lightness + 16) / 116 + np.array([a / 500, 0, -b / 200])
    return xyz_to_srgb(np.array([0.9642, 1, 0.8249]) * np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2))


def from_adobe(*colour: int) -> tuple[float, ...]:
    return xyz_to_srgb(np.array(ADOBE_TO_XYZ) @ (np.array(colour) / 255) ** ADOBE_GAMMA)


COLOURS = ((100, 150, 200), (200, 120, 90), (128, 128, 128), (0, 255, 0), (255, 255, 255))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_a_wide_profile_is_converted_to_srgb_under_its_alpha(tmp_path: Path, name: str) -> None:
    lossless = {"lossless": True, "exact": True} if name == "a.webp" else {}
    image = of_pixels("RGB", *COLOURS)
    converted = [from_adobe(*colour) for colour in COLOURS]
    assert max(abs(a - b) for one, other in zip(converted, COLOURS, strict=True) for a, b in zip(one, other, strict=True)) > 30
    close(row(saved(tmp_path / name, image, icc_profile=adobe_rgb(), **lossless)), *converted, within=1.5)
    image.putalpha(51)
    on_blue = [tuple(0.2 * value + 0.8 * ground for value, ground in zip(colour, (0, 0, 255), strict=True)) for colour in converted]
    close(row(saved(tmp_path / name, image, icc_profile=adobe_rgb(), **lossless), (0, 0, 255)), *on_blue, within=0.5)


def test_a_palette_has_its_profile_too(tmp_path: Path) -> None:
    image = of_pixels("P", 0, 1)
    image.putpalette([100, 150, 200, 200, 120, 90])
    close(row(saved(tmp_path / "a.png", image, icc_profile=adobe_rgb(), transparency=1)), from_adobe(*COLOURS[0]), WHITE, within=1.5)


def test_grey_profiles(tmp_path: Path) -> None:
    """Linear light of a half is sRGB's 188, of a hundredth 25 (12.92 x below .0031308, the power above it)."""
    shallow = of_pixels("L", 0, 128, 255)
    close(row(saved(tmp_path / "a.png", shallow, icc_profile=linear_grey())), *greys(0, 188, 255), within=1)
    alpha = of_pixels("LA", (128, 255), (128, 0))
    close(row(saved(tmp_path / "b.png", alpha, icc_profile=linear_grey())), *greys(188, 255), within=1)
    deep = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    close(row(saved(tmp_path / "c.png", deep, icc_profile=linear_grey())), *greys(0, 188, 255), within=1)


def test_an_ink_profile(tmp_path: Path) -> None:
    inks = printer({(1, 0, 0, 0): (60, -25, -30), (0, 0, 0, 1): (0, 0, 0)}, paper=(100, 0, 0))
    image = of_pixels("CMYK", (0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255))
    path = saved(tmp_path / "a.tif", image, icc_profile=inks)
    close(row(path), WHITE, lab_to_srgb(60, -25, -30), (0, 0, 0), within=3)


@pytest.mark.parametrize("broken", [b"no profile", linear_grey(), adobe_rgb()[:200], profile(b"RGB ")])
def test_a_profile_that_cannot_be_used_is_ignored(tmp_path: Path, broken: bytes) -> None:
    close(row(saved(tmp_path / "a.png", of_pixels("RGB", *COLOURS), icc_profile=broken)), *COLOURS)


def test_srgbs_own_profile_changes_no_level(tmp_path: Path) -> None:
    columns = [tuple(float(value) for value in column) for column in SRGB_TO_XYZ.T]
    curve = b"curv\0\0\0\0" + struct.pack(">I", 1024)
    encoded = np.linspace(0, 1, 1024)
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    curve += np.round(linear * 65535).astype(">u2").tobytes()
    red, green, blue = (xyz(*column) for column in columns)
    srgb = profile(b"RGB ", rXYZ=red, gXYZ=green, bXYZ=blue, rTRC=curve, gTRC=curve, bTRC=curve)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    path = saved(tmp_path / "a.png", Image.fromarray(pixels), icc_profile=srgb)
    assert torch.equal(read(path), torch.from_numpy(pixels).permute(2, 0, 1).float())


@pytest.mark.parametrize(("width", "height"), [(9, 6), (6, 9), (10, 5), (5, 10), (7, 7), (1, 5)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16", "F"])
def test_the_centre_square_alone_is_that_of_the_whole(tmp_path: Path, mode: str, width: int, height: int) -> None:
    """Where a picture's range tells what its values are worth, that of the whole does: here 0 and 1 in the middle, and 255 at the ends."""
    values = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "F":
        image = Image.fromarray((values[..., 0] % 2).astype(np.float32))
        image.putpixel((0, 0), 255)
        image.putpixel((width - 1, height - 1), 255)
    else:
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 256) if mode == "I;16" else Image.fromarray(values).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = saved(tmp_path / "a.tif", image, exif=exif)
    expected = functional.center_crop(read(whole, (9, 8, 7)), [min(width, height)] * 2)
    assert torch.equal(read_rgb(whole, (9, 8, 7), aspect=(1, 1)), expected)
