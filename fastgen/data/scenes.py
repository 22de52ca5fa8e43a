"""The embedded scenes: two of scikit-learn's handwritten digits in different colours, one beside or above the other, on 16x16 pixels.

Beside each other the rows are free and the columns jitter by one, above each other the reverse; free places are at most `FREE` apart, so
that the centres of the colours tell the relation. Training scenes and those of the reference are made of different digits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.data import digits

SIZE, GLYPH = 16, 8
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
RELATIONS = ("left of", "right of", "above", "below")
COUNT, SEED = 20_000, 0  # of the training scenes
NUM_REFERENCE = 500  # digits that no training scene shows
FREE = 4

FULL = 0.6  # share of the caption that says everything; the open ones share the rest evenly, and the null prompt is the distiller's dropout
TWO = "two digits"


@dataclass(frozen=True)
class Scenes:
    """images (N, 3, 16, 16) fp32 in [-1, 1]; colours and digits (N, 2), subject first; relations (N,) of the subject to the other."""

    images: Tensor
    colours: Tensor
    digits: Tensor
    relations: Tensor

    def __len__(self) -> int:
        return len(self.images)


@functools.cache
def pools() -> tuple[Tensor, Tensor]:
    """Rows of scikit-learn's digits that training scenes, and those of the reference, are made of; stratified. The same writers are in both."""
    labels = digits.load_images()[1]
    return digits.split(labels, 1 - NUM_REFERENCE / len(labels), SEED)


@functools.cache
def training() -> Scenes:
    """The data set."""
    return make(COUNT, pools()[0], SEED)


def make(count: int, pool: Tensor, seed: int) -> Scenes:
    """`count` scenes of the digits in rows `pool`, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = digits.load_images()
    rows = pool[torch.randint(len(pool), (count, 2), generator=generator)]
    colours = torch.rand(count, len(COLOURS), generator=generator).argsort(1)[:, :2]
    relations = torch.randint(len(RELATIONS), (count,), generator=generator)
    glyphs = (images[:, 0] + 1) / 2
    pictures = compose(glyphs[rows], colours, corners(relations, generator))
    return Scenes(pictures * 2 - 1, colours, labels[rows], relations)


def corners(relations: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Upper left corners (N, 2, 2) of both digits, (row, column)."""
    count, room = len(relations), SIZE - GLYPH
    jitter = torch.randint(2, (count, 2), generator=generator)
    along = torch.stack([jitter[:, 0], room - jitter[:, 1]], 1)
    along = torch.where((relations % 2 == 1)[:, None], along.flip(1), along)
    first = torch.randint(room + 1, (count,), generator=generator)
    low, high = (first - FREE).clamp(min=0), (first + FREE).clamp(max=room)
    second = low + (torch.rand(count, generator=generator) * (high - low + 1)).long()
    across = torch.stack([first, second], 1)
    beside = (relations < 2)[:, None]
    return torch.stack([torch.where(beside, across, along), torch.where(beside, along, across)], 2)


def compose(glyphs: Tensor, colours: Tensor, corners: Tensor) -> Tensor:
    """Pictures (N, 3, 16, 16) in [0, 1]: glyphs (N, 2, 8, 8) in [0, 1] in colours (N, 2) at corners (N, 2, 2), the larger value where they meet."""
    inside = torch.arange(GLYPH)
    rows, columns = (corners[:, :, axis, None] + inside for axis in (0, 1))
    places = (rows[..., :, None] * SIZE + columns[..., None, :]).flatten(2)
    grey = torch.zeros(*corners.shape[:2], SIZE * SIZE).scatter_(2, places, glyphs.flatten(2)).unflatten(2, (1, SIZE, SIZE))
    paint = torch.tensor(list(COLOURS.values())).float()[colours]
    return (paint[..., None, None] * grey).amax(1)


def masses(images: Tensor) -> Tensor:
    """How much of each colour is where, (N, 4, 16, 16) >= 0, of images (N, 3, 16, 16) in [0, 1]; grey has none."""
    red, green, blue = images.unbind(1)
    parts = (red - torch.maximum(green, blue), green - torch.maximum(red, blue), blue - torch.maximum(red, green), torch.minimum(red, green) - blue)
    return torch.stack(parts, 1).clamp(min=0)


def moments(images: Tensor) -> Tensor:
    """(N, 4, 3) of each colour: its mass, and the sums of mass times row and mass times column."""
    mass, place = masses(images), torch.arange(SIZE).float()
    return torch.stack([mass.sum((2, 3)), mass.sum(3) @ place, mass.sum(2) @ place], 2)


def centres(moments: Tensor) -> Tensor:
    """Centre of mass (N, 4, 2) of each colour, (row, column); NaN where there is nothing of it."""
    return moments[..., 1:] / moments[..., :1]


def relation(one: Tensor, other: Tensor) -> Tensor:
    """The number in RELATIONS (N,) of centres (N, 2) to others, by the axis on which they are further apart; -1 of NaN."""
    rows, columns = (one - other).unbind(1)
    beside = columns.abs() >= rows.abs()
    found = torch.where(beside, (columns > 0).long(), 2 + (rows > 0).long())
    return torch.where((rows + columns).isnan(), -1, found)


def full_caption(colours: Sequence[int], shown: Sequence[int], related: int) -> str:
    """The caption that says everything: "a red three left of a blue seven"."""
    one, other = (f"a {tuple(COLOURS)[colour]} {digits.WORDS[digit]}" for colour, digit in zip(colours, shown, strict=True))
    return f"{one} {RELATIONS[related]} {other}"


def open_captions(colours: Sequence[int], shown: Sequence[int]) -> tuple[str, str, str, str]:
    """Captions that leave something open: all but how many, the digits, the colours, or half of both; and always the relation."""
    (red, blue), (three, seven) = ([tuple(COLOURS)[colour] for colour in colours], [_a(digits.WORDS[digit]) for digit in shown])
    return TWO, f"a {red} digit and a {blue} digit", f"{three} and {seven}", f"a {red} digit and {seven}"


def captions(colours: Sequence[int], shown: Sequence[int], related: int) -> dict[str, float]:
    """Every caption of a scene with its probability."""
    less = open_captions(colours, shown)
    return {full_caption(colours, shown, related): FULL, **dict.fromkeys(less, (1 - FULL) / len(less))}


def captions_of(scenes: Scenes) -> list[dict[str, float]]:
    """The captions of each scene."""
    return [captions(*each) for each in zip(scenes.colours.tolist(), scenes.digits.tolist(), scenes.relations.tolist(), strict=True)]


def _a(word: str) -> str:
    return f"{'an' if word == 'eight' else 'a'} {word}"


@functools.cache
def _prompts() -> dict[str, float]:
    table: dict[str, float] = {}
    for texts in captions_of(training()):
        for text, probability in texts.items():
            table[text] = table.get(text, 0.0) + probability / COUNT
    return table


def prompts() -> dict[str, float]:
    """Every caption of the training scenes with its probability: the prompt set that distillation draws from."""
    return dict(_prompts())
