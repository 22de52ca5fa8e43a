"""The Vendi score (Friedman & Dieng 2023, arXiv:2210.02410): how many really different pictures there are among those of one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fastgen.evaluation.diversity import vendi_scores
from fastgen.evaluation.metrics.base import Feature, Heading, Measured, Metric, Needs, Unavailable, Value, feature
from fastgen.evaluation.metrics.picture_scores import mean_value

_LAYERS = {"inception": "pool3", "dinov2": "cls", "open_clip": "image", "digits_classifier": "features", "scenes_classifier": "features"}
_GROUPS = 256  # prompts that are read at a time


class Vendi(Metric):
    """Mean over prompts of the Vendi score of that prompt's pictures, with the cosine kernel: 1 where all are alike, at most per_prompt."""

    class Config(Metric.Config):
        """extractor: `inception` (pool3, as in the paper), `dinov2` (class token, as in dgm-eval), `open_clip` (picture embedding) or
        `digits_classifier`. options: of the extractor."""

        extractor: Literal["inception", "dinov2", "open_clip", "digits_classifier", "scenes_classifier"] = "inception"
        options: Mapping[str, str | int | float | bool | None] = {}

    shows = {"vendi": Heading("Vendi")}  # noqa: RUF012
    convention = "mean over prompts of exp(entropy of the eigenvalues of K / n), K the cosines of one prompt's n pictures, features not centred"

    def needs(self) -> Needs:
        return Needs({self.set: (self._feature,)})

    def measure(self, measured: Measured) -> list[Value]:
        return [mean_value("vendi", self.scores(measured)["vendi"], measured.sets[self.set])]

    def scores(self, measured: Measured) -> dict[str, Tensor]:
        """For each picture, the score of its prompt's pictures."""
        size = measured.sets[self.set].per_prompt
        if size < 2:
            raise Unavailable(f"needs several pictures of each prompt: give the set {self.set} per_prompt: 2 or more")
        blocks = measured.tables[self.set, self._feature].blocks(_GROUPS * size)
        return {"vendi": torch.cat([vendi_scores(block.flatten(1).unflatten(0, (-1, size))) for block in blocks]).repeat_interleave(size)}

    @property
    def _feature(self) -> Feature:
        return feature(self.config.extractor, _LAYERS[self.config.extractor], **self.config.options)
