"""PeRFlow: where windows lie, the pair behind a window and its target by the paper's formulas, and students that are exact on every window."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracle import SCHEDULES, gaussian_ode_map, gaussian_prediction
from torch import Tensor
from toy_runs import MEAN, VARIANCE, Recorded, normal, optimizer_block, rng, toy_method, toy_roles, toy_setting, toy_trainer

from fastgen.config import Recipe, validate
from fastgen.distillers import losses
from fastgen.distillers.base import Batch, Facts
from fastgen.distillers.flow_matching import FlowMatching, FlowMatchingConfig
from fastgen.distillers.perflow import PeRFlow
from fastgen.distillers.progressive import Progressive
from fastgen.distillers.solver import integrate, sub_times
from fastgen.errors import UserError
from fastgen.families.toy import Toy
from fastgen.path import DiscreteVP, Flow, Kind, Path, TrigFlow, VarianceExploding, VariancePreserving
from fastgen.plan import plan
from fastgen.sampling import few_step

STABLE = DiscreteVP.scaled_linear(1000, 0.00085, 0.012)
# A path, the kind that its network predicts, and its schedule as plain functions.
WORLDS: dict[str, tuple[Path, Kind]] = {
    "Flow": (Flow(), "velocity"),
    "TrigFlow": (TrigFlow(), "velocity"),
    "VariancePreserving": (VariancePreserving(), "eps"),
    "DiscreteVP": (STABLE, "eps"),
}


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def perflow(family: Toy, *, steps: int = 4, grid: Any = None, negative: str = "", **config: Any) -> Any:
    return toy_method(PeRFlow, toy_setting(family, steps=steps, grid=grid, negative=negative), **config)


def gaussian(name: str = "Flow") -> Toy:
    path, kind = WORLDS[name]
    return Toy("toy:gaussian", path=path, kind=kind)


def data(count: int = 64) -> Tensor:
    return MEAN + normal(count, 2) * VARIANCE.sqrt()


def drawn(method: Any, count: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """(t, s, e), path times (count,) of the samples and of the ends of their windows, for times that are uniform over the range."""
    t = (1 - rng(count).uniform("time").double()) * method.setting.path.t_max
    edges = times(*method.edges)
    window = torch.tensor([next(k for k, (s, e) in enumerate(pairwise(method.edges)) if e < value <= s) for value in t.tolist()])
    return t, edges[window], edges[window + 1]


class Noted:
    """A student that notes what it is asked and predicts 0."""

    def __init__(self, path: Path, kind: Kind) -> None:
        self.path, self.kind = path, kind

    def __call__(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], kind: str = "x0", path: Path | None = None) -> Tensor:
        assert kind == self.kind and path is None
        self.x, self.t, self.cond = x, t, cond
        return torch.zeros_like(x, requires_grad=True)


def column(*values: Tensor) -> list[Tensor]:
    return [value[:, None] for value in values]


# Windows


def test_windows_begin_at_the_students_own_times() -> None:
    family, grid = Toy("toy:gaussian"), [1.0, 0.8, 0.5, 0.2]
    assert perflow(family, grid=grid).edges == [1, 0.8, 0.5, 0.2, 0]
    method = perflow(family, grid=grid, windows=2)
    assert method.edges == [1, 0.5, 0] and perflow(family, grid=grid, windows=1).edges == [1, 0]
    assert perflow(family, grid=grid, edges=[1, 0.2, 0]).edges == [1, 0.2, 0]
    assert perflow(family, grid=[0.99, 0.8333333], edges=[1, 0.833, 0]).edges == [1, 0.8333333, 0], "a recipe's rounded time is the grid's own"
    assert method.window(times(1, 0.51, 0.5, 0.49, 1e-6)).tolist() == [0, 0, 1, 1, 1]


def test_windows_of_stable_diffusion_are_the_papers() -> None:
    assert perflow(Toy("toy:gaussian", path=STABLE, kind="eps")).edges == [1, 0.75, 0.5, 0.25, 0]


def test_the_teachers_steps_in_a_window_are_even_before_its_shift() -> None:
    setting = replace(toy_setting(Toy("toy:gaussian"), grid=[1.0, 0.75]), shift=3.0)
    method: Any = toy_method(PeRFlow, setting, solver_steps=2)
    middle = 3 * 0.25 / (1 + 2 * 0.25)  # .75 is 3 u/(1 + 2 u) at u = .5
    want = torch.tensor([[1.0, 3 * 0.75 / (1 + 2 * 0.75), 0.75], [0.75, middle, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(method._steps, want)
    alpha, sigma = STABLE.coeffs(times(1, 0.875, 0.75))
    vp = perflow(Toy("toy:gaussian", path=STABLE, kind="eps"), solver_steps=2)
    torch.testing.assert_close(vp._steps[0], sigma / (alpha + sigma))


# The teacher's way through a window


@pytest.mark.parametrize("points", ["data", "teacher_trajectory"])
@pytest.mark.parametrize("name", WORLDS)
def test_a_pair_leads_where_the_exact_ode_does_up_to_the_solvers_error(name: str, points: str) -> None:
    family = gaussian(name)
    errors = {}
    for solver, steps in (("euler", 16), ("euler", 64), ("heun", 16), ("heun", 64)):
        method = perflow(family, solver=solver, solver_steps=steps, points=points)
        t, s, e = drawn(method)
        teacher = toy_roles(method, family, dtype=torch.float64)["teacher"].predictor
        x0, eps = method.pair(teacher, Batch(64, {}, data()), {}, rng(64), method.window(t))
        x_s, x_e = (family.path.mix(x0, eps, t) for t in (s, e))
        schedule = SCHEDULES["Flow"]
        flow = [family.path.retime(x, t, Flow()) for x, t in ((x_s, s), (x_e, e))]
        (y_s, t_s), (y_e, t_e) = flow
        exact = [gaussian_ode_map(y_s[i : i + 1], t_s[i].item(), t_e[i].item(), schedule, MEAN, VARIANCE.diag()) for i in range(64)]
        errors[solver, steps] = (torch.cat(exact) - y_e).abs().max().item()
        if points == "data":
            noise = rng(64).normal("noise", (2,))
            torch.testing.assert_close(x_s, family.path.mix(data(), noise, s), rtol=1e-6, atol=1e-6)
    assert errors["euler", 16] < 0.1 and errors["euler", 16] / errors["euler", 64] > 3
    # The last step to data is Euler's, and on VP training steps are far apart there in noise.
    assert errors["heun", 16] < 0.05 and errors["heun", 16] / errors["heun", 64] > (3 if name == "DiscreteVP" else 6)


@pytest.mark.parametrize("name", WORLDS)
def test_points_of_the_teachers_trajectory_are_where_its_ode_leads_from_noise(name: str) -> None:
    family = gaussian(name)
    method = perflow(family, points="teacher_trajectory", solver="heun", solver_steps=64)
    t, s, _ = drawn(method)
    teacher = toy_roles(method, family, dtype=torch.float64)["teacher"].predictor
    x0, eps = method.pair(teacher, Batch(64, {}), {}, rng(64), method.window(t))
    noise = rng(64).normal("noise", (2,)).double()
    start, end = family.path.retime(noise, torch.full((64,), family.path.t_max, dtype=torch.float64), Flow())
    x_s, t_s = family.path.retime(family.path.mix(x0, eps, s), s, Flow())
    exact = [gaussian_ode_map(start[i : i + 1], end[i].item(), t_s[i].item(), SCHEDULES["Flow"], MEAN, VARIANCE.diag()) for i in range(64)]
    torch.testing.assert_close(x_s, torch.cat(exact), rtol=1e-2, atol=5e-3)
    waiting = s == family.path.t_max
    assert waiting.any()
    torch.testing.assert_close(x_s[waiting], start[waiting], rtol=1e-12, atol=1e-12)


def test_a_step_to_data_is_eulers_and_asks_for_no_prediction_there() -> None:
    """A heun step in between, by hand."""
    family = gaussian("DiscreteVP")
    teacher = Recorded(toy_roles(perflow(family), family, dtype=torch.float64)["teacher"].predictor)
    x, steps = normal(3, 2), torch.tensor([[0.8, 0.8, 0.3], [0.5, 0.3, 0.3], [0.0, 0.1, 0.0]], dtype=torch.float64)
    y = integrate(teacher, x, steps, {}, "heun")
    assert len(teacher.inputs) == 4 and all((t > 0).all() for _, t, _ in teacher.inputs)

    def slope(x: Tensor, t: Tensor) -> Tensor:
        return gaussian_prediction("velocity", x, t, SCHEDULES["Flow"], MEAN, VARIANCE.diag())

    (t, r, e), want = column(*steps), x
    for a, b in ((t, r), (r, e)):
        first = slope(want, a[:, 0])
        ahead = want + (b - a) * first
        second = torch.where(b > 0, slope(torch.where(b > 0, ahead, want), torch.where(b > 0, b, a)[:, 0]), first)
        want = want + (b - a) * (first + second) / 2
    torch.testing.assert_close(y, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", WORLDS)
def test_one_ddim_step_through_a_window_is_the_teachers_own_prediction(name: str) -> None:
    """So with one step of the solver the pair's eps is the teacher's at s, and its x0 too."""
    family = gaussian(name)
    method = perflow(family, solver_steps=1, grid=[0.99, 0.6, 0.3] if name == "Flow" else None)
    t, s, _ = drawn(method)
    keep = s < family.path.t_max  # where eps and x0 are both determined on every path
    teacher = toy_roles(method, family, dtype=torch.float64)["teacher"].predictor
    x0, eps = method.pair(teacher, Batch(64, {}, data()), {}, rng(64), method.window(t))
    x_s = family.path.mix(data(), rng(64).normal("noise", (2,)), s)
    for kind, value in (("x0", x0), ("eps", eps)):
        torch.testing.assert_close(value[keep], teacher(x_s, s, {}, kind)[keep], rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


def test_one_ddim_step_by_the_closed_form_on_flow() -> None:
    family = gaussian()
    method = perflow(family, solver_steps=1)
    t, s, e = drawn(method)
    teacher = toy_roles(method, family, dtype=torch.float64)["teacher"].predictor
    x0, eps = method.pair(teacher, Batch(64, {}, data()), {}, rng(64), method.window(t))
    x_s = (1 - s)[:, None] * data() + s[:, None] * rng(64).normal("noise", (2,))
    velocity = gaussian_prediction("velocity", x_s, s, SCHEDULES["Flow"], MEAN, VARIANCE.diag())
    torch.testing.assert_close(eps - x0, velocity, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((1 - e)[:, None] * x0 + e[:, None] * eps, x_s + (e - s)[:, None] * velocity, rtol=1e-9, atol=1e-9)


# Targets


def straightened(method: Any, family: Toy, count: int = 64, **models: Any) -> tuple[Noted, Tensor]:
    """What the student is asked, and its target, from the gradient of the squared error of a prediction of 0."""
    student = Noted(family.path, family.kind)
    teacher = toy_roles(method, family, dtype=torch.float64)["teacher"].predictor
    asked: list[Tensor] = []

    def call(*args: Any, **kwargs: Any) -> Tensor:
        asked.append(Noted.__call__(student, *args, **kwargs))
        return asked[0]

    proxy: Any = type("Student", (), {"kind": family.kind, "__call__": staticmethod(call)})()
    loss = method.straighten({"teacher": teacher, "student": proxy, **models}, Batch(count, {}, data(count)), rng(count), 0)
    (gradient,) = torch.autograd.grad(loss.value, asked[0])
    return student, -gradient * gradient.numel() / 2


def test_one_window_is_reflow_with_the_teachers_sample() -> None:
    """K = 1 on Flow: x_t = (1 - t) y + t z and the target z - y, where the teacher's ODE leads from z to y."""
    family = gaussian()
    method = perflow(family, steps=1, solver="heun", solver_steps=6)
    student, target = straightened(method, family)
    z = rng(64).normal("noise", (2,)).double()
    teacher = toy_roles(method, family, dtype=torch.float64)["teacher"].predictor
    y = integrate(teacher, z, torch.linspace(1, 0, 7, dtype=torch.float64)[:, None].expand(-1, 64), {}, "heun")
    t = drawn(method)[0][:, None]
    torch.testing.assert_close(student.x, (1 - t) * y + t * z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(target, z - y, rtol=1e-9, atol=1e-9)


def ends(method: Any, family: Toy) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """(t, s, e) as columns, and the samples at s and e of the same draw, by the definition of the path."""
    t, s, e = drawn(method)
    teacher = toy_roles(method, family, dtype=torch.float64)["teacher"].predictor
    x0, eps = method.pair(teacher, Batch(64, {}, data()), {}, rng(64), method.window(t))
    schedule = SCHEDULES[type(family.path).__name__]
    return column(t, s, e), (schedule.noisy(x0, eps, s), schedule.noisy(x0, eps, e))


@pytest.mark.parametrize("interpolant", ["constant", "linear"])
def test_on_flow_the_target_is_the_papers_velocity_on_the_straight_line(interpolant: str) -> None:
    family = gaussian()
    method = perflow(family, grid=[1.0, 0.8, 0.5, 0.1], windows=2, interpolant=interpolant)
    (t, s, e), (x_s, x_e) = ends(method, family)
    student, target = straightened(method, family)
    torch.testing.assert_close(student.x, x_s + (t - s) / (e - s) * (x_e - x_s), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(target, (x_e - x_s) / (e - s), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("interpolant", ["constant", "linear"])
def test_on_vp_the_target_is_the_papers_ddim_eps(interpolant: str) -> None:
    """(x_e - lambda x_s)/eta, lambda = sqrt(a_e/a_s), eta = sqrt(1 - a_e) - sqrt(a_e/a_s (1 - a_s)); of the input, only that between the
    ends of a window is another for the two interpolants."""
    family = gaussian("VariancePreserving")
    method = perflow(family, interpolant=interpolant)
    (t, s, e), (x_s, x_e) = ends(method, family)
    student, target = straightened(method, family)
    a_t, a_s, a_e = (SCHEDULES["VariancePreserving"].alpha(u) ** 2 for u in (t, s, e))
    scale = (a_e / a_s).sqrt()
    eps = (x_e - scale * x_s) / ((1 - a_e).sqrt() - (a_e / a_s * (1 - a_s)).sqrt())
    torch.testing.assert_close(target, eps, rtol=1e-8, atol=1e-8)
    if interpolant == "linear":
        want = x_s + (t - s) / (e - s) * (x_e - x_s)
    else:
        x0 = (x_e - (1 - a_e).sqrt() * eps) / a_e.sqrt()
        want = a_t.sqrt() * x0 + (1 - a_t).sqrt() * eps
    torch.testing.assert_close(student.x, want, rtol=1e-8, atol=1e-8)


def test_the_papers_other_target_is_eps_in_the_last_window_alone() -> None:
    """`diff_eps`: lambda = 1/g, eta = -sqrt(1 - g^2)/g, g = sqrt(a_s/a_e); at e = 0 that is `ddim_eps`, and so the pair's eps."""
    s = times(0.8, 0.6)
    for e, same in ((times(0, 0), True), (times(0.5, 0.3), False)):
        x_s, x_e = normal(2, 3), normal(2, 3, seed=1)
        g = (SCHEDULES["VariancePreserving"].alpha(s) / SCHEDULES["VariancePreserving"].alpha(e))[:, None]
        theirs = (x_e - x_s / g) / (-(1 - g**2).sqrt() / g)
        assert torch.allclose(theirs, VariancePreserving().through(x_s, x_e, s, e)[1]) == same


@pytest.mark.parametrize("name", ["Flow", "VariancePreserving", "DiscreteVP"])
def test_at_a_windows_start_with_two_substeps_it_is_progressive_distillation(name: str) -> None:
    """The same pair from the same sample: PeRFlow asks for it in the network's kind, progressive distillation for its x0."""
    family = gaussian(name)
    ours = perflow(family, solver_steps=2)
    theirs: Any = toy_method(Progressive, ours.setting)
    torch.testing.assert_close(theirs._steps["student"], ours._steps)
    teacher = toy_roles(ours, family, dtype=torch.float64)["teacher"].predictor
    noted: list[tuple[Tensor, Tensor]] = []

    def student(x: Tensor, t: Tensor, cond: Any, kind: str, path: Path) -> Tensor:
        assert kind == "x0" and path == Flow()
        noted.append((x, t))
        return torch.zeros_like(x)

    models: Any = {"student": student, "teacher": teacher}
    value = theirs.halve(models, Batch(64, {}, data()), rng(64), 0).value.item()
    ((x, t),) = noted
    window = (t[:, None] < ours._steps[:, 0] - 1e-12).sum(1)
    x0, eps = ours.pair(teacher, Batch(64, {}, data()), {}, rng(64), window)
    torch.testing.assert_close(Flow().mix(x0, eps, t), x, rtol=1e-9, atol=1e-9)
    snr = ((1 - t) / t) ** 2
    assert value == pytest.approx((snr.clamp(min=1)[:, None] * x0**2).mean().item(), rel=1e-9)


def test_losses_and_weights() -> None:
    family = gaussian()
    plain = perflow(family)
    student, target = straightened(plain, family)
    t = drawn(plain)[0]

    def value(**config: Any) -> float:
        models: Any = {"teacher": toy_roles(plain, family, dtype=torch.float64)["teacher"].predictor, "student": Noted(family.path, family.kind)}
        return perflow(family, **config).straighten(models, Batch(64, {}, data()), rng(64), 0).value.item()

    assert value() == pytest.approx(target.square().mean().item())
    weight = 1 / (2.3 * (1 - t).clamp(min=0.1))
    assert (t > 0.9).any() and value(weight="reciprocal") == pytest.approx((weight[:, None] * target.square()).mean().item())
    assert value(huber=0.1) == pytest.approx(((target.square() + 0.01).sqrt() - 0.1).mean().item())
    torch.testing.assert_close(student.t, t)
    assert losses.charbonnier(torch.tensor(0.0), 0.1).item() == 0


def test_training_at_the_sampling_times_alone() -> None:
    """Two steps a window: at its start, and inside it on the pair's own line."""
    family = gaussian("DiscreteVP")
    method = perflow(family, windows=2, at="grid")
    student = Noted(family.path, family.kind)
    models: Any = {"teacher": toy_roles(method, family, dtype=torch.float64)["teacher"].predictor, "student": student}
    method.straighten(models, Batch(64, {}, data()), rng(64), 0)
    assert student.t.unique().tolist() == [0.25, 0.5, 0.75, 1.0]
    x0, eps = method.pair(models["teacher"], Batch(64, {}, data()), {}, rng(64), (student.t <= 0.5).long())
    torch.testing.assert_close(student.x, family.path.mix(x0, eps, student.t), rtol=1e-9, atol=1e-9)


# Guidance


@pytest.mark.parametrize("points", ["data", "teacher_trajectory"])
def test_fixed_guidance_is_the_teachers_and_synchronised_guidance_the_samplers(points: str) -> None:
    family = Toy("toy:mixture")
    cond = {"component": torch.tensor([0, 1] * 8)}
    for guidance, calls in (("fixed", 32), ("synchronised", 16)):
        method = perflow(family, steps=2, guidance=guidance, points=points, solver_steps=2, negative="2")
        object.__setattr__(method.setting, "guidance", 3.0)
        teacher = Recorded(toy_roles(method, family, dtype=torch.float64)["teacher"].predictor)
        student = Noted(family.path, family.kind)
        models: Any = {"teacher": teacher, "student": student}
        method.straighten(models, Batch(16, cond, normal(16, 2)), rng(16), 0)
        assert {len(x) for x, _, _ in teacher.inputs} == {calls} and not any(teacher.in_graph)
        assert len(teacher.inputs) == 2 * (2 if points == "teacher_trajectory" else 1)
        dropped = rng(16).uniform("drop") < 0.1
        want = torch.where(dropped, 2, cond["component"]) if guidance == "synchronised" else cond["component"]
        assert student.cond["component"].tolist() == want.tolist() == teacher.inputs[0][2]["component"][-16:].tolist()
        assert dropped.any()
        assert type(method).student_is_guided(method.config) == (guidance == "synchronised")


def test_prompts_are_dropped_where_the_student_is_guided_or_where_it_is_said() -> None:
    configs: list[Any] = [validate(PeRFlow.Config, {"name": "perflow", **keys}, "distiller") for keys in (
        {}, {"guidance": "synchronised"}, {"drop": 0.3}, {"guidance": "synchronised", "drop": 0.0},
    )]  # fmt: skip
    assert [config.share_dropped for config in configs] == [0, 0.1, 0.3, 0]


def test_a_synchronised_student_is_sampled_as_the_teacher_is() -> None:
    guided = plan(Recipe.load("digits_perflow_4step", ["distiller.guidance=synchronised"]))
    assert (guided.guidance, plan(Recipe.load("digits_perflow_4step")).guidance) == (1.5, 1.0)
    assert FlowMatching.student_is_guided(validate(FlowMatchingConfig, {"name": "flow_matching"}))


# Students


class ExactWindows:
    """The velocity on Flow of the pair of each window, for N(MEAN, diag VARIANCE) and samples on the lines of their windows: from x_t back to
    x_s the pair's own line, which for a Gaussian is an affine map, and from there the exact ODE."""

    kind = "velocity"

    def __init__(self, path: Path, edges: list[float]) -> None:
        self.path, self.edges = path, edges

    def __call__(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], kind: Kind = "x0", path: Path | None = None) -> Tensor:
        x0, eps = torch.empty_like(x), torch.empty_like(x)
        for i, value in enumerate(t.tolist()):
            s, e = next((s, e) for s, e in pairwise(self.edges) if e + 1e-9 < value <= s + 1e-9)
            x0[i], eps[i] = self._pair(x[i : i + 1], value, s, e)
        return self.path.predict(x0, eps, t, kind)

    def _pair(self, x: Tensor, t: float, s: float, e: float) -> tuple[Tensor, Tensor]:
        def carried(x_s: Tensor) -> tuple[Tensor, Tensor]:
            (y_s, a), (_, b) = (self.path.retime(x_s, times(u), Flow()) for u in (s, e))
            y_e = gaussian_ode_map(y_s, a.item(), b.item(), SCHEDULES["Flow"], MEAN, VARIANCE.diag())
            return Flow().through(y_s, y_e, a, b)

        def at_t(x_s: Tensor) -> Tensor:
            return self.path.mix(*carried(x_s), times(t))

        base = at_t(torch.zeros_like(x))
        slopes = at_t(torch.ones_like(x)) - base  # the axes are the Gaussian's own
        return carried((x - base) / slopes)


@pytest.mark.parametrize("name", WORLDS)
def test_exact_students_have_no_loss_up_to_the_solvers_error(name: str) -> None:
    family = gaussian(name)
    values = []
    for steps in (8, 32):
        method = perflow(family, windows=2, solver_steps=steps)
        exact = ExactWindows(family.path, method.edges)
        exact.kind = family.kind
        teacher = toy_roles(method, family, dtype=torch.float64)["teacher"].predictor
        models: Any = {"student": exact, "teacher": teacher}
        values.append(method.straighten(models, Batch(64, {}, data()), rng(64), 0).value.item())
    assert values[0] < 0.05
    assert values[0] / values[1] > 8  # Euler's error is of first order, its square of second


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_an_exact_student_samples_the_teachers_ode_however_many_steps_lie_in_a_window(name: str, steps: int) -> None:
    """With two windows, in the stock sampler's steps."""
    family = gaussian(name)
    method = perflow(family, steps=steps, windows=2)
    noise = normal(6, 2, seed=3)
    x = few_step(ExactWindows(family.path, method.edges), noise, method.setting.grid, {}, renoise="euler")
    start, t = family.path.retime(noise, torch.full((6,), family.path.t_max, dtype=torch.float64), Flow())
    want = gaussian_ode_map(start, t[0].item(), 0.0, SCHEDULES["Flow"], MEAN, VARIANCE.diag())
    torch.testing.assert_close(x, want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("points", ["data", "teacher_trajectory"])
@pytest.mark.parametrize("name", ["Flow", "DiscreteVP"])
def test_training_brings_few_steps_to_the_teachers_trajectories(name: str, points: str) -> None:
    path, kind = (STABLE, "v") if name == "DiscreteVP" else WORLDS[name]  # in one step from noise, errors of eps count 14 times
    family = Toy("toy:mixture", path=path, kind=kind, width=32)  # type: ignore[arg-type]
    method = perflow(family, steps=1, solver="heun", solver_steps=6, points=points)
    latents = family.mixture.sample(4000, torch.Generator().manual_seed(0)).float()
    optimizer = optimizer_block(lr=4e-3, schedule="cosine")
    trainer = toy_trainer(method, family, latents=latents, optimizers=optimizer, steps=300, batch_size=64, ema=0.95)
    noise, cond = normal(500, 2, seed=4), {"component": torch.full((500,), -1)}
    fine = sub_times(method.setting, path.t_max, 0.0, 60)[:, None].expand(-1, 500)
    with torch.no_grad():
        exact = integrate(trainer.models["teacher"], method._noisiest(noise), fine, cond, "heun")

    def error() -> float:
        with torch.no_grad(), trainer.ema.applied():
            x = few_step(trainer.models["student"], noise.float(), method.setting.grid, cond, renoise="euler")
        return (x - exact).square().mean().sqrt().item()

    before = error()
    trainer.run([])
    assert error() < before / 1.5


# Mistakes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"windows": 0}, "recipe key distiller.windows: Input should be greater than or equal to 1 (given: 0)"),
        ({"edges": [1, 0.5]}, "recipe key distiller.edges: windows must tile the range: their edges descend from 1 to 0 (given: [1, 0.5])"),
        ({"edges": [0.9, 0.5, 0]}, "recipe key distiller.edges: windows must tile the range"),
        ({"edges": [1, 0.5, 0.5, 0]}, "recipe key distiller.edges: windows must tile the range"),
        ({"edges": [0]}, "recipe key distiller.edges: windows must tile the range"),
        ({"edges": [1, 0], "windows": 1}, "recipe key distiller: windows and edges say the same; remove one of them"),
        ({"solver": "ddim"}, "recipe key distiller.solver: Input should be 'euler' or 'heun' (given: 'ddim')"),
        ({"interpolant": "cubic"}, "recipe key distiller.interpolant: Input should be 'constant' or 'linear' (given: 'cubic')"),
        ({"at": "grid", "times": {"name": "u_shaped"}}, "recipe key distiller.times: not used with at: grid; remove it"),
        ({"drop": 1.5}, "recipe key distiller.drop: Input should be less than or equal to 1 (given: 1.5)"),
        ({"huber": 0}, "recipe key distiller.huber: Input should be greater than 0 (given: 0)"),
    ],
)
def test_mistakes_in_the_config_name_the_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(PeRFlow.Config, {"name": "perflow", **config}, "distiller")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distiller.windows=3"], r"^recipe key distiller\.windows: 3, of which student\.steps 4 is not a multiple"),
        (["distiller.windows=8"], r"^recipe key distiller\.windows: 8, of which student\.steps 4 is not a multiple"),
        (
            ["distiller.windows=null", "distiller.edges=[1, 0.6, 0]"],
            r"^recipe key distiller\.edges: 0\.6 is none of the student's times \[1\.0, 0\.75, 0\.5, 0\.25\], at which a window can begin",
        ),
        (["distiller.windows=null", "distiller.edges=[1, 0.5, 0.499, 0]"], r"^recipe key distiller\.edges: two of .* are at one of the student's"),
        (["distiller.windows=null", "distiller.edges=[1, 0.99, 0]"], r"^recipe key distiller\.edges: 0\.99 is none of"),
        (
            ["student.sampler=stochastic"],
            r"^recipe key student\.sampler: stochastic, but perflow trains steps of the euler or linear_windows sampler alone",
        ),
    ],
)
def test_windows_that_sampling_does_not_hit_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(Recipe.load("digits_perflow_4step", overrides))


