"""MeanFlow at the exact average velocity of a Gaussian, its loss by hand, its intervals, and what a one-step student recovers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import SCHEDULES, gaussian_ode_map, gaussian_prediction
from torch import Tensor
from toy_runs import MEAN, VARIANCE, Recorded, normal, rng, toy_method, toy_roles, toy_setting

from fastgen import jvp
from fastgen.config import validate
from fastgen.distillers.base import Batch
from fastgen.distillers.mean_flow import MeanFlow
from fastgen.ema import EMA
from fastgen.errors import UserError
from fastgen.families.toy import Mixture, Toy
from fastgen.path import Flow, Path, TrigFlow, VarianceExploding, VariancePreserving
from fastgen.roles import Role, Roles
from fastgen.sampling import few_step, ode
from fastgen.surgery.second_time import given

FLOW = SCHEDULES["Flow"]


def exact_map(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The ODE map of N(MEAN, diag VARIANCE) on Flow, (B, 2), differentiable in x and t."""

    def spread(t: Tensor) -> Tensor:
        return ((1 - t)[:, None] ** 2 * VARIANCE + t[:, None] ** 2).sqrt()

    return (1 - r)[:, None] * MEAN + (x - (1 - t)[:, None] * MEAN) * spread(r) / spread(t)


class ExactAverage:
    """u(z, r, t) = (z - map(z, t -> r)) / (t - r), r < t, from the second time in the conditioning; shifted by `bias`."""

    path = Flow()

    def __init__(self, bias: float = 0.0) -> None:
        self.bias = bias

    def __call__(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], kind: str = "x0", path: Path | None = None) -> Tensor:
        assert kind == "velocity" and path == Flow()
        r = cond["input.second_time"]
        return (x - exact_map(x, t, r)) / (t - r)[:, None] + self.bias


def interval(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t, r and the exact velocity there."""
    generator = torch.Generator().manual_seed(1)
    times = torch.rand(count, 2, generator=generator, dtype=torch.float64).sort(1).values
    r, t = times[:, 0] * 0.9, 0.05 + 0.94 * times[:, 1]
    x = 1.5 * normal(count, 2)
    return x, t, r, gaussian_prediction("velocity", x, t, FLOW, MEAN, VARIANCE.diag())


def test_the_identity_holds_at_the_exact_average_velocity() -> None:
    x, t, r, v = interval(64)
    torch.testing.assert_close(exact_map(x[:1], t[:1], r[:1]), gaussian_ode_map(x[:1], t[0].item(), r[0].item(), FLOW, MEAN, VARIANCE.diag()))
    cond = given({}, second_time=r)
    u, slope = jvp.tangent(lambda x, t: ExactAverage()(x, t, cond, "velocity", Flow()), (x, t), (v, torch.ones_like(t)))
    assert (u - (v - (t - r)[:, None] * slope)).abs().max() <= 1e-6
    method: Any = toy_method(MeanFlow, toy_setting(Toy("toy:gaussian")))
    assert method.loss(ExactAverage(), x, t, r, v, {}).logs["error"].item() <= 1e-12
    assert method.loss(ExactAverage(0.1), x, t, r, v, {}).logs["error"].item() == pytest.approx(0.02, rel=1e-6)


def disturb(role: Role, scale: float = 0.3) -> None:
    """Move the residual network and the second time's last layer off zero."""
    generator = torch.Generator().manual_seed(7)
    out: Any = role.denoiser.backbone.out
    layers = [out]
    if role.denoiser.inputs is not None:
        layers.append(role.denoiser.inputs.networks["second_time"][-1])  # type: ignore[index]
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_(std=scale, generator=generator)


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("path", [Flow(), TrigFlow(), VariancePreserving(), VarianceExploding()], ids=lambda path: type(path).__name__)
def test_the_loss_by_hand(path: Path, power: float) -> None:
    """Teachers on any path; du/dt by central differences, with x carried along the exact velocity."""
    family = Toy("toy:gaussian", path=path, kind="velocity" if path in (Flow(), TrigFlow()) else "eps")
    method: Any = toy_method(MeanFlow, toy_setting(family), power=power, ratio=1.0, constant=0.01)
    roles = toy_roles(method, family, dtype=torch.float64)
    disturb(roles["student"])
    student, teacher, latents = roles["student"].predictor, roles["teacher"].predictor, 0.5 * normal(8, 2)
    loss = method.match({"student": student, "teacher": teacher}, Batch(8, {}, latents), rng(8), 0)
    t, r = method.draw_interval(rng(8))
    x = (1 - t)[:, None] * latents + t[:, None] * rng(8).normal("noise", (2,))
    cond = given({}, second_time=r)

    def u(x: Tensor, t: Tensor) -> Tensor:
        return student(x, t, cond, "velocity", Flow())

    with torch.no_grad():
        v = gaussian_prediction("velocity", x, t, FLOW, MEAN, VARIANCE.diag())
        h = 1e-5
        slope = (u(x + h * v, t + h) - u(x - h * v, t - h)) / (2 * h)
        error = (u(x, t) - v + (t - r)[:, None] * slope).square().sum(1)
    assert error.mean() > 1e-3
    torch.testing.assert_close(loss.value, (error / (error + 0.01) ** power).mean(), rtol=1e-5, atol=1e-7)
    loss.value.backward()
    assert roles["student"].denoiser.inputs is not None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in roles["student"].denoiser.inputs.parameters())


