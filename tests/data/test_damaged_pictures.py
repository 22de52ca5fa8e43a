"""Pictures that are damaged, or made to harm: a line that says so, and no memory taken. More: tests/faults/test_fuzzed_pictures.py."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
from damaged_pictures import damaged, read, whole
from PIL import Image, ImageFile, PngImagePlugin

from fastgen.data.pixels import Unreadable, check_header, picture_suffixes, read_rgb


def refused(path: Path, message: str) -> None:
    with pytest.raises(Unreadable, match=message):
        read_rgb(path)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with(path: Path, *chunks: bytes) -> Path:
    """A white pixel in a PNG with some chunks before it."""
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    path.write_bytes(head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0\xff")) + chunk(b"IEND", b""))
    return path


def test_some_damage_to_every_format(tmp_path: Path) -> None:
    ends = []
    assert {kind for kind, _ in whole()} >= {"PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "JPEG2000", "PPM", "TGA", "ICO"}
    for (kind, mode), content in whole().items():
        for changed in damaged(content, 3, f"{kind} {mode} in brief"):
            (tmp_path / "a").write_bytes(changed)
            ends.append(read(tmp_path / "a") is not None)
    assert 0.1 < sum(ends) / len(ends) < 0.9


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), MemoryError(), KeyError(3), IndexError(), RecursionError(), AssertionError(), OverflowError("\n")]
)
def test_whatever_a_reader_raises_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def raising(*args: Any, **options: Any) -> None:
        raise error

    png_with(tmp_path / "a.png")
    with monkeypatch.context() as patch:
        patch.setattr(PngImagePlugin.PngImageFile, "load", raising)
        refused(tmp_path / "a.png", ".")
    monkeypatch.setattr(Image, "open", raising)
    refused(tmp_path / "a.png", ".")
    with pytest.raises(Unreadable):
        check_header(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")),
        ("a.bmp", b"BM" + struct.pack("<IHHIIiiHHIIIIII", 54, 0, 0, 54, 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0)),
        ("a.ppm", b"P6 100000 100000 255\n"),
    ],
)
def test_a_header_of_ten_billion_pixels_is_refused_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    (tmp_path / name).write_bytes(content)
    for look in (check_header, read_rgb):
        with pytest.raises(Unreadable, match=r"its 10000000000 pixels exceed the limit of 178956970; scale it down"):
            look(tmp_path / name)


def test_a_large_photograph_is_read_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between Pillow's two limits, the first of which only warns."""
    Image.new("RGB", (40, 30), "white").save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings(action="error"):
        check_header(tmp_path / "a.png")
        assert read_rgb(tmp_path / "a.png").min() == 255


def test_chunks_of_text_that_unpack_to_more_than_is_read(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(2**24))
    for kind, content in {b"zTXt": b"a\0\0" + bomb, b"iCCP": b"a\0\0" + bomb, b"iTXt": b"a\0\1\0\0\0" + bomb}.items():
        refused(png_with(tmp_path / "a.png", chunk(kind, content)), "too large|MAX_TEXT_CHUNK")
    texts = [chunk(b"tEXt", b"%d\0" % i + b"x" * 2**20) for i in range(3)]  # long, but as long as they are
    assert read_rgb(png_with(tmp_path / "a.png", *texts)).min() == 255


def test_a_program_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has Ghostscript run EPS, which may never end."""
    from PIL import EpsImagePlugin

    Image.new("RGB", (2, 2)).save(tmp_path / "a.eps")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it was run"))
    refused(tmp_path / "a.eps", "it is in no format that is read")
    assert ".eps" not in picture_suffixes() and {".png", ".jpg", ".jpeg", ".webp", ".tif", ".avif"} <= picture_suffixes()


def test_a_picture_without_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.bmp").write_bytes(b"BM" + struct.pack("<IHHIIiiHHIIIIII", 54, 0, 0, 54, 40, 0, 5, 1, 24, 0, 0, 0, 0, 0, 0))
    refused(tmp_path / "a.bmp", "it has no pixels|no format")
