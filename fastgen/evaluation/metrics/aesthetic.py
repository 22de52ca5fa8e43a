"""LAION's aesthetic predictor (Schuhmann 2022), a small head on CLIP ViT-L/14 of which there are several, none of them in a package."""

from __future__ import annotations

from fastgen.evaluation.metrics.base import Heading
from fastgen.evaluation.metrics.external_process import ExternalMetric


class Aesthetic(ExternalMetric):
    """Mean over pictures of the predicted rating, about 1 to 10, as an external program computes it; prompts play no part."""

    shows = {"aesthetic": Heading("aesthetic", "↑")}  # noqa: RUF012
    install = "CLIP ViT-L/14 with the weights of improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE)"
    convention = "mean over pictures of the rating that an external program predicts"