def test_the_target_carries_no_gradient() -> None:
    """The gradient is that of |u - constant|^2: a difference quotient of the whole loss is another number."""
    method: Any = toy_method(MeanFlow, toy_setting(Toy("toy:gaussian")), power=0.0)
    x, t, r, v = interval(16)
    bias = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    student = ExactAverage()
    student.bias = bias  # type: ignore[assignment]
    method.loss(student, x, t, r, v, {}).value.backward()
    assert bias.grad is not None
    assert bias.grad.item() == pytest.approx(2 * 2 * 0.2, rel=1e-6)


def test_intervals_are_ordered_distinct_as_often_as_asked_and_on_the_grid_as_often_as_asked() -> None:
    setting = toy_setting(Toy("toy:gaussian"), grid=[0.9, 0.5, 0.2])
    method: Any = toy_method(MeanFlow, setting, ratio=0.25, times={"name": "uniform"})
    t, r = method.draw_interval(rng(4000))
    assert (r <= t).all() and (r < t).double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert t[r < t].mean().item() == pytest.approx(2 / 3, abs=0.02)
    method = toy_method(MeanFlow, setting, ratio=1.0, on_grid=0.4, times={"name": "uniform"})
    t, r = method.draw_interval(rng(4000))
    grid = setting.grid
    below = torch.where(t > grid[0], grid[0], torch.where(t > grid[1], grid[1], torch.where(t > grid[2], grid[2], 0 * t)))
    assert (r == below).double().mean().item() == pytest.approx(0.4, abs=0.03)
    assert t.dtype == r.dtype == torch.float64


def test_the_teacher_is_guided_and_called_at_the_data() -> None:
    family = Toy("toy:mixture")
    method: Any = toy_method(MeanFlow, toy_setting(family, guidance=2.0, negative="2"))
    roles = toy_roles(method, family)
    models = {name: Recorded(role.predictor) for name, role in roles.items()}
    method.match(models, Batch(3, {"component": torch.tensor([0, 1, 0])}, normal(3, 2)), rng(3), 0)
    (_, _, cond) = models["teacher"].inputs[0]
    assert cond["component"].tolist() == [2, 2, 2, 0, 1, 0]
    assert not any("second_time" in key for key in cond)
    assert all("input.second_time" in cond for _, _, cond in models["student"].inputs)


def test_the_training_variant_needs_no_teacher() -> None:
    family = Toy("toy:gaussian")
    method: Any = toy_method(MeanFlow, toy_setting(family), variant="training", power=0.0, ratio=0.0)
    assert method.roles_for(method.config).keys() == {"student"}
    roles, latents = toy_roles(method, family), normal(6, 2)
    loss = method.match(roles.predictors(), Batch(6, {}, latents), rng(6), 0)
    t, _ = method.draw_interval(rng(6))
    eps = rng(6).normal("noise", (2,))
    with torch.no_grad():
        u = roles["student"].predictor((1 - t)[:, None] * latents + t[:, None] * eps, t, {}, "velocity")
    torch.testing.assert_close(loss.value, (u - (eps - latents)).square().sum(1).mean())


