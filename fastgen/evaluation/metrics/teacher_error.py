"""How far a student is from what its teacher makes of the same noise and prompt: the one metric that needs no other pictures and no weights."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fastgen.evaluation.metrics.base import Feature, Heading, Measured, Metric, Needs, Unavailable, Value, feature
from fastgen.evaluation.metrics.picture_scores import mean_value


class TeacherError(Metric):
    """Mean over pictures of the root mean square difference of pixels in [0, 1] between student and teacher, of pictures reduced to `size`."""

    class Config(Metric.Config):
        size: Annotated[int, Field(ge=1, le=4096)] = 64

    shows = {"teacher_error": Heading("error to teacher", "↓", 3)}  # noqa: RUF012
    convention = "mean over pictures of the root mean square difference of pixels in [0, 1] to the teacher's picture of the same seed and prompt"

    def needs(self) -> Needs:
        return Needs({self.set: (self._feature("rgb"), self._feature("size"))}, teacher=True)

    def measure(self, measured: Measured) -> list[Value]:
        return [mean_value("teacher_error", self.scores(measured)["teacher_error"], measured.sets[self.set])]

    def scores(self, measured: Measured) -> dict[str, Tensor]:
        teacher = self._teacher(measured)
        mine, theirs = (each.tables[self.set, self._feature("rgb")] for each in (measured, teacher))
        pairs = zip(mine.blocks(), theirs.blocks(), strict=True)
        return {"teacher_error": torch.cat([root_mean_square(one, other) for one, other in pairs])}

    def _teacher(self, measured: Measured) -> Measured:
        """The teacher's pictures; Unavailable unless they are of the same seeds, prompts and size."""
        if (teacher := measured.teacher) is None:
            raise Unavailable("needs the teacher's pictures")
        size = self._feature("size")
        if self.set not in teacher.sets or (self.set, size) not in teacher.tables or teacher.sets[self.set].hash != measured.sets[self.set].hash:
            raise Unavailable(f"needs the teacher's pictures of the same prompts and seeds, the set {self.set}")
        shapes = [" x ".join(str(int(side)) for side in each.tables[self.set, size].read(0, 1)[0].flip(0)) for each in (measured, teacher)]
        if shapes[0] != shapes[1]:
            raise Unavailable(f"compares pictures of one size: the teacher's have {shapes[1]} pixels (width x height), these have {shapes[0]}")
        return teacher

    def _feature(self, layer: str) -> Feature:
        return feature("thumbnails", layer, size=self.config.size)


def root_mean_square(one: Tensor, other: Tensor) -> Tensor:
    """(B,) fp64, of pictures (B, 3, H, W) uint8 as fractions of 255."""
    return ((one.double() - other.double()) / 255).square().flatten(1).mean(1).sqrt()