def test_data_free_runs_take_prompts() -> None:
    overrides = ["distiller.points=teacher_trajectory", "data.images=null", "data.prompts=fastgen:digits"]
    assert plan(Recipe.load("digits_perflow_4step", overrides)).images is None
    with pytest.raises(UserError, match=r"^recipe key data\.images: perflow does not use it"):
        plan(Recipe.load("digits_perflow_4step", [overrides[0], "data.prompts=fastgen:digits"]))


@pytest.mark.parametrize(
    ("path", "steps", "windows", "refused"),
    [
        (Flow(), 4, 2, False),
        (VarianceExploding(), 4, 2, False),
        (STABLE, 4, 4, False),
        (STABLE, 4, 2, True),
        (TrigFlow(), 4, 1, True),
    ],
)
def test_straight_lines_are_for_straight_paths_or_one_step_a_window(path: Path, steps: int, windows: int, refused: bool) -> None:
    config: Any = validate(PeRFlow.Config, {"name": "perflow", "interpolant": "linear", "windows": windows}, "distiller")
    grid = tuple(path.t_max * (1 - i / steps) for i in range(steps))
    facts = Facts(steps, 1.0, grid, path.t_max, path=path)
    if not refused:
        return PeRFlow.check(config, facts)
    with pytest.raises(UserError, match=r"^recipe key distiller\.interpolant: linear, but .* is curved"):
        PeRFlow.check(config, facts)


def test_a_first_step_inside_its_window_is_no_step_of_a_straight_line() -> None:
    config: Any = validate(PeRFlow.Config, {"name": "perflow", "interpolant": "linear"}, "distiller")
    with pytest.raises(UserError, match=r"^recipe key distiller\.interpolant: linear"):
        PeRFlow.check(config, Facts(2, 1.0, (0.9, 0.5), 1.0, path=STABLE))