def test_the_training_variant_guides_with_its_own_unconditional_velocity() -> None:
    family = Toy("toy:mixture")
    config = {"variant": "training", "power": 0.0, "ratio": 0.0, "drop": 0.5}
    method: Any = toy_method(MeanFlow, toy_setting(family, guidance=3.0, negative="2"), **config)
    roles, latents = toy_roles(method, family), normal(12, 2)
    loss = method.match(roles.predictors(), Batch(12, {"component": torch.zeros(12, dtype=torch.int64)}, latents), rng(12), 0)
    t, _ = method.draw_interval(rng(12))
    eps = rng(12).normal("noise", (2,))
    x, lost = (1 - t)[:, None] * latents + t[:, None] * eps, rng(12).uniform("drop") < 0.5
    with torch.no_grad():
        predict = roles["student"].predictor
        unconditional = predict(x, t, {"component": torch.full((12,), 2)}, "velocity")
        conditional = predict(x, t, {"component": torch.where(lost, 2, 0)}, "velocity")
    v = torch.where(lost[:, None], eps - latents, 3 * (eps - latents) - 2 * unconditional)
    torch.testing.assert_close(loss.value, (conditional - v).square().sum(1).mean(), rtol=1e-5, atol=1e-6)


def test_the_derivative_is_faded_in() -> None:
    method: Any = toy_method(MeanFlow, toy_setting(Toy("toy:gaussian")), power=0.0)
    x, t, r, v = interval(16)
    u = ExactAverage()(x, t, given({}, second_time=r), "velocity", Flow())
    want = (u - v).square().sum(1).mean()
    torch.testing.assert_close(method.loss(ExactAverage(), x, t, r, v, {}, 0.0).value, want)
    torch.testing.assert_close(method.loss(ExactAverage(), x, t, r, v, {}, 0.5).value, want / 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ratio": 1.5}, "recipe key distiller.ratio: Input should be less than or equal to 1 (given: 1.5)"),
        ({"constant": 0}, "recipe key distiller.constant: Input should be greater than 0 (given: 0)"),
        ({"variant": "train"}, "recipe key distiller.variant: Input should be 'distillation' or 'training' (given: 'train')"),
        ({"ratios": 0.5}, "recipe key distiller.ratios: unknown key; did you mean 'ratio'?"),
        (
            {"tangent": "forward"},
            "recipe key distiller.tangent: Input should be 'exact', 'semi_continuous', 'discrete' or 'finite_difference' (given: 'forward')",
        ),
        ({"discrete_step": 0.02}, "recipe key distiller.discrete_step: not used with tangent: exact; remove it"),
    ],
)
def test_mistakes_in_the_config_name_the_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(MeanFlow.Config, {"name": "mean_flow", **config}, "distiller")
    assert str(caught.value).startswith(message)


def test_finite_differences_give_the_same_loss() -> None:
    family = Toy("toy:mixture")
    values = []
    for tangent in ("exact", "finite_difference"):
        method: Any = toy_method(MeanFlow, toy_setting(family), power=0.0, ratio=1.0, tangent=tangent)
        roles: Roles = toy_roles(method, family)
        disturb(roles["student"], 0.05)
        values.append(method.match(roles.predictors(), Batch(32, {}, normal(32, 2).float()), rng(32), 0).value.item())
    assert values[0] == pytest.approx(values[1], rel=1e-2)


def slopes(tangent: str, step: float) -> tuple[Tensor, Tensor]:
    """du/dt as the method takes it at the exact average velocity, and as the identity gives it: (v - u) / (t - r)."""
    method: Any = toy_method(MeanFlow, toy_setting(Toy("toy:gaussian")), tangent=tangent, discrete_step=step)
    x, t, r, v = interval(64)
    cond = given({}, second_time=r)
    u = ExactAverage()(x, t, cond, "velocity", Flow())
    return method._slope(ExactAverage(), x, t, r, v, cond, u), (v - u) / (t - r)[:, None]


