"""sCM against closed forms: the tangent at the optimum and away from it, wrapped teachers of every kind and path, and what is learned."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from toy_runs import MEAN, VARIANCE, optimizer_block, rng, toy_method, toy_roles, toy_setting, toy_trainer, weights

from fastgen import jvp
from fastgen.config import Recipe, validate
from fastgen.denoiser import Predictor
from fastgen.distillers.base import Batch
from fastgen.distillers.points import TRIG, Points, data_points, trig_time
from fastgen.distillers.scm import SCM
from fastgen.errors import UserError
from fastgen.families.toy import Toy
from fastgen.path import KINDS, Flow, Kind, Path, TrigFlow, VarianceExploding, VariancePreserving, expand_time
from fastgen.plan import plan
from fastgen.roles import Roles
from fastgen.timesteps import TimeSampling

PATHS = (Flow(), TrigFlow(), VariancePreserving(), VarianceExploding())


class ExactConsistency:
    """The consistency function of N(MEAN, diag VARIANCE): every x is taken to the end of its ODE, in closed form."""

    path = TRIG

    def __call__(self, x: Tensor, t: Tensor, cond: Any, kind: Kind = "x0", path: Path | None = None) -> Tensor:
        cos, sin = (expand_time(c, x) for c in (torch.cos(t), torch.sin(t)))
        x0 = MEAN + (x - cos * MEAN) * (VARIANCE / (VARIANCE * cos**2 + sin**2)).sqrt()
        assert path == TRIG
        return x0 if kind == "x0" else (cos * x - x0) / sin


def batch(latents: Tensor, component: int = -1) -> Batch:
    return Batch(len(latents), {"component": torch.full((len(latents),), component)}, latents)


def gaussian_data(count: int) -> Tensor:
    return Toy("toy:gaussian").mixture.sample(count, torch.Generator().manual_seed(0))


def disturbed(family: Toy, *names: str, dtype: torch.dtype = torch.float64) -> Roles:
    """All of sCM's roles, the named ones with a residual network that is not zero."""
    roles = toy_roles(SCM, family, dtype=dtype)
    for name in names:
        out: Any = roles[name].denoiser.backbone.out
        generator = torch.Generator().manual_seed(sum(name.encode()))
        nn.init.normal_(out.weight, std=0.3, generator=generator)
        nn.init.normal_(out.bias, std=0.3, generator=generator)
    return roles


def points_of(method: SCM, roles: Roles, count: int = 64, family: Toy | None = None) -> Points:
    latents = (family or Toy("toy:gaussian")).mixture.sample(count, torch.Generator().manual_seed(0))
    return method.draw_points(roles.predictors(), batch(latents), rng(count))


def test_at_the_optimum_the_tangent_is_zero() -> None:
    family = Toy("toy:gaussian")
    method: Any = toy_method(SCM, toy_setting(family))
    points = points_of(method, toy_roles(SCM, family, dtype=torch.float64))
    student = ExactConsistency()
    g = method.tangent(student, points, student(points.x, points.t, points.cond, "velocity", TRIG))
    assert g.abs().max() <= 1e-12
    off = Points(points.x, points.t, points.velocity + 0.1, points.cond)  # so a tangent of zero is not what any input gives
    assert method.tangent(student, off, student(off.x, off.t, off.cond, "velocity", TRIG)).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["exact", "semi_continuous", "finite_difference", "discrete"])
