"""The distribution-matching gradient through DMD2's own terms: T1, T5 and guidance of the notes, and where its noise levels lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from matching_cases import PATHS, affine_network, batch_of, corners, double, draws, gaussian_network, schedule_of
from oracle import log_density
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence
from toy_runs import Recorded, normal, rng, toy_method, toy_roles, toy_setting

from fastgen.distillers.base import Setting
from fastgen.distillers.dmd2 import DMD2
from fastgen.distillers.matching import guidance_gradient, loss_by_time, matching_gradient
from fastgen.distillers.phased_dmd import PhasedDMD
from fastgen.families.toy import MIXTURES, Mixture, Toy
from fastgen.path import KINDS, Flow, Kind, Path

EYE = torch.eye(2, dtype=torch.float64)
# Fractions of the path's range: the student's one step from `start`, ending at data or at `end`, matched at `level`.
LEVELS = {"Flow": (0.9, 0.5, 0.7), "VariancePreserving": (0.8, 0.3, 0.45), "VarianceExploding": (0.05, 0.0125, 0.025)}
REAL = double(-0.3, 0.5), double([0.5, 0.15], [0.15, 0.3])


def affine() -> tuple[Tensor, Tensor]:
    """x0 = A z + b with a correlated, skew A."""
    return double([0.9, 0.2], [-0.3, 0.6]).requires_grad_(), double(0.4, -0.2).requires_grad_()


def matching_method(name: str, *, phased: bool, weight: str = "kl") -> Any:
    """DMD2, or the first phase of Phased DMD, of a one-step student that matches at one level."""
    start, end, level = LEVELS[name]
    times = {"lo": level, "hi": level}
    family = Toy("toy:gaussian", path=PATHS[name])
    if not phased:
        return toy_method(DMD2, toy_setting(family, grid=[start]), weight=weight, match_times=times)
    phases = [{"start": 1, "end": end}, {"start": end, "end": 0}]
    setting = replace(toy_setting(family, grid=[start, end]), train_steps=2)
    return toy_method(PhasedDMD, setting, weight=weight, match_times=times, phases=phases, margin=0.005)


def coefficients(path: Path, *fractions: float) -> list[tuple[float, float]]:
    """(alpha, sigma) at fractions of the range."""
    schedule = schedule_of(path)
    return [(float(schedule.alpha(double(f * path.t_max))), float(schedule.sigma(double(f * path.t_max)))) for f in fractions]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phased", [False, True], ids=["to data", "to a phase's end"])
@pytest.mark.parametrize("name", PATHS)
def test_the_gradient_is_that_of_the_kl_divergence_between_gaussians(name: str, phased: bool, kind: Kind) -> None:
    """T1, exact, through networks of every kind: g is affine in (z, eps), so the corners replace the expectation.

    The oracle is autograd of torch's KL(q_t || p_t). Where the student stops at s it makes
    x_s = alpha_s x0 + sigma_s (x - alpha x0)/sigma, linear in z, and q_t comes about by the kernel from s to t.
    """
    path, method, (a, b) = PATHS[name], matching_method(name, phased=phased), affine()
    start, end, level = LEVELS[name]
    end = end if phased else 0.0
    (alpha, sigma), (alpha_s, sigma_s), (alpha_t, sigma_t) = coefficients(path, start, end, level)
    scale = start * path.t_max if name == "VarianceExploding" else 1.0
    ratio = alpha_t / alpha_s
    noise = sigma_t**2 - ratio**2 * sigma_s**2
    matrix = (alpha_s - sigma_s * alpha / sigma) * a + sigma_s / sigma * scale * EYE
    mean, covariance = ratio * (alpha_s - sigma_s * alpha / sigma) * b, ratio**2 * matrix @ matrix.T + noise * EYE
    teacher = alpha_t * REAL[0], alpha_t**2 * REAL[1] + sigma_t**2 * EYE
    want = torch.autograd.grad(kl_divergence(MultivariateNormal(mean, covariance), MultivariateNormal(*teacher)), [a, b])

    models = {
        "student": affine_network(path, kind, a, b, scale),
        "student_2": affine_network(path, kind, a, b, scale),
        "fake_score": gaussian_network(path, kind, mean.detach(), covariance.detach()),
        "teacher": gaussian_network(path, kind, *teacher),
    }
    points = corners(4)
    loss = method.match(models, batch_of(8), draws({"noise": points[:, :2], "match_noise": points[:, 2:]}), 0).value
    for got, expected in zip(torch.autograd.grad(2 * loss, [a, b]), want, strict=True):  # a mean over both dimensions, not their sum
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", PATHS)
def test_the_gradient_is_that_of_the_kl_divergence_to_a_mixture(name: str) -> None:
    """T1 against autograd of -1/2 logdet(alpha^2 A A^T + sigma^2 I) - E log p_t on the same thousand draws. They come in pairs of opposite
    sign with covariance exactly 1, which makes the fake score's share exact, and the real score's is the same sum on both sides."""
    path, method, (a, b) = PATHS[name], matching_method(name, phased=False), affine()
    start, _, level = LEVELS[name]
    ((alpha, sigma),) = coefficients(path, level)
    scale = start * path.t_max if name == "VarianceExploding" else 1.0
    covariance = alpha**2 * a @ a.T + sigma**2 * EYE
    models = {
        "student": affine_network(path, "velocity", a, b, scale),
        "fake_score": gaussian_network(path, "velocity", alpha * b.detach(), covariance.detach()),
        "teacher": toy_roles(DMD2, Toy("toy:mixture", path=path), dtype=torch.float64)["teacher"].predictor,
    }
    points = normal(500, 4)
    points = torch.cat([points, -points])
    z, eps = torch.linalg.solve(torch.linalg.cholesky(points.T.cov(correction=0)), points.T).T.split(2, 1)
    loss = method.match(models, batch_of(len(z)), draws({"noise": z, "match_noise": eps}), 0).value
    got = torch.autograd.grad(2 * loss, [a, b])
    mixture = MIXTURES["mixture"]()
    parts = mixture.weights, mixture.means, torch.diag_embed(mixture.variances)
    real = log_density(alpha * (z @ a.T + b) + sigma * eps, double([alpha]), double([sigma]), *parts).mean()
    want = torch.autograd.grad(-0.5 * torch.logdet(covariance) - real, [a, b])
    for gradient, expected in zip(got, want, strict=True):
        assert expected.norm() > 1e-3
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("phased", [False, True], ids=["to data", "to a phase's end"])
@pytest.mark.parametrize("weight", ["normalised", "alpha", "kl"])
def test_samples_right_of_the_teachers_move_left(weight: str, phased: bool) -> None:
    a, b = affine()
    method, (_, _, (alpha, sigma)) = matching_method("Flow", phased=phased, weight=weight), coefficients(Flow(), *LEVELS["Flow"])
    models = {name: affine_network(Flow(), "velocity", a, b, 1.0) for name in ("student", "student_2")}
    for name, shift in (("fake_score", 0.7), ("teacher", 0.0)):
        models[name] = gaussian_network(Flow(), "velocity", double(shift, 0.0), alpha**2 * EYE + sigma**2 * EYE)
    loss = method.match(models, batch_of(64), draws({"noise": normal(64, 2), "match_noise": normal(64, 2, seed=1)}), 0).value
    gradient = torch.autograd.grad(loss, b)[0]
    assert gradient[0] > 1e-3
    assert gradient[1].abs() <= 1e-12


def test_the_weights_differ_by_the_factors_they_are_named_for() -> None:
    """normalised 1/n, alpha alpha_t/n, and n = mean |x0 - mu_real| of the sample's own prediction, by hand; s > 0 leaves n as it is."""
    t, s, x0 = double(0.7, 0.6), double(0.5, 0.0), normal(2, 2)
    noised, cond = normal(2, 2, seed=1), batch_of(2).cond
    real, fake = (toy_roles(DMD2, Toy(source), dtype=torch.float64)["teacher"].predictor for source in ("toy:mixture", "toy:gaussian"))
    got = {weight: matching_gradient(real, fake, noised, x0, s, t, cond, weight) for weight in ("normalised", "alpha", "kl")}
    gap, scale = fake(noised, t, cond) - real(noised, t, cond), (x0 - real(noised, t, cond)).abs().mean(1)
    torch.testing.assert_close(got["normalised"].gradient, gap / scale[:, None])
    torch.testing.assert_close(got["alpha"].gradient, double([0.3], [0.4]) * gap / scale[:, None])
    # alpha_t alpha_t|s / sigma_t^2
    torch.testing.assert_close(got["kl"].gradient, double([0.3 * 0.6 / 0.49], [0.4 * 0.4 / 0.36]) * gap)
    torch.testing.assert_close(got["normalised"].normaliser, scale)
    torch.testing.assert_close(got["normalised"].gap, gap.abs().mean(1))


