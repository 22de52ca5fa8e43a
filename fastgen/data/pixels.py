"""Any picture that Pillow opens, as the RGB that a browser shows: upright, in sRGB, on a background where it is transparent.

Pillow's own `convert("RGB")` clips grey deeper than 8 bits to two values, shows the colours that transparency hides, and takes every
profile for sRGB.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, upper, right, lower

_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_PHOTOMETRIC = 262  # the TIFF tag; 0: white is zero
_SHARED_BY_ALL = 2  # levels by which encodings of sRGB differ among the profiles that say it


class Readable(Protocol):
    """A picture's file, wherever it lies: a path, a member of an archive, a cell of a table."""

    def open(self, mode: Literal["rb"]) -> BinaryIO: ...


class Unreadable(ValueError):
    """A picture file that cannot be read; the message says why."""


def read_rgb(path: Readable, background: Colour = (255, 255, 255), *, aspect: tuple[int, int] | None = None, place: float = 0.5) -> Tensor:
    """`upright_rgb` of a picture file; Unreadable for one that Pillow cannot decode."""
    # Not by its path: Pillow would map an uncompressed TIFF into memory with width and height exchanged where it is to be turned.
    with _pillow():
        file = path.open("rb")
    with file:
        return upright_rgb(_opened(file), background, aspect=aspect, place=place)


class Header(NamedTuple):
    """What a picture file says of itself. mode: Pillow's. size: (width, height) as stored, before EXIF turns it."""

    mode: str
    size: tuple[int, int]


def check_header(path: Readable) -> Header:
    """Unreadable unless Pillow knows the format and the size is one that it reads; decodes nothing."""
    with _pillow():
        file = path.open("rb")
    with file:
        image = _opened(file)
        return Header(image.mode, image.size)


_ORIENTATION, _LYING = 274, range(5, 9)  # the EXIF tag, and its values that exchange width and height


def upright_size(path: Readable) -> tuple[int, int]:
    """(height, width) of a picture as it is shown; Unreadable as of `check_header`."""
    with _pillow():
        file = path.open("rb")
    with file:
        image = _opened(file)
        width, height = image.size
        try:
            with _pillow():
                lying = image.getexif().get(_ORIENTATION) in _LYING
        except Unreadable:  # the metadata alone are broken
            lying = False
    return (width, height) if lying else (height, width)


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the formats that are read."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")  # a program, which Pillow has Ghostscript run


def _opened(file: BinaryIO) -> Image.Image:
    with _pillow():
        image = Image.open(file, formats=_formats())
    if 0 in image.size:
        raise Unreadable("it has no pixels")
    return image


@contextmanager
def _pillow() -> Iterator[None]:
    """Around Pillow's readers of a user's file: whatever they raise is Unreadable, for they let through what parsing comes to."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of large pictures, which are read, and of broken metadata
            yield
    except Image.UnidentifiedImageError as error:
        raise Unreadable("it is in no format that is read") from error
    except Image.DecompressionBombError as error:
        pixels, limit = re.findall(r"\d+", str(error))[:2]
        raise Unreadable(f"its {pixels} pixels exceed the limit of {limit}; scale it down") from error
    except Exception as error:
        raise Unreadable(" ".join(str(error).split())[:200] or type(error).__name__) from error


def upright_rgb(image: Image.Image, background: Colour = (255, 255, 255), *, aspect: tuple[int, int] | None = None, place: float = 0.5) -> Tensor:
    """sRGB (3, H, W) fp32 in [0, 255], whole numbers unless the picture is deeper than 8 bits or partly transparent; an animation's first
    frame. Turned as EXIF says; transparent pixels lie on `background`, mixed in sRGB values as browsers do.

    Integer grey of more than 8 bits is 16 bits wide, whatever its range. Float grey runs from 0 to 1, or in whole numbers from 0 to 255.
    Embedded profiles are converted to sRGB, perceptually; those that cannot be used are ignored. Unreadable for grey outside its range.
    aspect: (height, width) of which only the largest crop is read, which costs as much less as it is smaller. place: where it lies along the
    side that is longer, from 0, its beginning, to 1.
    """
    rawmode = _prepared(image)
    upright, profile = _upright(image), image.info.get("icc_profile")
    box = (0, 0, *upright.size) if aspect is None else _crop(upright.size, aspect, place)
    if upright.mode in _DEEP:
        is_negative = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
        colours, alpha = _deep(upright, box, profile, rawmode, is_negative=is_negative)
    else:
        colours, alpha = _shallow(upright if aspect is None else upright.crop(box), profile)
    if alpha is not None:
        paper = np.array(background, dtype=np.float32)
        colours -= paper  # in place, for a photograph takes a gigabyte
        colours *= alpha[..., None]
        colours += paper
    return torch.from_numpy(colours.transpose(2, 0, 1))


def _prepared(image: Image.Image) -> str:
    """The file's own pixel format, which loading forgets; a PNG's transparent colour, which Pillow gives in that format, in 8 bits."""
    tiles: Any = getattr(image, "tile", [])
    arguments, key = tiles[0][3] if tiles else "", image.info.get("transparency")
    rawmode = str(arguments[0] if isinstance(arguments, tuple) else arguments)
    if rawmode in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[rawmode]
    elif rawmode == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return rawmode


def _upright(image: Image.Image) -> Image.Image:
    with _pillow():
        image.load()
    try:
        with _pillow():
            return ImageOps.exif_transpose(image)
    except Unreadable:  # the metadata alone are broken
        return image


def _crop(size: tuple[int, int], aspect: tuple[int, int], place: float) -> Box:
    """The largest crop of a picture (width, height) that is as wide to its height as `aspect` (height, width), to the pixel; in the
    middle an odd margin is as torchvision's `center_crop` has it."""
    (width, height), (tall, wide) = size, aspect
    crop = (max(1, round(height * wide / tall)), height) if width * tall > height * wide else (width, max(1, round(width * tall / wide)))
    left, upper = (round((length - side) * place) for length, side in zip(size, crop, strict=True))
    return left, upper, left + crop[0], upper + crop[1]


