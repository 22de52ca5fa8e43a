"""HPS v2.1, a preference model's score: comparable for the same prompts only, and with v2.1 only."""

from __future__ import annotations

from torch import Tensor

from fastgen.evaluation.extractors.open_clip_networks import Precision
from fastgen.evaluation.metrics.base import Feature, Heading, Measured, Needs, Options, feature
from fastgen.evaluation.metrics.picture_scores import PictureScores, column


class HpsV21(PictureScores):
    """scale · cosine, mean over pictures; `hpsv2.score` returns the cosine (about 0.2 to 0.35), the benchmark's tables have it times 100."""

    class Config(Options):
        set: str | None = None
        scale: float = 1.0
        antialias: bool = True
        precision: Precision = "fp32"

    shows = {"hps_v21": Heading("HPSv2.1", "↑", -1)}  # noqa: RUF012
    convention = "mean over pictures of scale * cosine; hpsv2's benchmark tables have scale 100"

    def needs(self) -> Needs:
        return Needs({self.set: (self._score,)})

    @property
    def _score(self) -> Feature:
        return feature("hps_v21", "score", antialias=self.config.antialias, precision=self.config.precision)

    def picture_scores(self, measured: Measured) -> Tensor:
        return self.config.scale * column(measured.tables[self.set, self._score])
