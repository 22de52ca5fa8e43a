"""Picture files of every format and mode that Pillow writes, and their damage: bits that flip, ends that are cut off, bytes that are put in."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fastgen.data.pixels import Unreadable, check_header, read_rgb

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F")


@functools.cache
def whole() -> dict[tuple[str, str], bytes]:
    """By format and mode, a picture of noise of 20 x 24 pixels, with EXIF and a profile where the format has room for them."""
    from PIL import ImageCms

    pixels = np.random.default_rng(0).integers(0, 65536, (24, 20), dtype=np.uint16)
    colours = Image.fromarray(np.stack([pixels >> 8, pixels & 255, pixels >> 4 & 255], -1).astype(np.uint8))
    images = {mode: colours.convert(mode) for mode in MODES if mode != "I;16"} | {"I;16": Image.fromarray(pixels)}
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.init()
    found = {}
    for kind in sorted(set(Image.SAVE) & set(Image.OPEN)):
        for mode, image in images.items():
            file = io.BytesIO()
            try:
                image.save(file, kind, **({"exif": exif, "icc_profile": profile} if mode in ("L", "RGB") else {}))
            except (OSError, ValueError, KeyError, TypeError):  # not a mode of this format
                continue
            found[kind, mode] = file.getvalue()
    return found


def damaged(content: bytes, count: int, seed: str) -> Iterator[bytes]:
    """The same `count` files for the same seed."""
    draw = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        place = draw.randrange(len(changed))
        early = draw.randrange(min(len(changed), 200))  # headers lie there
        kind = draw.randrange(4)
        if kind == 0:
            for _ in range(draw.choice([1, 1, 3, 20])):
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            changed[place:place] = draw.randbytes(draw.choice([1, 4, 100]))
        else:
            changed[early] = draw.choice([0, 127, 128, 255])
        yield bytes(changed)


def read(path: Path) -> Tensor | None:
    """The pixels of a file, which are colours, or None for one that is refused; any other end is an error of the reader."""
    try:
        check_header(path)
        pixels = read_rgb(path, aspect=(1, 1))
    except Unreadable as refusal:
        (line,) = str(refusal).splitlines()
        assert line.strip()
        return None
    assert pixels.shape[0] == 3 and pixels.shape[1] == pixels.shape[2] > 0
    assert bool(((pixels >= 0) & (pixels <= 255)).all())
    return pixels
