"""What protocol scenes draws: 2,000 prompts that say everything, and 5,000 open ones, a quarter of each kind.

Both follow the reference, scenes of digits that no training scene shows: prompt i of `full` is all of what scene i is, prompt i of `open`
one of the four open captions of scene i, in turn.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.data import scenes

NUM_OPEN, NUM_FULL = 5000, 2000
_KINDS = 4  # of open captions


class Meaning(NamedTuple):
    """colours and digits, subject first, and the relation of the subject to the other: numbers, as of `scenes.Scenes`."""

    colours: tuple[int, int]
    digits: tuple[int, int]
    relation: int


@functools.cache
def reference() -> scenes.Scenes:
    """The real scenes that pictures are compared with, of digits that are held out from the training scenes."""
    return held_out(1)


def held_out(seed: int) -> scenes.Scenes:
    """As many such scenes, from another seed."""
    return scenes.make(NUM_OPEN, scenes.pools()[1], seed)


def _said(of: scenes.Scenes) -> list[Meaning]:
    rows = zip(of.colours.tolist(), of.digits.tolist(), of.relations.tolist(), strict=True)
    return [Meaning((colours[0], colours[1]), (shown[0], shown[1]), related) for colours, shown, related in rows]


@functools.cache
def full() -> tuple[str, ...]:
    return tuple(scenes.full_caption(*each) for each in _said(reference())[:NUM_FULL])


@functools.cache
def open_prompts() -> tuple[str, ...]:
    said = _said(reference())
    return tuple(scenes.open_captions(each.colours, each.digits)[i % _KINDS] for i, each in enumerate(said))


@functools.cache
def meanings() -> dict[str, Meaning]:
    """What every prompt of `full` says."""
    return dict(zip(full(), _said(reference()), strict=False))


def meant(prompts: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Colours (N, 2), digits (N, 2) and relations (N,) that prompts of `full` ask for; KeyError for others."""
    colours, shown, related = zip(*(meanings()[prompt] for prompt in prompts), strict=True)
    return torch.tensor(colours), torch.tensor(shown), torch.tensor(related)


PROMPTS = {"full": full, "open": open_prompts}
