"""What is measured: a student, a teacher, any diffusers pipeline, or a folder of pictures that somebody has drawn already."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from fastgen.evaluation.protocol import SampleSet
from fastgen.fingerprints import digest


class Subject(ABC):
    """Draws the pictures of a protocol's sets. A picture depends on its prompt, its seed and its id alone, not on the others that are
    drawn with it (but by rounding), unless `record` says so."""

    name: Literal["student", "teacher", "pipeline", "pictures"]  # `model` in results.json
    steps: int | None = None  # None: pictures that lie there already
    guidance: float | None = None

    @property
    @abstractmethod
    def record(self) -> dict[str, Any]:
        """For results.json, plain JSON without paths: what is measured, and every setting that its pictures depend on."""

    @property
    @abstractmethod
    def content(self) -> str:
        """SHA-256 of the weights, or of the pictures."""

    @cached_property
    def identity(self) -> str:
        """SHA-256 of everything that the pictures depend on, beside prompts, seeds and ids: features are kept under it."""
        return digest([self.name, self.content, self.record])

    def check(self, sets: Mapping[str, SampleSet], *, whole: bool) -> None:
        """UserError, before anything is drawn, where these sets cannot be. whole: they are a protocol's whole sets, not a quick look's first
        pictures."""
        return

    @abstractmethod
    def draw(self, prompts: list[str], seeds: list[int], ids: Sequence[int]) -> Tensor:
        """Pictures (B, 3, H, W) on the CPU, floats in [0, 1] or uint8, one for each prompt, seed and id. NotFinite where one is none."""
