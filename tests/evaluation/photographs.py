"""Real photographs that scikit-learn and scikit-image ship, cut into pieces, and copies of them that are worse in a known way."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageFilter

# What is to be seen on them, and the package and file of each.
PHOTOGRAPHS = {
    "a temple in China": ("sklearn", "datasets/images/china.jpg"),
    "a flower": ("sklearn", "datasets/images/flower.jpg"),
    "an astronaut": ("skimage", "data/astronaut.png"),
    "a cup of coffee": ("skimage", "data/coffee.png"),
    "a cat": ("skimage", "data/chelsea.png"),
    "a motorcycle": ("skimage", "data/motorcycle_left.png"),
}
GRID = (4, 4)  # pieces across and down


class Piece(NamedTuple):
    """A square that has been cut out, and what the photograph shows."""

    image: Image.Image
    prompt: str


def photograph(prompt: str) -> Image.Image:
    """The picture; the test is skipped where its package is not installed, or brings none."""
    package, name = PHOTOGRAPHS[prompt]
    found = importlib.util.find_spec(package)
    path = Path(found.origin or "").parent / name if found else None
    if path is None or not path.is_file():
        pytest.skip(f"{package} is not installed, or brings no {name}")
    return Image.open(path).convert("RGB")


def halves(each: int, side: int) -> tuple[list[Piece], list[Piece]]:
    """Two sets of pieces with nothing in common, `each` of every photograph side by side in both, side · side pixels: fields of a chess board that is
    laid on the photograph, the black ones and the white ones."""
    black: list[Piece] = []
    white: list[Piece] = []
    for prompt in PHOTOGRAPHS:
        pieces = [Piece(piece, prompt) for piece in _pieces(photograph(prompt), side)]
        columns, rows = GRID
        is_black = [(column + row) % 2 == 0 for row in range(rows) for column in range(columns)]
        black += _spread([piece for piece, chosen in zip(pieces, is_black, strict=True) if chosen], each)
        white += _spread([piece for piece, chosen in zip(pieces, is_black, strict=True) if not chosen], each)
    return black, white


def _pieces(image: Image.Image, side: int) -> list[Image.Image]:
    columns, rows = GRID
    width, height = image.width / columns, image.height / rows
    square = min(width, height)
    corners = [(column * width + (width - square) / 2, row * height + (height - square) / 2) for row in range(rows) for column in range(columns)]
    return [image.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + square, top + square)) for left, top in corners]


def _spread(pieces: list[Piece], count: int) -> list[Piece]:
    return [pieces[index * len(pieces) // count] for index in range(count)]


def blurred(pieces: Sequence[Piece], radius: float) -> list[Piece]:
    return _each(pieces, lambda image: image.filter(ImageFilter.GaussianBlur(radius)))


def noisy(pieces: Sequence[Piece], deviation: float) -> list[Piece]:
    random = np.random.default_rng(0)

    def change(image: Image.Image) -> Image.Image:
        levels = np.asarray(image)
        return Image.fromarray(np.clip(levels + random.normal(0, deviation, levels.shape), 0, 255).astype(np.uint8))

    return _each(pieces, change)


def discoloured(pieces: Sequence[Piece]) -> list[Piece]:
    """Red becomes green, green blue and blue red."""
    return _each(pieces, lambda image: Image.fromarray(np.asarray(image)[..., [2, 0, 1]]))


def enlarged(pieces: Sequence[Piece]) -> list[Piece]:
    """The middle of each, a quarter of its area."""

    def change(image: Image.Image) -> Image.Image:
        width, height = image.size
        return image.resize(image.size, Image.Resampling.BICUBIC, (width / 4, height / 4, width * 3 / 4, height * 3 / 4))

    return _each(pieces, change)


def repeated(pieces: Sequence[Piece], each: int) -> list[Piece]:
    """Of each photograph one piece, `each` times: every prompt has one mode left."""
    return [pieces[index // each * each] for index in range(len(pieces))]


def _each(pieces: Sequence[Piece], change: Callable[[Image.Image], Image.Image]) -> list[Piece]:
    return [piece._replace(image=change(piece.image)) for piece in pieces]


def write(pieces: Sequence[Piece], folder: Path, *, quality: int | None = None) -> Path:
    """PNGs, or JPEGs of this quality, with their prompts beside them."""
    folder.mkdir()
    names = [f"{index}.{'png' if quality is None else 'jpg'}" for index in range(len(pieces))]
    for name, piece in zip(names, pieces, strict=True):
        piece.image.save(folder / name, quality=quality or 75)  # which PNGs have none of
    rows = [{"file_name": name, "prompt": piece.prompt} for name, piece in zip(names, pieces, strict=True)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
