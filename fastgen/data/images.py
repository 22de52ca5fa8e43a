"""Images with captions: a folder in the Hugging Face `imagefolder` layout, or the embedded digits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import ImageColor
from torch import Tensor

from fastgen.data import digits
from fastgen.data.pixels import UNREADABLE, Colour, read_rgb
from fastgen.errors import UserError
from fastgen.fingerprints import digest, known_hash

KEY = "recipe key data.images"


@dataclass(frozen=True)
class CaptionedImages:
    """captions[i]: every caption of image i with its probability. background: sRGB, what transparent pixels of files lie on."""

    captions: list[dict[str, float]]
    sources: list[Any]  # image files, or tensors (3, H, W) fp32 in [-1, 1]
    background: Colour = (255, 255, 255)

    def __len__(self) -> int:
        return len(self.sources)

    def content(self) -> str:
        """What the set is, wherever it lies: SHA-256 over every image's captions and the bytes of its file, in order."""
        return digest([[list(captions.items()), _hash(source)] for captions, source in zip(self.captions, self.sources, strict=True)])

    def batches(self, resolution: int, size: int = 64) -> Iterator[Tensor]:
        """Pixels (B, 3, resolution, resolution) fp32 in [-1, 1]: the largest centre square, resized with antialiasing."""
        for start in range(0, len(self), size):
            yield torch.stack([_pixels(source, resolution, self.background) for source in self.sources[start : start + size]])


def load_images(source: str, background: str = "white") -> CaptionedImages:
    """`fastgen:digits`, or a folder with metadata.jsonl rows {"file_name": ..., "text": caption or list of captions}.

    background: the colour of transparent pixels, as Pillow's ImageColor names it.
    """
    if source == "fastgen:digits":
        images, labels = digits.load_images()
        return CaptionedImages([digits.captions(label) for label in labels.tolist()], list(images))
    folder = Path(source).expanduser()
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise UserError(f"{KEY}: {source!r} is neither fastgen:digits nor a folder with metadata.jsonl")
    try:
        lines = metadata.read_text(encoding="utf-8-sig").split("\n")  # `splitlines` would also split at U+2028 inside captions
    except UnicodeDecodeError as error:
        raise UserError(f"{KEY}: {str(metadata)!r} is not UTF-8 text") from error
    rows = [_row(folder, line, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{KEY}: {str(metadata)!r} is empty")
    red, green, blue = ImageColor.getrgb(background)[:3]
    return CaptionedImages([captions for captions, _ in rows], [file for _, file in rows], (red, green, blue))


def _row(folder: Path, line: str, number: int) -> tuple[dict[str, float], Path]:
    where = f"{str(folder / 'metadata.jsonl')!r} line {number}"
    try:
        row = json.loads(line)
        file, text = folder / row["file_name"], row["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{KEY}: {where} is not a JSON object with 'file_name' and 'text'") from error
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not texts or not all(isinstance(item, str) for item in texts):
        raise UserError(f"{KEY}: {where}: 'text' must be a caption or a list of captions")
    if not file.is_file():
        raise UserError(f"{KEY}: {where}: no file {str(file)!r}")
    captions: dict[str, float] = {}
    for item in texts:
        captions[item] = captions.get(item, 0.0) + 1 / len(texts)
    return captions, file


def _hash(source: Any) -> str:
    return hashlib.sha256(source.numpy().tobytes()).hexdigest() if isinstance(source, Tensor) else known_hash(source)


def _pixels(source: Any, resolution: int, background: Colour) -> Tensor:
    if isinstance(source, Tensor):
        if source.shape[-1] != resolution:
            raise UserError(f"{KEY}: these images are {source.shape[-1]} pixels wide, the teacher needs {resolution}")
        return source
    from torchvision.transforms.v2 import functional

    try:
        picture = read_rgb(source, background)
    except UNREADABLE as error:
        raise UserError(f"{KEY}: {str(source)!r} is not an image that can be read ({error})") from error
    square = functional.center_crop(picture, [min(picture.shape[-2:])] * 2)
    return (functional.resize(square, [resolution, resolution], antialias=True) / 127.5 - 1).clamp(-1, 1)
