"""Regression on noise-sample pairs: DMD's regulariser (Yin et al. 2024a, section 3.2) and DMD2's one-step warm-up (Yin et al. 2024b, appendix).

A pair (z, y) says where the teacher's deterministic sampler leads from noise z; a one-step student should land there too.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from fastgen import perceptual
from fastgen.config import MOST_STEPS
from fastgen.distillers import losses
from fastgen.distillers.base import Batch, Facts, Options, Setting
from fastgen.errors import UserError
from fastgen.sampling import Predict, few_step


class RegressionConfig(Options):
    """weight: beside the matching surrogate (DMD: 0.25 with lpips). metric: mean squared error of `latent`s, or `lpips` of the decoded
    pictures. warmup: student steps of regression alone before matching begins (DMD2's one-step SDXL: on 10,000 pairs)."""

    weight: float = Field(default=0.25, gt=0, le=1e6)
    metric: Literal["latent", "lpips"] = "latent"
    warmup: int = Field(default=0, ge=0, le=MOST_STEPS)


def check(config: RegressionConfig, facts: Facts) -> None:
    """UserError where the rest of a recipe does not fit, or where lpips cannot be loaded."""
    if facts.steps != 1:
        raise UserError(f"recipe key distiller.regression: a pair says where one step from noise leads, but student.steps is {facts.steps}")
    if config.warmup >= facts.train_steps:
        raise UserError(f"recipe key distiller.regression.warmup: {config.warmup} leaves none of train.steps {facts.train_steps}")
    if config.metric == "lpips":
        if facts.picture is not None and len(facts.picture) != 3:
            raise UserError(
                f"{perceptual.KEY}: lpips compares pictures (3, H, W), the teacher's samples are {facts.picture}; `latent` compares anything"
            )
        perceptual.load_lpips()


def steps_alone(config: RegressionConfig | None) -> int:
    """Student steps before matching begins."""
    return 0 if config is None else config.warmup


def regression_loss(student: Predict, batch: Batch, setting: Setting, config: RegressionConfig) -> Tensor:
    """Scalar distance between a one-step student's x0 at the pairs' noise and the pairs' samples, without the weight; fp32 or wider.

    The student is run as it is sampled: pure noise in, conditioned on the grid's own time, be that the noise end or not.
    """
    pairs = batch.pairs
    assert pairs is not None and len(setting.grid) == 1
    x0 = few_step(student, pairs.noise, setting.grid.to(pairs.noise.device), pairs.cond, renoise="euler")
    if config.metric == "latent":
        return losses.mean_squared_error(x0, pairs.x0)
    assert setting.decode is not None, "lpips needs a decoder"
    return perceptual.load_lpips(device=x0.device)(setting.decode(x0), setting.decode(pairs.x0)).mean()