# Guidance apart

OTHER = Mixture([1.0] * 3, [[0.5, -0.3]] * 3, [[0.49, 0.16]] * 3)  # the same Gaussian for every prompt


def guided_setting(**keys: Any) -> tuple[Toy, Setting]:
    family = Toy("toy:mixture")
    return family, toy_setting(family, guidance=3.0, negative="2", **keys)


def test_both_parts_at_one_level_are_the_guided_gradient() -> None:
    family, setting = guided_setting()
    roles = toy_roles(DMD2, family, dtype=torch.float64)
    fake = toy_roles(DMD2, Toy(OTHER), dtype=torch.float64)["teacher"].predictor
    teacher, cond = roles["teacher"].predictor, batch_of(9, 1).cond
    noised, x0 = normal(9, 2), normal(9, 2, seed=1)
    for s in (torch.zeros(9).double(), torch.full((9,), 0.1).double()):
        t = torch.linspace(0.2, 0.9, 9, dtype=torch.float64)
        whole = matching_gradient(setting.guide(teacher), fake, noised, x0, s, t, cond, "kl").gradient
        matched = matching_gradient(teacher, fake, noised, x0, s, t, cond, "kl").gradient
        guidance = guidance_gradient(teacher, noised, x0, s, t, cond, setting, "kl")
        assert guidance.abs().mean() > 0.1
        torch.testing.assert_close(matched + guidance, whole, rtol=1e-9, atol=1e-9)


