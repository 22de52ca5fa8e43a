"""Closed-form teachers in float64, written from the definitions: noising schedules, exact predictions, exact ODE maps.

Nothing here imports fastgen. Derivatives of schedules and of log densities come from autograd, posterior means from Tweedie's
formula, so that no formula of the package is compared with itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

KINDS = ("x0", "eps", "v", "velocity", "score")


@dataclass(frozen=True)
class Schedule:
    """alpha(t), sigma(t) as plain functions of float64 times; `end` is the noise end of the tested range, `pure` if alpha is 0 there."""

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    end: float
    pure: bool

    def at(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) broadcast against x; t: (B,), or (B, T) along the third dimension of x (B, C, T, H, W)."""
        return _like(self.alpha(t), x), _like(self.sigma(t), x)

    def slope(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(d alpha/dt, d sigma/dt) by autograd, broadcast against x."""
        return _like(derivative(self.alpha, t), x), _like(derivative(self.sigma, t), x)

    def noisy(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps


def derivative(f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Elementwise df/dt."""
    with torch.enable_grad():
        t = t.detach().clone().requires_grad_()
        value = f(t) + 0 * t
        return torch.autograd.grad(value.sum(), t)[0]


def _like(value: Tensor, x: Tensor) -> Tensor:
    if value.ndim == 2:
        return value.reshape(value.shape[0], 1, value.shape[1], 1, 1)
    return value.reshape(-1, *[1] * (x.ndim - 1))


def _vp_alpha(t: Tensor) -> Tensor:
    """exp(-1/2 integral of beta), beta linear from 0.1 to 20 (Song et al. 2021, appendix C)."""
    return torch.exp(-0.5 * (0.1 * t + 19.9 * t**2 / 2))


def discrete(betas: Tensor) -> Schedule:
    """Of a chain of fp32 betas (N,): alpha-bar is their running product at t = k/N, geometric between, the root linear where it ends at 0."""
    bars = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0).double()])
    count, pure = len(betas), bars[-1].item() == 0

    def alpha(t: Tensor) -> Tensor:
        index = (t.detach() * count).floor().long().clamp(0, count - 1)
        share, before, after = t * count - index, bars[index], bars[index + 1]
        geometric = before ** (1 - share) * torch.where(after == 0, 1.0, after) ** share
        return torch.where(after == 0, before.sqrt() * (1 - share), geometric.sqrt())

    return Schedule(alpha, lambda t: torch.sqrt(1 - alpha(t) ** 2), 1.0, pure)


BETAS = torch.linspace(0.01, 0.5, 37)  # a number of steps that round times are none of
PURE_BETAS = torch.cat([BETAS, torch.ones(1)])

SCHEDULES = {
    "Flow": Schedule(lambda t: 1 - t, lambda t: t, 1.0, True),
    "TrigFlow": Schedule(torch.cos, torch.sin, math.pi / 2, True),
    "VariancePreserving": Schedule(_vp_alpha, lambda t: torch.sqrt(1 - _vp_alpha(t) ** 2), 1.0, False),
    "VarianceExploding": Schedule(torch.ones_like, lambda t: t, 80.0, False),
    "DiscreteVP": discrete(BETAS),
    "DiscreteVP to noise": discrete(PURE_BETAS),
}


