"""The distribution-matching direction: which way the student's samples move so that their noised law becomes the teacher's.

With x_t drawn from p(x_t | x_s), the gradient of KL(q_t || p_t) in x_s is alpha_t|s (score_fake - score_real), which is
(alpha_t alpha_t|s / sigma_t^2)(mu_fake - mu_real) in mean predictions of x0. s = 0 is the ordinary case of clean samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.conditioning import Conditioning
from fastgen.denoiser import both_ways
from fastgen.distillers import losses
from fastgen.distillers.base import Options, Setting
from fastgen.distillers.losses import MatchingWeight
from fastgen.guidance import linear
from fastgen.sampling import Predict
from fastgen.timesteps import TimeSampling

_QUARTERS = 4


class DecoupledConfig(Options):
    """times: noise levels at which the guidance part is matched, squeezed below the student's current step: there is nothing to sharpen
    in what is not yet resolved (Decoupled DMD, arXiv:2511.22677)."""

    times: TimeSampling = TimeSampling(lo=0.02, hi=0.98)


class Matched(NamedTuple):
    """gradient (B, ...) in the student's sample; normaliser (B,) and gap (B,) = mean |mu_fake - mu_real|, for the logs; x_t and t."""

    gradient: Tensor
    normaliser: Tensor
    gap: Tensor
    noised: Tensor
    t: Tensor


def matching_gradient(
    real: Predict, fake: Predict, noised: Tensor, x0: Tensor, s: Tensor, t: Tensor, cond: Conditioning, weight: MatchingWeight
) -> Matched:
    """weight (mu_fake - mu_real) at noised (B, ...), t (B,) path time, of samples that stand at s (B,); x0: the student's own prediction."""
    mean_real, mean_fake = real(noised, t, cond), fake(noised, t, cond)
    scale = losses.normaliser(x0, mean_real)
    factor = losses.matching_weight(weight, real.path, s, t, scale, noised)
    gradient = losses.distribution_matching_gradient(mean_fake, mean_real, factor)
    return Matched(gradient, scale.flatten(), losses.per_sample_mean((mean_fake - mean_real).abs()), noised, t)


def guidance_gradient(
    teacher: Predict, noised: Tensor, x0: Tensor, s: Tensor, t: Tensor, cond: Conditioning, setting: Setting, weight: MatchingWeight
) -> Tensor:
    """-weight (w - 1)(mu_cond - mu_negative): what guidance adds to the real score, at noise levels t (B,) of its own.

    At the matching's own x_t and with an unnormalised weight, the sum of both parts is the guided matching gradient.
    """
    given, without = both_ways(teacher, noised, t, cond, setting.negative)
    scale = losses.normaliser(x0, linear(given, without, setting.guidance))
    return -losses.matching_weight(weight, teacher.path, s, t, scale, noised) * (setting.guidance - 1) * (given - without)


def loss_by_time(error: Tensor, fraction: Tensor) -> dict[str, Tensor]:
    """Per-sample values (B,) for the logs loss_t0 (nearest data) to loss_t3: those of the quarter their time (B,) in [0, 1] is in."""
    quarter = (fraction * _QUARTERS).long().clamp(max=_QUARTERS - 1)
    return {f"loss_t{i}": torch.where(quarter == i, error, torch.nan) for i in range(_QUARTERS)}
