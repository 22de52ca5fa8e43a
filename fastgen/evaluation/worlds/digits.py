"""What protocol digits draws: 1,797 prompts that name the digit, and 1,797 open ones, half generic and half naming the parity.

Prompt i of `named` is template i mod 3 with the label of real image i. `open` holds 899 generic prompts, then 898 parity prompts whose even
share is the real images', each kind cycling its texts.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastgen.data import digits


@functools.cache
def images() -> Tensor:
    """All real images, (1797, 3, 8, 8) in [0, 1]."""
    return (digits.load_images()[0] + 1) / 2


@functools.cache
def labels() -> Tensor:
    """The digit of each real image, (1797,)."""
    return digits.load_images()[1]


@functools.cache
def parities() -> Tensor:
    """Parity (898,) of each parity prompt, even ones first, in the real images' proportion."""
    total = len(labels()) // 2
    odd = round(total * float((labels() % 2).double().mean()))
    return (torch.arange(total) >= total - odd).long()


@functools.cache
def named() -> tuple[str, ...]:
    return tuple(digits.NAMED[i % 3].format(digits.WORDS[label]) for i, label in enumerate(labels().tolist()))


@functools.cache
def open_prompts() -> tuple[str, ...]:
    generic = tuple(digits.GENERIC[i % 3] for i in range(num_generic()))
    return generic + tuple(digits.PARITY[odd][i % 2] for i, odd in enumerate(parities().tolist()))


def num_generic() -> int:
    """How many of the open prompts are generic; they come first."""
    return len(labels()) - len(parities())


@functools.cache
def described() -> dict[str, Tensor]:
    """Rows of the real images that each open prompt describes: all for a generic text, those of its parity for the others."""
    odd = labels() % 2
    generic = dict.fromkeys(digits.GENERIC, torch.arange(len(odd)))
    return generic | {text: torch.where(odd == p)[0] for p in (0, 1) for text in digits.PARITY[p]}


def digit_of(prompt: str) -> int:
    """The digit that a prompt of `named` names."""
    return _named_digits()[prompt]


def parity_of(prompt: str) -> int | None:
    """0 or 1, as a prompt of `open` names it; None of a generic one."""
    return next((parity for parity, texts in enumerate(digits.PARITY) if prompt in texts), None)


@functools.cache
def _named_digits() -> dict[str, int]:
    return {template.format(word): digit for template in digits.NAMED for digit, word in enumerate(digits.WORDS)}


PROMPTS = {"named": named, "open": open_prompts}
