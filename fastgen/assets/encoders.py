"""Text encoders that have read the captions of the scenes: at each word that names a digit, they know its colour and where it stands.

Random encoders carry words and their order, but a teacher learns from them slowly which digit is meant: it draws the right colours in the right
places long before. So these learn to read first, without a picture, and are frozen then, as a real pipeline's are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgen.data import digits, scenes

STEPS, BATCH, LR = 400, 256, 3e-3
NOT_SAID = -1


class Mention(NamedTuple):
    """A digit's word in a caption: rows of COLOURS, of WORDS, and of RELATIONS to the other; NOT_SAID of what the caption leaves open."""

    colour: int
    digit: int
    relation: int


CLASSES = Mention(len(scenes.COLOURS) + 1, len(digits.WORDS), len(scenes.RELATIONS) + 1)


def mentions() -> dict[str, tuple[Mention, ...]]:
    """Every caption of the training scenes with what it says of its digits, in the order of its words."""
    found: dict[str, tuple[Mention, ...]] = {}
    of = scenes.training()
    for colours, shown, relation in zip(of.colours.tolist(), of.digits.tolist(), of.relations.tolist(), strict=True):
        one, other = (Mention(colour, digit, NOT_SAID) for colour, digit in zip(colours, shown, strict=True))
        two, coloured, named, mixed = scenes.open_captions(colours, shown)
        found[scenes.full_caption(colours, shown, relation)] = (one._replace(relation=relation), other._replace(relation=relation ^ 1))
        found |= {two: (), coloured: ()}
        found[named] = (one._replace(colour=NOT_SAID), other._replace(colour=NOT_SAID))
        found[mixed] = (other._replace(colour=NOT_SAID),)
    return found


def clip_tokens(encoder: Any, ids: Tensor) -> Tensor:
    """What SD3 takes from a CLIP encoder, (B, L, D): the last layer but one."""
    return encoder(ids, output_hidden_states=True).hidden_states[-2]


def t5_tokens(encoder: Any, ids: Tensor) -> Tensor:
    """What SD3 takes from T5, (B, L, D)."""
    return encoder(ids)[0]


class Examples(NamedTuple):
    """ids (N, L) of captions; for each mention the row of its caption, the place of its word there, and the classes (M, 3) that it is."""

    ids: Tensor
    rows: Tensor
    places: Tensor
    classes: Tensor


def examples(tokenizer: Any) -> Examples:
    """Every mention of every caption."""
    said = {text: own for text, own in mentions().items() if own}
    ids = tokenizer(list(said), padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    known = torch.tensor([tokenizer(word, add_special_tokens=False).input_ids[0] for word in digits.WORDS])
    rows, places = torch.isin(ids, known).nonzero(as_tuple=True)  # in the order of captions, and of words in each
    classes = torch.tensor([mention for own in said.values() for mention in own])
    return Examples(ids, rows, places, torch.where(classes == NOT_SAID, torch.tensor(CLASSES) - 1, classes))


def teach(encoder: Any, tokenizer: Any, tokens: Callable[[Any, Tensor], Tensor]) -> float:
    """Train the encoder, with the ambient generator, to tell each mention from the token of its digit's word; returns the last loss. A CLIP
    token knows only what was said before it."""
    ids, rows, places, classes = examples(tokenizer)
    heads = nn.Linear(tokens(encoder, ids[:1]).shape[-1], sum(CLASSES))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=LR)
    for _ in range(STEPS):
        drawn = torch.randint(len(rows), (BATCH,))
        found = heads(tokens(encoder, ids[rows[drawn]])[torch.arange(BATCH), places[drawn]])
        loss = torch.stack([nn.functional.cross_entropy(of, classes[drawn, i]) for i, of in enumerate(found.split(CLASSES, -1))]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.eval().requires_grad_(False)
    return loss.item()
