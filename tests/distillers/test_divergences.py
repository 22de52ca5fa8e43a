"""Every row of f-distill's table against quadrature: T3 and T4 of the notes."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import derivative
from torch import Tensor
from torch.distributions import Normal

from fastgen.distillers.divergences import DIVERGENCES, Name

# d D_f(p || q)/dm at m = .3, computed elsewhere (notes, T3)
KNOWN: dict[Name, float] = {
    "reverse_kl": 0.25719, "forward_kl": 0.73096, "js": 0.16466, "squared_hellinger": 0.09762, "jeffreys": 0.98815, "softened_reverse_kl": 0.09253,
}  # fmt: skip


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_mixture(x: Tensor, alpha: float, sigma: float, weights: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """log density (N,) at x (N,) of a noised mixture."""
    parts = Normal(alpha * means, (alpha**2 * variances + sigma**2).sqrt()).log_prob(x[:, None])
    return torch.logsumexp(weights.log() + parts, 1)


ALPHA, SIGMA = 0.6, 0.5
TEACHER = double(0.6, 0.4), double(-1.5, 1.0), double(0.2, 0.3)
X = torch.linspace(-9, 9, 6001, dtype=torch.float64)
STEP = (X[1] - X[0]).item()


def log_densities(m: float) -> tuple[Tensor, Tensor]:
    """(log p, log q) on the grid for the student N(m, .4)."""
    return log_mixture(X, ALPHA, SIGMA, *TEACHER), log_mixture(X, ALPHA, SIGMA, double(1), double(m), double(0.4))


def divergence(name: Name, m: float) -> float:
    log_p, log_q = log_densities(m)
    return (log_q.exp() * DIVERGENCES[name].f((log_p - log_q).exp())).sum().item() * STEP


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_factor_turns_the_gradient_of_the_reverse_kl_into_that_of_the_divergence(name: Name) -> None:
    """T3: central differences of D_f in the student's mean, and -E_q[h(r) alpha (s_p - s_q)]."""
    log_p, log_q = log_densities(0.3)
    score_p = derivative(lambda x: log_mixture(x, ALPHA, SIGMA, *TEACHER), X)
    score_q = derivative(lambda x: log_mixture(x, ALPHA, SIGMA, double(1), double(0.3), double(0.4)), X)
    gradient = -(log_q.exp() * DIVERGENCES[name].h((log_p - log_q).exp()) * ALPHA * (score_p - score_q)).sum().item() * STEP
    central = (divergence(name, 0.3 + 1e-5) - divergence(name, 0.3 - 1e-5)) / 2e-5
    assert gradient == pytest.approx(central, rel=1e-6, abs=1e-6)
    if name in KNOWN:
        assert gradient == pytest.approx(KNOWN[name], abs=5e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_factor_is_the_curvature_times_the_squared_ratio(name: Name) -> None:
    r = torch.logspace(-3, 3, 61, dtype=torch.float64)
    second = derivative(lambda u: _slope(name, u), r)
    torch.testing.assert_close(DIVERGENCES[name].h(r), r**2 * second, rtol=1e-8, atol=1e-10)
    assert bool((second > 0).all())
    assert DIVERGENCES[name].f(double(1)).item() == pytest.approx(0, abs=1e-15)


def _slope(name: Name, r: Tensor) -> Tensor:
    return torch.autograd.grad(DIVERGENCES[name].f(r).sum(), r, create_graph=True)[0]


LINE = torch.linspace(-7, 7, 1001, dtype=torch.float64)
MODES = double(0.5, 0.5), double(-2, 2), double(0.09, 0.09)


def optimum(name: Name, times: tuple[float, ...]) -> tuple[float, float]:
    """(m, s) of the student N(m, s^2) that Adam finds from (.7, 1) along -E_q[h(r) alpha (s_p - s_q) dx/d(m, log s)], mean over times.

    Flow; x = m + s z, and z given x_t is alpha s (x_t - alpha m)/(alpha^2 s^2 + t^2) on average. q h(r), with r up to e^600, keeps the
    mass of p where q is nearly 0.
    """
    parameters = torch.tensor([0.7, 0.0], dtype=torch.float64)
    optimizer = torch.optim.Adam([parameters], lr=0.02)
    known = [(t, log_mixture(LINE, 1 - t, t, *MODES), derivative(lambda x, t=t: log_mixture(x, 1 - t, t, *MODES), LINE)) for t in times]
    width = (LINE[1] - LINE[0]).item() / len(times)
    for _ in range(1500):
        m, s = parameters[0].item(), parameters[1].exp().item()
        gradient = torch.zeros(2, dtype=torch.float64)
        for t, log_p, score_p in known:
            whole = ((1 - t) * s) ** 2 + t**2
            away = (LINE - (1 - t) * m) / whole
            log_q = -0.5 * (away**2 * whole + math.log(2 * math.pi * whole))
            factor = log_q.exp() * DIVERGENCES[name].h((log_p - log_q).clamp(-600, 600).exp())
            pull = -width * factor * (1 - t) * (score_p + away)
            gradient += torch.stack([pull.sum(), (pull * s * (1 - t) * s * away).sum()])
        parameters.grad = gradient
        optimizer.step()
    return parameters[0].item(), parameters[1].exp().item()


ALL_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
HIGH = (0.9,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("times", "name", "covers"),
    [
        *((times, "reverse_kl", False) for times in ((0.02,), ALL_LEVELS)),
        ((0.02,), "softened_reverse_kl", False),
        *((times, name, True) for times in ((0.02,), ALL_LEVELS, HIGH) for name in ("js", "squared_hellinger", "forward_kl")),
        *((HIGH, name, True) for name in ("reverse_kl", "softened_reverse_kl", "jeffreys")),
    ],
)
def test_which_divergences_cover_both_modes(times: tuple[float, ...], name: Name, covers: bool) -> None:
    """T4, 1/2 N(+-2, .3^2): the reverse KL takes one mode unless only high noise is matched, where every divergence covers both."""
    m, s = optimum(name, times)
    if covers:
        assert abs(m) < 0.1 and s > 1.8
    else:
        assert abs(m) > 1.5 and s < 0.5