@pytest.mark.parametrize("tangent", ["semi_continuous", "discrete"])
def test_differences_along_time_become_the_derivative_as_their_step_shrinks(tangent: str) -> None:
    slope, exact = slopes(tangent, 1e-6)
    torch.testing.assert_close(slope, exact, rtol=1e-4, atol=1e-4)
    errors = [(difference - exact).abs().mean() for difference, exact in (slopes(tangent, 2e-3), slopes(tangent, 1e-3))]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)  # first order


def test_a_difference_stays_within_its_interval() -> None:
    """Where t is r, the derivative counts nothing, whatever the step."""
    method: Any = toy_method(MeanFlow, toy_setting(Toy("toy:gaussian")), power=0.0, tangent="discrete", discrete_step=0.9)
    asked: list[Tensor] = []

    def student(x: Tensor, t: Tensor, cond: dict[str, Tensor], kind: str, path: Path) -> Tensor:
        asked.append(t)
        return x.square()

    x, t, v = normal(3, 2), torch.tensor([0.5, 0.95, 0.4], dtype=torch.float64), normal(3, 2)
    r = torch.tensor([0.3, 0.0, 0.4], dtype=torch.float64)
    loss = method.loss(student, x, t, r, v, {})
    torch.testing.assert_close(asked[1][:2], torch.tensor([0.4, 0.475], dtype=torch.float64))
    step = t[:2] - asked[1][:2]
    slope = (x[:2].square() - (x[:2] - step[:, None] * v[:2]).square()) / step[:, None]
    target = torch.cat([v[:2] - (t - r)[:2, None] * slope, v[2:]])
    torch.testing.assert_close(loss.value, (x.square() - target).square().sum(1).mean())


# Recovery


class Streams:
    """A rng for many thousand updates: the interface of SampleRng, drawn as whole batches from one generator."""

    def __init__(self, count: int) -> None:
        self.count, self.generator = count, torch.Generator().manual_seed(0)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(self.count, *shape, generator=self.generator)

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.rand(self.count, *shape, generator=self.generator)


def train(family: Toy, *, steps: int, batch: int, lr: float) -> tuple[Any, Roles, EMA]:
    config = {"times": {"name": "uniform"}, "ratio": 0.75, "on_grid": 0.5}
    method: Any = toy_method(MeanFlow, toy_setting(family), **config)
    roles = toy_roles(method, family)
    parameters, models = roles["student"].parameters(), roles.predictors()
    optimizer, ema = torch.optim.Adam(parameters.values(), lr=lr, fused=True), EMA(parameters, 0.99)
    data, rng = family.mixture.sample(20_000, torch.Generator().manual_seed(0)).float(), Streams(batch)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        latents = data[torch.randint(len(data), (batch,), generator=rng.generator)]
        method.match(models, Batch(batch, {}, latents), rng, step).value.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    return method, roles, ema


THREE = Mixture([0.3, 0.5, 0.2], [[-0.7, 0.0], [0.55, 0.4], [0.3, -0.7]], [[0.2, 0.15], [0.15, 0.22], [0.16, 0.16]])


@pytest.mark.slow
@pytest.mark.parametrize(("mixture", "limit"), [("toy:gaussian", 0.04), (THREE, 0.08)], ids=["gaussian", "mixture"])
def test_one_step_recovers_the_exact_ode_map(mixture: Any, limit: float) -> None:
    """The whole map, pure noise to data, against a fine integration of the teacher's ODE; moments in units of the data's deviations.

    Measured (rmse, mean, deviation): .021, .002, .008 and .056, .032, .008; longer training moves the mixture's by as much as it gains.
    """
    family = Toy(mixture, width=128)
    method, roles, ema = train(family, steps=8000, batch=192, lr=2e-3)
    noise = normal(20_000, 2, seed=5).float()
    with torch.no_grad(), ema.applied():
        x = few_step(roles["student"].predictor, noise, method.setting.grid, {}, renoise="euler").double()
        exact = ode(roles["teacher"].predictor, noise.double(), torch.linspace(1, 0, 101, dtype=torch.float64), {}, solver="heun")
    rmse = (x - exact).square().mean().sqrt().item()
    mean_error = ((x.mean(0) - exact.mean(0)) / exact.std(0)).abs().max().item()
    std_error = (x.std(0) / exact.std(0) - 1).abs().max().item()
    assert max(rmse, mean_error, std_error) <= limit, (rmse, mean_error, std_error)
