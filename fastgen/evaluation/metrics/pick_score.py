"""PickScore, a preference model's score: comparable for the same prompts only."""

from __future__ import annotations

from torch import Tensor

from fastgen.evaluation.metrics.base import Heading, Measured, Needs, feature
from fastgen.evaluation.metrics.picture_scores import PictureScores, column

SCORE = feature("pick_score", "score")


class PickScore(PictureScores):
    """exp(logit scale) · cosine, mean over pictures, as the authors' example computes it."""

    shows = {"pick_score": Heading("PickScore", "↑")}  # noqa: RUF012
    convention = "mean over pictures of exp(logit_scale) * cosine"

    def needs(self) -> Needs:
        return Needs({self.set: (SCORE,)})

    def picture_scores(self, measured: Measured) -> Tensor:
        return column(measured.tables[self.set, SCORE])