def test_the_tangent_is_cos_t_times_the_total_derivative_of_the_consistency_function(mode: str) -> None:
    """Along the *teacher's* velocity. The data's direction gives another number (a peer's mistake: 37 times off)."""
    family = Toy("toy:mixture")
    keys = {"discrete_step": 1e-5} if mode in ("semi_continuous", "discrete") else {}
    method: Any = toy_method(SCM, toy_setting(family), tangent=mode, **keys)
    roles = disturbed(family, "student")
    points, student = points_of(method, roles, family=family), roles["student"].predictor

    def f(x: Tensor, t: Tensor) -> Tensor:
        return student(x, t, points.cond, "x0", TRIG)

    h = 1e-5
    with torch.no_grad():
        slope = (f(points.x + h * points.velocity, points.t + h) - f(points.x - h * points.velocity, points.t - h)) / (2 * h)
        expected = expand_time(torch.cos(points.t), slope) * slope
        g = method.tangent(student, points, student(points.x, points.t, points.cond, "velocity", TRIG))
        wrong = points_of(toy_method(SCM, toy_setting(family), variant="training"), roles, family=family)  # type: ignore[arg-type]
    assert (g - expected).norm() <= (3e-4 if "disc" in mode or "semi" in mode else 1e-6) * expected.norm()
    assert torch.equal(wrong.x, points.x)
    along_data = method.tangent(student, wrong, student(points.x, points.t, points.cond, "velocity", TRIG))
    assert (along_data - expected).norm() > 0.1 * expected.norm()


def test_the_time_derivative_is_faded_in() -> None:
    family = Toy("toy:mixture")
    roles, method = disturbed(family, "student"), toy_method(SCM, toy_setting(family), warmup=4)
    points = points_of(method, roles, family=family)  # type: ignore[arg-type]
    student, at = roles["student"].predictor, expand_time(torch.cos(points.t) ** 2, points.x)
    prediction = student(points.x, points.t, points.cond, "velocity", TRIG).detach()
    whole, none, half = (method.tangent(student, points, prediction, fade) for fade in (1.0, 0.0, 0.5))  # type: ignore[attr-defined]
    torch.testing.assert_close(none, -at * (prediction - points.velocity))
    torch.testing.assert_close(half, (whole + none) / 2)
    latents = family.mixture.sample(16, torch.Generator().manual_seed(0))
    by_step = [method.updates(s)[0].terms[0](roles.predictors(), batch(latents), rng(16), s).logs["tangent_norm"].item() for s in (0, 3, 4)]
    assert by_step[0] != by_step[1] == by_step[2]


