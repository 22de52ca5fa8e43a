"""The adversarial terms of DMD2 (Yin et al. 2024b, section 4.3): real and generated samples told apart at equal noise levels.

Non-saturating losses on every head: D minimises softplus(D(fake)) + softplus(-D(real)), G minimises softplus(-D(fake)). Where the
student stops at s > 0 (phased distillation) its samples are carried on from there, so both sides have the law of the same level.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import mse_loss, softplus

from fastgen.conditioning import Conditioning, cat
from fastgen.config import MOST_STEPS
from fastgen.denoiser import Predictor
from fastgen.distillers.base import Options
from fastgen.path import Path
from fastgen.surgery.heads import Taps
from fastgen.timesteps import TimeSampling
from fastgen.unused import UsedWith, positive


class GANConfig(Options):
    """weight: of the student's adversarial loss beside the matching surrogate, both means over elements. features: whose blocks the
    heads listen to. `teacher` (default) is frozen, so the discriminator cannot bend the score estimate, and trains heads alone;
    `fake_score` is DMD2's own choice, in which the discriminator's loss also trains the fake score's network, weighted by
    fake_score_weight beside its denoising loss. taps: indices of blocks, or `auto` for those at 1/4, 1/2, 3/4. times: noise levels of
    the comparison. r1: weight of the approximate R1 penalty |D(x) - D(x + r1_noise n)|^2 on real data (Lin et al. 2025, APT, section
    3.3). start: student steps of matching (in each phase anew, as a phase has its own fake score) before the discriminator enters the
    student's loss; it trains from the first."""

    used_with: ClassVar[UsedWith] = {"fake_score_weight": ("features", ("fake_score",)), "r1_noise": ("r1", positive)}
    weight: float = Field(default=3e-3, gt=0, le=1e6)
    features: Literal["teacher", "fake_score"] = "teacher"
    taps: Taps = "auto"
    fake_score_weight: float = Field(default=1e-2, gt=0, le=1e6)
    times: TimeSampling = TimeSampling(lo=0.001, hi=1.0)
    r1: float = Field(default=0.0, ge=0, le=1e8)
    r1_noise: float = Field(default=0.1, gt=0, le=1e3)
    start: int = Field(default=0, ge=0, le=MOST_STEPS)

    @field_validator("taps")
    @classmethod
    def _taps_differ(cls, taps: Taps) -> Taps:
        if taps != "auto" and len(set(taps)) != max(1, len(taps)):
            raise ValueError("auto, or one block or more, each named once")
        return taps


def judgement(judge: Predictor, real: Tensor, fake: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
    """(logits of real, logits of fake), each (B, num_taps), of noised samples (B, ...) at the same times (B,), in one pass."""
    logits = judge.logits(torch.cat([real, fake]), torch.cat([t, t]), cat([cond, cond]))
    on_real, on_fake = logits.chunk(2)
    return on_real, on_fake


def discriminator_loss(on_real: Tensor, on_fake: Tensor) -> Tensor:
    """Scalar, the mean over samples and heads; logits (B, num_taps)."""
    return softplus(on_fake).mean() + softplus(-on_real).mean()


def generator_loss(on_fake: Tensor) -> Tensor:
    """Scalar, the mean over samples and heads; logits (B, num_taps)."""
    return softplus(-on_fake).mean()


def approximate_r1(judge: Predictor, path: Path, real: Tensor, eps: Tensor, disturbance: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """Mean squared change of the logits when real data (B, ...) move by `disturbance`, seen through the same noise at t (B,): to first
    order the squared slope along a random direction, without second derivatives. Zero for no disturbance."""
    before, after = judgement(judge, path.mix(real, eps, t), path.mix(real + disturbance, eps, t), t, cond)
    return mse_loss(after, before)


def log_ratio(logits: Tensor) -> Tensor:
    """log p(x_t) / q(x_t), real over generated (B,), of a discriminator at its optimum: the mean logit, within +-10."""
    return logits.mean(1).clamp(-10, 10)