def test_the_decoupled_step_is_the_guided_one_where_both_draw_alike() -> None:
    """And another one where the guidance part draws a noise of its own."""
    family, setting = guided_setting(grid=[0.9])
    roles = toy_roles(DMD2, family, dtype=torch.float64)
    models = roles.predictors() | {"fake_score": toy_roles(DMD2, Toy(OTHER), dtype=torch.float64)["teacher"].predictor}
    times = {"lo": 0.3, "hi": 0.8}
    shared = {"noise": normal(6, 2), "match_noise": normal(6, 2, seed=1), "guidance_noise": normal(6, 2, seed=1)}
    alike, apart = (draws(shared | extra, uniform=0.4) for extra in ({}, {"guidance_noise": normal(6, 2, seed=2)}))
    whole = toy_method(DMD2, setting, weight="kl", match_times=times)
    split = toy_method(DMD2, setting, weight="kl", match_times=times, decoupled={"times": times})
    losses = [method.match(models, batch_of(6, 0), draw, 0).value.item() for method, draw in ((whole, alike), (split, alike), (split, apart))]  # type: ignore[attr-defined]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert abs(losses[2] / losses[0] - 1) > 0.01


@pytest.mark.parametrize("grid", [(1.0, 0.75, 0.5, 0.25), (0.9, 0.1, 0.01)])
def test_guidance_stays_below_the_students_own_level(grid: tuple[float, ...]) -> None:
    """The second call of the teacher is the guidance part: doubled for the negative prompt, at levels under the exit's."""
    family, setting = guided_setting(grid=grid)
    method: Any = toy_method(DMD2, setting, decoupled={"times": {"lo": 0.02, "hi": 0.98}})
    models = {name: Recorded(predictor) for name, predictor in toy_roles(DMD2, family).predictors().items()}
    exits, above_first = set(), False
    for step in range(30):
        calls = {name: len(model.inputs) for name, model in models.items()}
        method.match(models, batch_of(8, 0), rng(8, step), step)
        exit_at = models["student"].inputs[-1][1].unique().item()
        (matched, guidance) = models["teacher"].inputs[calls["teacher"] :]
        assert (len(matched[0]), guidance[2]["component"].tolist()) == (8, [2] * 8 + [0] * 8)
        assert torch.equal(guidance[1][:8], guidance[1][8:])
        highest = 0.98 if exit_at == setting.grid[0] else exit_at  # the first evaluation sees pure noise, whatever time it is told
        assert bool((guidance[1] <= highest * (1 + 1e-6)).all())
        assert bool((guidance[1] >= min(0.02, exit_at) * (1 - 1e-6)).all())
        above_first |= bool((guidance[1] > setting.grid[0]).any())
        exits.add(round(exit_at, 3))
    assert exits == set(grid)
    assert above_first == (grid[0] < 0.98)


