"""Reward functions: a number for each generated picture and its prompt. Samples of high reward weigh more in the matching (Re-DMD).

A reward is any importable Python function (own_code.py). No gradient is taken through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from fastgen.assets.classifier import DigitClassifier, load_classifier
from fastgen.data import digits
from fastgen.errors import UserError
from fastgen.own_code import Named, absolute

KEY = "recipe key distiller.reward.name"
# (pixels (B, 3, H, W) in [0, 1], their prompts) -> rewards (B,), higher is better
Reward = Callable[[Tensor, Sequence[str]], Tensor]


class RewardConfig(BaseModel):
    """name: see `load_reward`. beta: how strongly the reward counts, its inverse temperature: a sample's weight is exp(beta reward)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    name: str
    beta: float = Field(default=2.0, gt=0, le=1e6)

    @field_validator("name")
    @classmethod
    def _holds_in_any_folder(cls, name: str) -> str:
        return absolute(name)


def log_weights(rewards: Tensor, beta: float) -> Tensor:
    """beta r, fp64 (B,): logarithms of the weights exp(beta r) (Re-DMD, arXiv:2512.04678, eq. 7), which only their normaliser may exponentiate
    after taking off the largest: a reward of 1,000 is nothing unusual."""
    return beta * rewards.double()


def _named(name: str) -> Named:
    return Named(KEY, name, "reward", ("pixels", "prompts"), ("digits",))


def load_reward(name: str) -> Reward:
    """The reward behind `fastgen:digits`, `module:function` or `path/to/file.py:function`; UserError for anything else.

    What it returns is checked at every call: UserError unless it is one finite number a picture.
    """
    named = _named(name)
    reward = named.load() if named.own() is None else DigitReward(load_classifier())

    @torch.no_grad()
    def checked(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        rewards = reward(pixels, prompts)
        if not isinstance(rewards, Tensor) or rewards.shape != (len(pixels),):
            what = f"a tensor {tuple(rewards.shape)}" if isinstance(rewards, Tensor) else f"a {type(rewards).__name__}"
            raise UserError(f"{KEY}: {name!r} returned {what} for {len(pixels)} pictures; a tensor ({len(pixels)},) is needed")
        if not bool(torch.isfinite(rewards).all()):
            raise UserError(f"{KEY}: {name!r} returned a reward that is not finite")
        return rewards.to(pixels.device)

    return checked


def check_reward(name: str, picture: Sequence[int] | None = None) -> None:
    """UserError where `load_reward` surely fails, or a bundled reward does not judge pictures of this shape; runs nothing of the user's."""
    named = _named(name)
    named.check()
    if named.own() is not None and picture is not None:
        _check_picture(picture)


def content(name: str) -> str:
    """What a reward is, wherever it lies."""
    return _named(name).content()


class DigitReward:
    """Log-probability, under the bundled classifier, that a picture (3, 8, 8) shows what its prompt names: the digit, or any of its parity.
    0 for prompts that name neither; UserError for those that are no captions of the digits, and for pictures of another size."""

    def __init__(self, classifier: DigitClassifier) -> None:
        self.classifier = classifier.requires_grad_(False)
        self.meant = _digits_meant()

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        _check_picture(pixels.shape[1:])
        unknown = [prompt for prompt in prompts if prompt not in self.meant]
        if unknown:
            raise UserError(f"{KEY}: fastgen:digits knows the captions of data.prompts: fastgen:digits only, not {unknown[0]!r}")
        log_probability = self.classifier.to(pixels.device)(2 * pixels.float() - 1).log_softmax(1)
        meant = torch.tensor([self.meant[prompt] for prompt in prompts], device=pixels.device)
        return log_probability.masked_fill(~meant, -torch.inf).logsumexp(1).clamp(max=0)  # the sum over all ten rounds to 1e-8


def _check_picture(shape: Sequence[int]) -> None:
    if tuple(shape) != (3, 8, 8):
        raise UserError(f"{KEY}: fastgen:digits judges pictures (3, 8, 8), the teacher's are {tuple(shape)}")


def _digits_meant() -> dict[str, list[bool]]:
    """For every caption, and the null prompt, the digits (10,) that it is true of."""
    captions = [digits.captions(digit) for digit in range(10)]
    return {"": [True] * 10} | {text: [text in table for table in captions] for table in captions for text in table}
