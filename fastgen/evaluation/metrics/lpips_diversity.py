"""How different the pictures of one prompt are from each other, by LPIPS: what DMD2 and others report as diversity."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.evaluation.metrics.base import Feature, Heading, Measured, Metric, Needs, Unavailable, Value, feature
from fastgen.evaluation.metrics.picture_scores import mean_value


class LpipsDiversity(Metric):
    """Mean over prompts of the mean LPIPS over all pairs of that prompt's pictures."""

    class Config(Metric.Config):
        """As of the extractor `lpips`: DMD2's convention is `size: 512, range: unit`."""

        net: Literal["alex", "vgg"] = "alex"
        size: Annotated[int, Field(ge=64, le=4096)] | None = None
        range: Literal["signed", "unit"] = "signed"

    shows = {"lpips_diversity": Heading("LPIPS diversity", "", 3)}  # noqa: RUF012
    convention = "mean over prompts of mean pairwise LPIPS of pictures of the same prompt"

    def needs(self) -> Needs:
        return Needs({self.set: (self._pairs,)})

    def measure(self, measured: Measured) -> list[Value]:
        return [mean_value("lpips_diversity", self.scores(measured)["lpips_diversity"], measured.sets[self.set])]

    def scores(self, measured: Measured) -> dict[str, Tensor]:
        """For each picture, the mean of its distances to the others of its prompt."""
        size = measured.sets[self.set].per_prompt
        if size < 2:
            raise Unavailable(f"needs several pictures of each prompt: give the set {self.set} per_prompt: 2 or more")
        return {"lpips_diversity": torch.cat([block.double().sum(1) / (size - 1) for block in measured.tables[self.set, self._pairs].blocks()])}

    @property
    def _pairs(self) -> Feature:
        return feature("lpips", "pairs", net=self.config.net, size=self.config.size, range=self.config.range)