# The critic


@pytest.mark.parametrize("phased", [False, True], ids=["to data", "to a phase's end"])
def test_a_trained_critic_has_the_slope_of_the_students_score(phased: bool) -> None:
    """T5 at t = .8: from the teacher's score, 35 % and 16 % too flat, to within 5 % of -1/(alpha_t|s^2 v + sigma_t|s^2).

    The student maps z to m + alpha v_T/(alpha^2 v_T + sigma^2)(z - alpha m) in x0, and by Euler on to x_s.
    """
    start, end, t, variance = 0.9, 0.5 if phased else 0.0, 0.8, 16.0
    family = Toy(Mixture([1.0], [[0.5]], [[variance]]), width=32)
    times: dict[str, Any] = {"critic_times": {"lo": 0.77, "hi": 0.83}}
    setting = replace(toy_setting(family, grid=[start, 0.5] if phased else [start]), train_steps=2)
    phases = {"phases": [{"start": 1, "end": 0.5}, {"start": 0.5, "end": 0}]}
    method: Any = toy_method(PhasedDMD, setting, **times, **phases) if phased else toy_method(DMD2, setting, **times)
    models, generator = toy_roles(method, family).predictors(), torch.Generator().manual_seed(0)
    gain = (1 - start) * variance / ((1 - start) ** 2 * variance + start**2)
    deviation = (1 - end - end * (1 - start) / start) * gain + end / start
    scale = (1 - t) / (1 - end)
    want = -1 / (scale**2 * deviation**2 + t**2 - scale**2 * end**2)
    fake = models["fake_score"]

    def slope() -> float:
        x = torch.linspace(-1, 1, 41)[:, None]
        with torch.no_grad():
            score = fake(x, torch.full((41,), t), batch_of(41).cond, "score")
        return (score * x).sum().item() / x.square().sum().item()

    assert abs(slope() / want - 1) > 0.15
    parameters = list(fake.denoiser.parameters())  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam(parameters, lr=1e-2, betas=(0.9, 0.99))
    steps = 150
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        noise = {name: torch.randn(256, 1, generator=generator) for name in ("noise", "critic_noise")}
        loss = method.critic(models, batch_of(256), draws(noise, uniform=torch.rand(256, generator=generator)), 0).value
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert abs(slope() / want - 1) <= 0.05


def test_losses_are_logged_by_quarter_of_the_range() -> None:
    logs = loss_by_time(double(1, 2, 3, 4, 5), double(0.0, 0.3, 0.49, 0.75, 1.0))
    nan = float("nan")
    for name, want in {
        "loss_t0": [1, nan, nan, nan, nan],
        "loss_t1": [nan, 2, 3, nan, nan],
        "loss_t2": [nan] * 5,
        "loss_t3": [nan] * 3 + [4, 5],
    }.items():
        torch.testing.assert_close(logs[name], double(*want), equal_nan=True)