def _shallow(image: Image.Image, profile: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours (H, W, 3) fp32 and alpha (H, W) in [0, 1], or None, of a picture with 8 bits or fewer."""
    image, alpha = image.convert("LA") if image.mode == "La" else image, None
    is_grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"), dtype=np.float32) / 255
    if image.mode != "CMYK":
        image = image.convert("L" if is_grey else "RGB")
    return np.asarray(_srgb(image, profile), dtype=np.float32), alpha


def _deep(image: Image.Image, box: Box, profile: Any, rawmode: str, *, is_negative: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """The same of grey pictures with more than 8 bits. is_negative: 0 is white, which Pillow heeds up to 8 bits only."""
    values, key = np.asarray(image), image.info.get("transparency")
    unit = np.float64(_unit(values, rawmode))  # which the whole picture tells
    values = values[box[1] : box[3], box[0] : box[2]]
    grey = values * unit
    grey = 255 - grey if is_negative else grey
    ramp = np.asarray(_srgb(Image.fromarray(np.arange(256, dtype=np.uint8)[None]), profile))[0]
    colours = np.stack([np.interp(grey, np.arange(256), ramp[:, channel]) for channel in range(3)], -1)
    return colours.astype(np.float32), None if key is None else (values != key).astype(np.float32)


def _unit(values: np.ndarray, rawmode: str) -> float:
    """What one step of the values is worth in levels of 8 bits."""
    low, high = values.min(), values.max()
    if np.issubdtype(values.dtype, np.floating):
        if 0 <= low <= high <= 1:
            return 255
        if not (0 <= low <= high <= 255 and (values == values.round()).all()):
            raise Unreadable(f"its float values run from {low:g} to {high:g}; they must be from 0 to 1, or whole numbers from 0 to 255")
        return 1
    if not 0 <= low <= high <= 65535:
        raise Unreadable(f"its values run from {low} to {high}; integers must fit into 16 bits, from 0 to 65535")
    return 255 / 4095 if rawmode == "I;12" else 1 / 257


def _srgb(image: Image.Image, profile: Any) -> Image.Image:
    """RGB of an L, RGB or CMYK picture."""
    transform = _to_srgb(profile, image.mode) if isinstance(profile, bytes) and profile else None
    return image.convert("RGB") if transform is None else transform.apply(image)


@functools.lru_cache(maxsize=16)  # the pictures of a data set have few profiles among them
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The way from a profile to sRGB; None where it leads nowhere, or cannot be used: it is broken, or of another colour model."""
    try:
        transform = ImageCms.buildTransform(ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ImageCms.PyCMSError):
        return None
    probe = _probe().convert(mode)
    change = np.asarray(transform.apply(probe), dtype=int) - np.asarray(probe.convert("RGB"), dtype=int)
    return transform if np.abs(change).max() > _SHARED_BY_ALL else None


def _probe() -> Image.Image:
    """RGB colours all over the cube, 16 levels apart."""
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(1, -1, 3))
