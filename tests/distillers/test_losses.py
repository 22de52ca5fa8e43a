"""The distribution-matching gradient against the KL divergence it claims to descend, and its parts by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from oracle import SCHEDULES, Schedule, log_density
from torch import Tensor
from toy_runs import toy_roles

from fastgen.denoiser import Predictor
from fastgen.distillers import losses
from fastgen.distillers.dmd2 import DMD2
from fastgen.families.toy import MIXTURES, Mixture, Toy
from fastgen.path import KINDS, Flow, Kind, Path, VarianceExploding, VariancePreserving

PLACES: list[tuple[Path, Schedule, float]] = [
    (Flow(), SCHEDULES["Flow"], 0.6),
    (VariancePreserving(), SCHEDULES["VariancePreserving"], 0.3),
    (VarianceExploding(), SCHEDULES["VarianceExploding"], 1.5),
]
IDS = [type(path).__name__ for path, _, _ in PLACES]


def double(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def affine_student() -> tuple[Tensor, Tensor]:
    """x = A z + b with a correlated, skew A."""
    return double([0.9, 0.2], [-0.3, 0.6]).requires_grad_(), double(0.4, -0.2).requires_grad_()


Mean = Callable[[Tensor, Tensor], Tensor]


def gaussian_mean(mean: Tensor, covariance: Tensor, schedule: Schedule, t: float) -> Mean:
    """(x_t, t) -> E[x0 | x_t] for data N(mean, covariance); one t for the whole batch."""
    alpha, sigma = (float(c) for c in schedule.at(double(t), covariance))
    gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2).double())
    return lambda x, times: mean + (x - alpha * mean) @ gain.T


def surrogate_gradient(path: Path, t: float, z: Tensor, eps: Tensor, student: tuple[Tensor, Tensor], fake: Mean, real: Mean) -> list[Tensor]:
    """Gradient in (A, b) of the surrogate with the KL weight, turned from a mean into a sum over dimensions."""
    a, b = student
    x, times = z @ a.T + b, torch.full((len(z),), t, dtype=torch.float64)
    with torch.no_grad():
        noised = path.mix(x, eps, times)
        g = losses.distribution_matching_gradient(fake(noised, times), real(noised, times), losses.kl_weight(path, times, x))
    loss = losses.surrogate(x, g) * x.shape[1]
    return list(torch.autograd.grad(loss, [a, b]))


def test_surrogate_gradient_is_g_over_numel() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 2, 5, 7, generator=generator, dtype=torch.float64)
    losses.surrogate(x, g).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, g / 210, rtol=1e-12, atol=1e-15)


def test_surrogate_does_not_pass_gradients_through_g() -> None:
    x, scale = double([1.0, 2.0]).requires_grad_(), double(3.0).requires_grad_()
    losses.surrogate(x, x * scale).backward()
    assert scale.grad is None
    torch.testing.assert_close(x.grad, double([1.5, 3.0]))  # x * 3 / 2, not the derivative of x^2


def test_normaliser_by_hand() -> None:
    x, real = double([1.0, 2.0], [3.0, 5.0], [0.0, 0.0]), double([0.0, 4.0], [3.0, 5.0], [-1e-3, 0.0])
    torch.testing.assert_close(losses.normaliser(x, real), double([1.5], [1e-6], [5e-4]))


def test_normaliser_is_per_sample_on_images_and_video() -> None:
    for shape in [(2, 3, 4, 6), (2, 3, 2, 4, 5)]:
        x = torch.zeros(shape)
        x[0] = 2.0
        x[1, 0] = -9.0  # a third of the elements
        scale = losses.normaliser(x, torch.zeros(shape))
        assert scale.shape == (2, *(1,) * (len(shape) - 1))
        torch.testing.assert_close(scale.flatten(), torch.tensor([2.0, 3.0]))


def test_kl_weight_by_hand() -> None:
    weight = losses.kl_weight(Flow(), torch.tensor([0.5, 0.2]), torch.zeros(2, 3, 1, 1))
    torch.testing.assert_close(weight, torch.tensor([1.0, 16.0]).reshape(2, 1, 1, 1))


def test_an_exact_match_gives_zeros_not_nan() -> None:
    x = torch.tensor([[0.3, -1.0], [2.0, 0.5]], requires_grad=True)
    real = x.detach().clone()
    g = losses.distribution_matching_gradient(real, real, 1 / losses.normaliser(x.detach(), real))
    loss = losses.surrogate(x, g)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(cast(Tensor, x.grad), torch.zeros(2, 2))


def test_a_fake_mean_right_of_the_real_mean_moves_samples_left() -> None:
    x = double([0.0], [1.0], [-2.0]).requires_grad_()
    real = double([-0.5], [0.0], [0.5])
    g = losses.distribution_matching_gradient(real + 0.7, real, 1 / losses.normaliser(x.detach(), real))
    losses.surrogate(x, g).backward()
    assert bool((g > 0).all())
    assert bool((x - 0.1 * cast(Tensor, x.grad) < x).all())


@pytest.mark.parametrize(("path", "schedule", "t"), PLACES, ids=IDS)
def test_surrogate_gradient_is_the_kl_gradient_for_a_mixture_teacher(path: Path, schedule: Schedule, t: float) -> None:
    """T1: against autograd of -1/2 logdet(alpha^2 A A^T + sigma^2 I) - E log p_t on the same (z, eps); Monte Carlo, 4e5 samples."""
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(400_000, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    student, teacher = affine_student(), MIXTURES["mixture"]()
    a, b = student
    covariance, mean = (a @ a.T).detach(), b.detach()
    got = surrogate_gradient(
        path, t, z, eps, student,
        fake=gaussian_mean(mean, covariance, schedule, t),
        real=lambda x, times: teacher.posterior_mean(x, *path.coeffs(times), torch.full((len(x),), -1)),
    )  # fmt: skip
    alpha, sigma = schedule.at(double(t), z)
    entropy = 0.5 * torch.logdet(alpha**2 * a @ a.T + sigma**2 * torch.eye(2).double())
    mixture = teacher.weights, teacher.means, torch.diag_embed(teacher.variances)
    kl = -entropy - log_density(alpha * (z @ a.T + b) + sigma * eps, alpha, sigma, *mixture).mean()
    want = torch.autograd.grad(kl, [a, b])
    error = torch.cat([(g - w).flatten() for g, w in zip(got, want, strict=True)]).norm()
    assert error <= 0.04 * torch.cat([w.flatten() for w in want]).norm()


@pytest.mark.parametrize(("path", "schedule", "t"), PLACES, ids=IDS)
def test_surrogate_gradient_is_the_kl_gradient_for_a_gaussian_teacher(path: Path, schedule: Schedule, t: float) -> None:
    """Exact: g is affine in (z, eps), so the eight points +-2 e_i, whose mean is 0 and covariance 1, replace the expectation."""
    points = torch.cat([2 * torch.eye(4), -2 * torch.eye(4)]).double()
    student, (real_mean, real_cov) = affine_student(), (double(-0.3, 0.5), double([0.5, 0.15], [0.15, 0.3]))
    a, b = student
    covariance, mean = (a @ a.T).detach(), b.detach()
    grad_a, grad_b = surrogate_gradient(
        path, t, points[:, :2], points[:, 2:], student,
        fake=gaussian_mean(mean, covariance, schedule, t),
        real=gaussian_mean(real_mean, real_cov, schedule, t),
    )  # fmt: skip
    alpha, sigma = (float(c) for c in schedule.at(double(t), points))
    eye = torch.eye(2).double()
    noisy_real, noisy_fake = alpha**2 * real_cov + sigma**2 * eye, alpha**2 * covariance + sigma**2 * eye
    # KL(N(m, Q) || N(m_p, P)) = 1/2 (tr P^-1 Q - logdet Q + |m - m_p|^2 in P^-1), with Q = alpha^2 A A^T + sigma^2 I
    torch.testing.assert_close(grad_b, alpha**2 * torch.linalg.solve(noisy_real, mean - real_mean), rtol=1e-6, atol=1e-9)
    want_a = alpha**2 * (torch.linalg.inv(noisy_real) - torch.linalg.inv(noisy_fake)) @ a.detach()
    torch.testing.assert_close(grad_a, want_a, rtol=1e-6, atol=1e-9)


def network_gradient(path: Path, kind: Kind, dtype: torch.dtype) -> Tensor:
    """g between a mixture and a Gaussian whose networks predict `kind`, at the same noisy samples."""
    other = Mixture([1.0], [[0.5, -0.3]], [[0.49, 0.16]])
    real, fake = (_predictor(Toy(mixture, path=path, kind=kind), dtype) for mixture in (MIXTURES["mixture"](), other))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(99, 2, generator=generator).to(dtype)
    t = torch.linspace(0.05, 0.9, 99).to(dtype) * (1 if path.t_max == 1 else 3)
    noised = path.mix(x, torch.randn(99, 2, generator=generator).to(dtype), t)
    cond = {"component": torch.full((99,), -1)}
    with torch.no_grad():
        x0 = real(noised, t, cond)
        return losses.distribution_matching_gradient(fake(noised, t, cond), x0, 1 / losses.normaliser(x, x0))


def _predictor(family: Toy, dtype: torch.dtype) -> Predictor:
    return toy_roles(DMD2, family, dtype=dtype)["teacher"].predictor


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("path", [Flow(), VariancePreserving(), VarianceExploding()], ids=IDS)
def test_g_is_the_same_through_every_prediction_kind(path: Path, dtype: torch.dtype, tolerance: float) -> None:
    want = network_gradient(path, "x0", torch.float64)
    assert want.abs().mean() > 0.1
    for kind in KINDS:
        got = network_gradient(path, kind, dtype).double()
        worst = (got - want).abs().max() / want.abs().max()
        assert worst <= tolerance, f"{kind}: {worst:.2e}"