def test_the_loss_descends_along_the_normalised_tangent() -> None:
    """The gradient is that of the inner product of F with -2 g/(|g| + c), averaged over the batch."""
    family = Toy("toy:mixture")
    roles, method = disturbed(family, "student"), toy_method(SCM, toy_setting(family), normaliser=0.3)
    latents = family.mixture.sample(32, torch.Generator().manual_seed(0))
    loss = method.updates(0)[0].terms[0](roles.predictors(), batch(latents), rng(32), 0)
    student = roles["student"].predictor
    own = list(roles["student"].parameters().values())
    actual = torch.autograd.grad(loss.value, own)
    points = method.draw_points(roles.predictors(), batch(latents), rng(32))  # type: ignore[attr-defined]
    prediction = student(points.x, points.t, points.cond, "velocity", TRIG)
    g = method.tangent(student, points, prediction.detach())  # type: ignore[attr-defined]
    unit = g / (g.square().sum(1, keepdim=True).sqrt() + 0.3)
    expected = torch.autograd.grad(-2 * (prediction * unit).sum(1).mean(), own)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    torch.testing.assert_close(loss.value, unit.square().sum(1).mean())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_any_kind_on_any_path_gives_the_trigflow_velocity(path: Path, kind: Kind) -> None:
    teacher = toy_roles(SCM, Toy("toy:gaussian", path=path, kind=kind), dtype=torch.float64)["teacher"].predictor
    t = torch.linspace(0.05, 1.45, 15, dtype=torch.float64)
    x = torch.randn(15, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond = {"component": torch.full((15,), -1)}
    for wanted in ("velocity", "x0", "eps"):
        expected = oracle.gaussian_prediction(wanted, x, t, oracle.SCHEDULES["TrigFlow"], MEAN, torch.diag(VARIANCE))
        actual = teacher(x, t, cond, wanted, TRIG)
        assert (actual - expected).abs().max() <= 1e-10, wanted


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tangent_passes_through_wrapped_students_of_every_kind_and_path(path: Path, kind: Kind) -> None:
    family = Toy("toy:gaussian", path=path, kind=kind)
    roles, method = disturbed(family, "student"), toy_method(SCM, toy_setting(family))
    student: Predictor = roles["student"].predictor
    t = torch.linspace(0.2, 1.3, 12, dtype=torch.float64)
    x, dx = torch.randn(2, 12, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cond = {"component": torch.full((12,), -1)}
    points = Points(x, t, dx, cond)
    with torch.no_grad():
        actual = method._scaled_derivative(student, points, student(x, t, cond, "velocity", TRIG))  # type: ignore[attr-defined]
        h = 1e-6
        slope = (student(x + h * dx, t + h, cond, "velocity", TRIG) - student(x - h * dx, t - h, cond, "velocity", TRIG)) / (2 * h)
    expected = (t.cos() * t.sin())[:, None] * slope
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


def test_times_are_log_normal_noise_ratios_within_the_teachers_path() -> None:
    uniform = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    sampling = TimeSampling(name="logit_normal", mean=-0.4, std=1.3)
    setting = toy_setting(Toy("toy:gaussian"))
    t = trig_time(setting, sampling.quantile(uniform, teacher_shift=3.0))
    expected = -0.4 + torch.log(torch.tensor(3.0, dtype=torch.float64)) + 1.3 * torch.special.ndtri(uniform)
    torch.testing.assert_close(t.tan().log(), expected, rtol=0, atol=1e-6)
    assert t.dtype == torch.float64
    vp = toy_setting(Toy("toy:gaussian", path=VariancePreserving()))
    late = trig_time(vp, torch.tensor([0.5, 1.0]))
    alpha, sigma = VariancePreserving().coeffs(torch.tensor(1.0, dtype=torch.float64))
    assert late[1].item() == pytest.approx(torch.atan2(sigma, alpha).item())
    points = data_points({}, batch(gaussian_data(8)), rng(8), vp, TimeSampling(lo=0.9999), use_teacher=False)
    assert points.t.max() <= late[1]


def test_training_variant_has_no_teacher_and_follows_the_data() -> None:
    family = Toy("toy:gaussian")
    method: Any = toy_method(SCM, toy_setting(family, guidance=3.0), variant="training")
    assert set(method.roles_for(method.config)) == {"student"}
    points = method.draw_points({}, batch(gaussian_data(16)), rng(16))
    x0, eps = TRIG.solve(points.velocity, points.x, points.t, "velocity")
    torch.testing.assert_close(x0, gaussian_data(16))
    torch.testing.assert_close(eps.float(), rng(16).normal("noise", (2,)))


@pytest.mark.parametrize("mode", ["semi_continuous", "discrete", "finite_difference"])
def test_differences_are_taken_in_full_precision(mode: str) -> None:
    """bf16 outputs differ by rounding alone over such steps."""
    family = Toy("toy:mixture")
    roles, plain = disturbed(family, "student", dtype=torch.float32), disturbed(family, "student", dtype=torch.float32)
    roles["student"].denoiser.autocast = torch.bfloat16
    method: Any = toy_method(SCM, toy_setting(family), tangent=mode)
    points = points_of(method, plain, family=family)
    students = [both["student"].predictor for both in (roles, plain)]
    predictions = [student(points.x, points.t, points.cond, "velocity", TRIG).detach() for student in students]
    half, full = (method._scaled_derivative(student, points, own) for student, own in zip(students, predictions, strict=True))
    assert (half - full).norm() <= (0.05 if mode == "semi_continuous" else 1e-6) * full.norm()
    assert roles["student"].denoiser.autocast == torch.bfloat16


def test_both_ends_of_time_have_a_tangent() -> None:
    family = Toy("toy:gaussian")
    for lo in (0.0, 1.0):
        method: Any = toy_method(SCM, toy_setting(family), times={"name": "uniform", "lo": lo, "hi": lo})
        roles, method._checked = disturbed(family, "student"), True  # differences would leave the path there
        assert method.updates(0)[0].terms[0](roles.predictors(), batch(gaussian_data(4)), rng(4), 0).value.isfinite()


def test_guidance_without_a_teacher_is_refused() -> None:
    keys = ["distiller={name: scm, variant: training}", "teacher.guidance=2"]
    with pytest.raises(UserError, match=r"recipe key teacher\.guidance: 2\.0, but distiller\.variant: training"):
        plan(Recipe.load("digits_scm_2step", keys))


def test_the_velocity_is_the_guided_teachers() -> None:
    family = Toy("toy:mixture")
    method: Any = toy_method(SCM, toy_setting(family, guidance=2.5))
    roles = toy_roles(SCM, family, dtype=torch.float64)
    latents = family.mixture.sample(16, torch.Generator().manual_seed(0))
    points = method.draw_points(roles.predictors(), batch(latents, 1), rng(16))
    teacher = roles["teacher"].predictor
    conditional, negative = (teacher(points.x, points.t, {"component": torch.full((16,), c)}, "velocity", TRIG) for c in (1, -1))
    torch.testing.assert_close(points.velocity, negative + 2.5 * (conditional - negative))


class Silent(torch.autograd.Function):
    """Loses the tangent without a word, as an operator without a forward-mode rule may."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return torch.zeros_like(tangents[0])


class Muted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Silent.apply(x)


def test_a_network_whose_tangent_is_wrong_is_refused_at_the_first_step() -> None:
    family = Toy("toy:mixture")
    roles, method = disturbed(family, "student"), toy_method(SCM, toy_setting(family))
    backbone: Any = roles["student"].denoiser.backbone
    backbone.out = nn.Sequential(backbone.out, Muted())
    latents = family.mixture.sample(8, torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="Muted"):
        method.updates(0)[0].terms[0](roles.predictors(), batch(latents), rng(8), 0)


def test_the_check_runs_once_and_only_for_exact_tangents(monkeypatch: pytest.MonkeyPatch) -> None:
    family, checks = Toy("toy:mixture"), []
    monkeypatch.setattr(jvp, "check_tangent", lambda *args, **kwargs: checks.append(args))
    monkeypatch.setattr(jvp, "check_precision", lambda *args: None)
    latents = family.mixture.sample(64, torch.Generator().manual_seed(0)).float()
    for mode, count in (("exact", 1), ("discrete", 0), ("finite_difference", 0)):
        checks.clear()
        trainer = toy_trainer(toy_method(SCM, toy_setting(family), tangent=mode), family, latents=latents)
        trainer.run([])
        assert len(checks) == count


def test_replays_use_the_same_points_with_the_student_as_it_is_then() -> None:
    family = Toy("toy:mixture")
    method: Any = toy_method(SCM, toy_setting(family), replay=3)
    assert [update.terms[0].__name__ for update in method.updates(0)] == ["consistency", "replayed", "replayed"]
    roles = toy_roles(SCM, family)
    first, latents = rng(8), family.mixture.sample(8, torch.Generator().manual_seed(0))
    method.consistency(roles.predictors(), batch(latents), first, 0)
    same = method.replayed({"student": roles["student"].predictor}, batch(latents + 1), rng(8, scope=1), 0)
    assert torch.equal(same.value, method.consistency(roles.predictors(), batch(latents), first, 0).value)


@pytest.mark.parametrize("replay", [1, 2])
def test_micro_batches_do_not_change_an_update(replay: int) -> None:
    family = Toy("toy:mixture")
    latents = family.mixture.sample(64, torch.Generator().manual_seed(0)).float()
    # Plain SGD, as Adam's first steps have one size for every gradient, also for one that is rounding alone.
    runs, sgd = [], optimizer_block(name="sgd", lr=0.1, betas=(0.0, 0.0))
    for micro in (None, 2):
        method = toy_method(SCM, toy_setting(family), replay=replay)
        trainer = toy_trainer(method, family, latents=latents, optimizers=sgd, micro_batch=micro, steps=2)
        start = weights(trainer)
        trainer.run([])
        runs.append(weights(trainer))
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], rtol=1e-4, atol=1e-6, msg=name)
    assert max(float((value - start[name]).abs().max()) for name, value in runs[0].items()) > 1e-2


def test_a_learned_log_variance_levels_the_noise_levels_and_is_left_behind() -> None:
    family = Toy("toy:mixture")
    plain, learned = (toy_method(SCM, toy_setting(family), log_variance=flag) for flag in (False, True))
    latents = family.mixture.sample(256, torch.Generator().manual_seed(0)).float()
    values = []
    for method in (plain, learned):
        roles = toy_roles(method, family)
        values.append(method.updates(0)[0].terms[0](roles.predictors(), batch(latents), rng(256), 0).value)
    torch.testing.assert_close(values[0], values[1])  # it starts at zero
    trainer = toy_trainer(learned, family, latents=latents, optimizers=optimizer_block(lr=1e-2), steps=150, batch_size=256)
    names = {name for name in trainer.roles["student"].parameters() if name.startswith("log_variance.")}
    assert names == {f"log_variance.{layer}.{what}" for layer in ("hidden", "out") for what in ("weight", "bias")}
    network: Any = trainer.roles["student"].denoiser
    for name, parameter in trainer.roles["student"].parameters().items():
        parameter.requires_grad_(name in names)
    frozen = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    trainer.parameters["student"] = [value for name, value in trainer.roles["student"].parameters().items() if name in names]
    trainer.optimizers["student"] = torch.optim.Adam(trainer.parameters["student"], lr=1e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.roles, "training", lambda *_: nullcontext())
        trainer.run([])
    assert all(torch.equal(value, frozen[name]) for name, value in network.backbone.state_dict().items())
    points = learned.draw_points(trainer.models, batch(latents), rng(256, 9))  # type: ignore[attr-defined]
    student = trainer.models["student"]
    with torch.no_grad():
        output = student.output(points.x, points.t, points.cond, "velocity", TRIG)
        g = learned.tangent(student, points, output.prediction)  # type: ignore[attr-defined]
        errors = (g / (g.norm(dim=1, keepdim=True) + 0.1)).square().sum(1)
        level = errors * torch.exp(-output.log_variance)  # type: ignore[operator]
    late = points.t > points.t.median()
    before = errors[late].mean() / errors[~late].mean()
    after = level[late].mean() / level[~late].mean()
    assert abs(after.log()) < 0.5 * abs(before.log())
    assert level.mean() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"variant": "training", "points": "teacher_trajectory"}, "points: teacher_trajectory has none"),
        ({"points": "teacher_trajectory", "times": {"mean": 1.0}}, "times: not used with points: teacher_trajectory"),
        ({"trajectory": {"evaluations": 8}}, "trajectory: not used with points: data"),
        ({"discrete_step": 0.1}, "discrete_step: not used with tangent: exact"),
        ({"tangent": "jvp"}, "distiller.tangent"),
        ({"normaliser": 0}, "distiller.normaliser"),
        ({"replay": 0}, "distiller.replay"),
        ({"trajectory": {"evaluations": 1}}, "distiller.trajectory.evaluations"),
        ({"warm_up": 3}, "did you mean 'warmup'"),
    ],
)
def test_a_mistake_in_the_block_names_its_key(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        validate(SCM.Config, {"name": "scm", **keys}, "distiller")
