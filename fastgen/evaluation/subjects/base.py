"""What draws the pictures of an evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from fastgen.errors import UserError
from fastgen.evaluation.protocol import SampleSet
from fastgen.fingerprints import digest

_NAMES = ("source", "revision")  # of a record: what something is called, not what it is


class Subject(ABC):
    """Draws the pictures of a protocol's sets. A picture depends on its prompt, its seed and its id alone, not on the others that are
    drawn with it, but by rounding."""

    name: str  # `model` in results.json: student, teacher, pipeline, pictures; with the name of a sampler of ours behind it, student_fixed_noise
    steps: int | None = None  # None: pictures that lie there already, or a call that takes none
    guidance: float | None = None  # classifier-free, 1 is none; None: the model has none
    taught_by: str | None = None  # SHA-256 of the teacher that it is or was distilled from; None where nobody knows

    @property
    @abstractmethod
    def record(self) -> dict[str, Any]:
        """For results.json, plain JSON without paths: `source`, its name, and every setting that its pictures depend on."""

    @property
    @abstractmethod
    def content(self) -> str:
        """SHA-256 of the weights, or of the pictures."""

    @cached_property
    def identity(self) -> str:
        """SHA-256 of everything that the pictures depend on, beside prompts, seeds and ids: features are kept under it. The same model
        in another place, or under another name, is the same."""
        return digest([self.content, {key: value for key, value in self.record.items() if key not in _NAMES}])

    def at(self, steps: int) -> Subject:
        """The same model, whose weights are shared, with another number of steps. UserError where it cannot be had."""
        raise UserError(f"--steps: {steps}, but what is measured takes no steps")

    def beside(self) -> Subject | None:
        """The same model as only fastgen draws it, for rows of its own; None for one without. UserError where it has one that does not go with
        its steps."""
        return None

    def check(self, sets: Mapping[str, SampleSet], *, whole: bool) -> list[str]:
        """Before anything is drawn: a line each to warn of, such as prompts whose end is cut off. UserError where these sets cannot be drawn.
        whole: they are a protocol's whole sets, not a quick look's first pictures."""
        return []

    @abstractmethod
    def draw(self, prompts: list[str], seeds: list[int], ids: Sequence[int]) -> Tensor | list[Tensor]:
        """Pictures (B, 3, H, W) on the CPU, floats in [0, 1] or uint8, one for each prompt, seed and id, or uint8 ones (3, h, w), each of its own
        size. NotFinite where one is none."""
