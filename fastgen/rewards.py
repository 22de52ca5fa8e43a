"""Reward functions: a number for each generated picture and its prompt. Samples of high reward weigh more in the matching (Re-DMD).

A reward is any importable Python function. A plan reads its file without running it (`check_reward`); building a run imports it
(`load_reward`), which runs its module. No gradient is taken through it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from fastgen import static
from fastgen.assets.classifier import DigitClassifier, load_classifier
from fastgen.data import digits
from fastgen.errors import UserError, nearest
from fastgen.files import expanded
from fastgen.fingerprints import digest, known_hash

KEY = "recipe key distiller.reward.name"
# (pixels (B, 3, H, W) in [0, 1], their prompts) -> rewards (B,), higher is better
Reward = Callable[[Tensor, Sequence[str]], Tensor]


class RewardConfig(BaseModel):
    """name: see `load_reward`. beta: how strongly the reward counts, its inverse temperature: a sample's weight is exp(beta reward)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    name: str
    beta: float = Field(default=2.0, gt=0)

    @field_validator("name")
    @classmethod
    def _holds_in_any_folder(cls, name: str) -> str:
        """A file that exists is named by its absolute path, which a resumed run finds from anywhere."""
        source, colon, function = name.rpartition(":")
        file = expanded(source)
        return f"{file.resolve()}:{function}" if colon and file.suffix == ".py" and file.is_file() else name


def log_weights(rewards: Tensor, beta: float) -> Tensor:
    """beta r, fp64 (B,): logarithms of the weights exp(beta r) (Re-DMD, arXiv:2512.04678, eq. 7), which only their normaliser may exponentiate
    after taking off the largest: a reward of 1,000 is nothing unusual."""
    return beta * rewards.double()


def load_reward(name: str) -> Reward:
    """The reward behind `fastgen:digits`, `module:function` or `path/to/file.py:function`; UserError for anything else.

    What it returns is checked at every call: UserError unless it is one finite number a picture.
    """
    source, function = _parts(name)
    reward = _bundled(function) if source == "fastgen" else _own(name, _module(name, source), function)

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
    source, function = _parts(name)
    if source == "fastgen":
        _check_bundled(function)
        if picture is not None:
            _check_picture(picture)
        return
    file = _located(name, source)
    if file is None or file.suffix != ".py":
        return
    try:
        static.check_function(static.parse(file), function, 2)
    except SyntaxError as error:
        raise UserError(f"{KEY}: {name!r}: cannot import {source!r} ({type(error).__name__}: {error})") from error
    except OSError as error:
        raise UserError(f"{KEY}: {name!r}: cannot read {str(file)!r} ({error.strerror})") from error
    except static.Unfit as error:
        what = f"{source} {error}" if str(error).startswith("has no") else f"no function of (pixels, prompts): {error}"
        raise UserError(f"{KEY}: {name!r}: {what}") from error


def content(name: str) -> str:
    """What a reward is, wherever it lies: SHA-256 of its function's name and of the file of its module; a bundled one is its name."""
    source, function = _parts(name)
    file = None if source == "fastgen" else _located(name, source)
    return name if file is None else digest([function, known_hash(file)])


def _parts(name: str) -> tuple[str, str]:
    """What is left and right of the colon."""
    source, colon, function = name.rpartition(":")
    if not colon or not source or not function:
        raise UserError(f"{KEY}: {name!r} is none of fastgen:digits, module:function, path/to/file.py:function")
    return source, function


def _located(name: str, source: str) -> Path | None:
    """The file of a reward's module; None where it has none, or where only an import can tell."""
    file = Path(source).expanduser()
    if file.suffix == ".py":
        if not file.is_file():
            raise UserError(f"{KEY}: {name!r}: no file {source!r}")
        return file
    try:
        return static.source_file(static.find_module(source))
    except (ImportError, ValueError) as error:
        raise UserError(f"{KEY}: {name!r}: cannot import {source!r} ({type(error).__name__}: {error})") from error


def _check_bundled(name: str) -> None:
    if name != "digits":
        raise UserError(f"{KEY}: no bundled reward {'fastgen:' + name!r}; {nearest(name, ['digits'])}")


def _bundled(name: str) -> Reward:
    _check_bundled(name)
    return DigitReward(load_classifier())


def _module(name: str, source: str) -> ModuleType:
    file = expanded(source)
    if file.suffix == ".py" and not file.is_file():
        raise UserError(f"{KEY}: {name!r}: no file {source!r}")
    try:
        return _from_file(file) if file.suffix == ".py" else importlib.import_module(source)
    except Exception as error:  # the user's own code runs here and may raise anything
        raise UserError(f"{KEY}: {name!r}: cannot import {source!r} ({type(error).__name__}: {error})") from error


def _from_file(file: Path) -> ModuleType:
    return _executed(file.resolve(), file.stat().st_mtime_ns)


@lru_cache
def _executed(file: Path, changed: int) -> ModuleType:
    """A file run once as long as it does not change: it may load a model."""
    spec = importlib.util.spec_from_file_location(f"fastgen_reward_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def _own(name: str, module: ModuleType, function: str) -> Callable[..., Any]:
    found: Any = getattr(module, function, None)
    if found is None:
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{KEY}: {name!r}: {module.__name__} has no {function!r}; {nearest(function, functions)}")
    if not callable(found):
        raise UserError(f"{KEY}: {name!r} is a {type(found).__name__}, not a function of (pixels, prompts)")
    try:
        inspect.signature(found).bind(None, None)
    except TypeError as error:
        raise UserError(f"{KEY}: {name!r} is no function of (pixels, prompts): {error}") from error
    except ValueError:  # some builtins do not tell
        pass
    return found


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
