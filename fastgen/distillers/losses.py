"""Losses that several methods share, in fp32 or wider."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastgen.path import Path, expand_time


def per_sample_mean(x: Tensor) -> Tensor:
    """Mean over everything but the batch: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Scalar MSE over all elements, fp32 or wider."""
    return (prediction - target).square().mean()


def charbonnier(difference: Tensor, c: float) -> Tensor:
    """sqrt(d^2 + c^2) - c of each element, the pseudo-Huber distance (as LCM's released code; Charbonnier et al. 1997): |d| far away, d^2/2c
    close by."""
    return (difference.square() + c**2).sqrt() - c


def log_variance_weighted(per_sample: Tensor, log_variance: Tensor) -> Tensor:
    """Scalar mean of e exp(-l) + l: least at l = log E[e | t], where every noise level counts the same (Karras et al. 2024, eq. 21).
    per_sample, log_variance: (B,)."""
    return (per_sample * torch.exp(-log_variance) + log_variance).mean()


def kl_weight(path: Path, t: Tensor, x: Tensor, s: Tensor | None = None) -> Tensor:
    """alpha_t alpha_t|s / sigma_t^2, shaped to broadcast against x: with it, and no normaliser, the surrogate's gradient is that of
    KL(q_t || p_t) (Yin et al. 2024a, eq. 7, written for mean predictions); t: (B,) with sigma > 0; s: (B,) where the samples stand,
    None for clean ones, with which it is alpha^2 / sigma^2."""
    alpha, sigma = path.coeffs(t)
    return expand_time(alpha * path.bridge(torch.zeros_like(t) if s is None else s, t)[0] / sigma**2, x)


MatchingWeight = Literal["normalised", "alpha", "kl"]


def matching_weight(name: MatchingWeight, path: Path, s: Tensor, t: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """Factor of mu_fake - mu_real, shaped to broadcast against x: `normalised` 1 / scale as DMD2's released code, `alpha` alpha_t / scale as
    DMD's eq. 8, `kl` the exact gradient's; scale: the normaliser."""
    if name == "kl":
        return kl_weight(path, t, x, s)
    return (expand_time(path.coeffs(t)[0], x) if name == "alpha" else 1) / scale


def normaliser(x: Tensor, real: Tensor) -> Tensor:
    """Per-sample mean |x - mu_real| over all other dimensions (Yin et al. 2024a, eq. 8, without its alpha factor, as DMD2's
    released code), shaped to broadcast. Floored at 1e-6: an exact match has a zero numerator too."""
    return expand_time(per_sample_mean((x - real).abs()).clamp(min=1e-6), x)


def distribution_matching_gradient(fake: Tensor, real: Tensor, weight: Tensor) -> Tensor:
    """g = weight (mu_fake - mu_real): the direction in x that raises KL(student || teacher); descend it. All (B, ...)."""
    return weight * (fake - real)


def surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient in x is gradient / numel: 1/2 mean (x - sg(x - g))^2 (Yin et al. 2024a, alg. 1)."""
    return 0.5 * mean_squared_error(x, (x - gradient).detach())