def kind_of(kind: str, x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """What a network of `kind` outputs when its x0 and eps are these."""
    alpha, sigma = schedule.at(t, x0)
    slope_alpha, slope_sigma = schedule.slope(t, x0)
    return {
        "x0": lambda: x0 + 0 * eps,
        "eps": lambda: eps + 0 * x0,
        "v": lambda: alpha * eps - sigma * x0,
        "velocity": lambda: slope_alpha * x0 + slope_sigma * eps,
        "score": lambda: -eps / sigma,
    }[kind]()


def log_density(x: Tensor, alpha: Tensor, sigma: Tensor, weights: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """log sum_k w_k N(x; alpha m_k, alpha^2 S_k + sigma^2 I), (B,); x: (B, D), alpha and sigma: (B, 1)."""
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    covariance = alpha[:, :, None, None] ** 2 * covariances + sigma[:, :, None, None] ** 2 * eye
    parts = MultivariateNormal(alpha[:, :, None] * means, covariance).log_prob(x[:, None])
    return torch.logsumexp(weights.log() + parts, 1)


def mixture_score(x: Tensor, t: Tensor, schedule: Schedule, weights: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """grad log p_t(x) of a Gaussian mixture, (B, D): autograd of the log density."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(log_density(x, *schedule.at(t, x), weights, means, covariances).sum(), x)[0]


def mixture_posterior_mean(x: Tensor, t: Tensor, schedule: Schedule, weights: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """E[x0 | x_t = x] by Tweedie's formula, (x + sigma^2 score)/alpha; needs alpha > 0."""
    alpha, sigma = schedule.at(t, x)
    return (x + sigma**2 * mixture_score(x, t, schedule, weights, means, covariances)) / alpha


def mixture_prediction(kind: str, x: Tensor, t: Tensor, schedule: Schedule, weights: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """The exact prediction of every kind, (B, D); needs alpha > 0 and sigma > 0."""
    x0 = mixture_posterior_mean(x, t, schedule, weights, means, covariances)
    eps = -schedule.at(t, x)[1] * mixture_score(x, t, schedule, weights, means, covariances)
    return kind_of(kind, x0, eps, t, schedule)


def gaussian_posterior_mean(x: Tensor, t: Tensor, schedule: Schedule, mean: Tensor, covariance: Tensor) -> Tensor:
    """E[x0 | x_t = x] = m + alpha S (alpha^2 S + sigma^2 I)^-1 (x - alpha m), (B, D); holds at alpha = 0 too. Differentiable."""
    alpha, sigma = schedule.at(t, x)
    noisy = alpha[..., None] ** 2 * covariance + sigma[..., None] ** 2 * torch.eye(len(mean), dtype=x.dtype)
    return mean + alpha * (covariance @ torch.linalg.solve(noisy, x - alpha * mean)[..., None]).squeeze(-1)


def gaussian_prediction(kind: str, x: Tensor, t: Tensor, schedule: Schedule, mean: Tensor, covariance: Tensor) -> Tensor:
    """The exact prediction of every kind for N(mean, covariance), (B, D); needs sigma > 0. Differentiable in x."""
    alpha, sigma = schedule.at(t, x)
    x0 = gaussian_posterior_mean(x, t, schedule, mean, covariance)
    return kind_of(kind, x0, (x - alpha * x0) / sigma, t, schedule)


def gaussian_score(x: Tensor, t: Tensor, schedule: Schedule, mean: Tensor, covariance: Tensor) -> Tensor:
    """-(alpha^2 S + sigma^2 I)^-1 (x - alpha m), (B, D)."""
    alpha, sigma = schedule.at(t, x)
    noisy = alpha[..., None] ** 2 * covariance + sigma[..., None] ** 2 * torch.eye(len(mean), dtype=x.dtype)
    return -torch.linalg.solve(noisy, x - alpha * mean)


def gaussian_ode_map(x: Tensor, t: float, s: float, schedule: Schedule, mean: Tensor, covariance: Tensor) -> Tensor:
    """Where the probability-flow ODE takes x (B, D) from time t to s: each principal axis keeps its standardised coordinate."""
    values, axes = torch.linalg.eigh(covariance)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        (schedule.alpha(u), schedule.sigma(u)) for u in (torch.tensor(t, dtype=torch.float64), torch.tensor(s, dtype=torch.float64))
    )
    stretch = torch.sqrt((alpha_s**2 * values + sigma_s**2) / (alpha_t**2 * values + sigma_t**2))
    return alpha_s * mean + ((x - alpha_t * mean) @ axes * stretch) @ axes.T
