"""Reflow: lines through sampling's own start, straight students exact on every path, RF++'s distances written out, SlimFlow's noise and targets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pair_sets import samples_of
from torch import Tensor
from toy_runs import CPU, MEAN, VARIANCE, normal, optimizer_block, rng, toy_method, toy_setting, toy_trainer

from fastgen.config import validate
from fastgen.data import training
from fastgen.data.encoded import Keeping
from fastgen.data.pairs import TeacherSampler, make_pairs
from fastgen.data.training import PairBatch
from fastgen.denoiser import Denoiser, Predictor
from fastgen.distillers import premetrics
from fastgen.distillers.base import Batch, Facts
from fastgen.distillers.premetrics import PerceptualConfig, VelocityConfig
from fastgen.distillers.reflow import FLOW, Line, Reflow, ReflowConfig, line_of, start_time
from fastgen.distillers.slimflow import AnnealConfig, SlimFlow, SlimFlowConfig
from fastgen.errors import UserError
from fastgen.families.toy import Mixture, Toy
from fastgen.path import DiscreteVP, Flow, Kind, Path, TrigFlow, VarianceExploding, VariancePreserving
from fastgen.sampling import few_step, initial
from fastgen.straightness import flow_times, follow
from fastgen.timesteps import TimeSampling

STABLE = DiscreteVP.scaled_linear(1000, 0.00085, 0.012)  # SD 1.x, which ends at flow time .936
PATHS: list[tuple[Path, Kind]] = [
    (Flow(), "velocity"),
    (TrigFlow(), "velocity"),
    (VariancePreserving(), "eps"),
    (STABLE, "eps"),
    (VarianceExploding(), "x0"),
]
NAMES = [type(path).__name__ for path, _ in PATHS]


def map_of(path: Path, noise: Tensor, start: Tensor) -> Tensor:
    """Where the probability-flow ODE of toy:gaussian leads from unit noise (B, 2)."""
    alpha, sigma = path.coeffs(start)
    x = noise * path.prior_scale(start)
    return MEAN + (VARIANCE / (alpha**2 * VARIANCE + sigma**2)).sqrt() * (x - alpha * MEAN)


def pairs_of(family: Toy, grid: Tensor, count: int = 6) -> PairBatch:
    noise = normal(count, 2)
    return PairBatch(noise, map_of(family.path, noise, grid[:1]), family.encode_prompts([""] * count))


class Straight:
    """The exact straight field between toy:gaussian's map and its lines' noise, as a student of one kind on one path, in closed form: both ends
    of a line are affine in the pair's noise, so x_t tells which line it is on."""

    def __init__(self, path: Path, kind: Kind, start: Tensor, noise: Any = None) -> None:
        self.path, self.kind = path, kind
        probe = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
        x0 = map_of(path, probe, start)
        alpha, sigma = path.coeffs(start)
        z = (probe * path.prior_scale(start) - alpha * x0) / sigma if noise is None else noise(probe)
        self.x0, self.z = (x0[0], x0[1] - x0[0]), (z[0], z[1] - z[0])  # value and slope in the pair's noise

    def ends(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, noise) of the line that passes x at flow time t."""
        t = t[:, None]
        value, slope = ((1 - t) * x0 + t * z for x0, z in zip(self.x0, self.z, strict=True))
        unit = (x - value) / slope
        return self.x0[0] + self.x0[1] * unit, self.z[0] + self.z[1] * unit

    def __call__(self, x: Tensor, t: Tensor, cond: Any, kind: Kind = "x0", path: Path | None = None) -> Tensor:
        x_flow, t_flow = self.path.retime(x, t, FLOW) if path is None else (x, t)
        x0, noise = self.ends(x_flow, t_flow)
        return (self.path if path is None else path).predict(x0, noise, t, kind)


@pytest.mark.parametrize(("path", "kind"), PATHS, ids=NAMES)
def test_a_straight_student_is_exact_in_any_number_of_steps(path: Path, kind: Kind) -> None:
    family = Toy("toy:gaussian", path=path, kind=kind)
    for steps in (1, 2, 4):
        grid = family.grid(steps).double()
        pairs, student = pairs_of(family, grid), Straight(path, kind, grid[:1])
        drawn = few_step(student, pairs.noise, grid, pairs.cond, renoise="euler")
        assert (drawn - pairs.x0).abs().max() < 1e-12
        line = line_of(pairs, toy_setting(family, steps=steps))
        t = torch.rand(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * start_time(toy_setting(family, steps=steps))
        torch.testing.assert_close(student(line.at(t), t, pairs.cond, "velocity", FLOW), line.velocity, rtol=0, atol=1e-10)
        start = initial(path, pairs.noise, grid)
        x_flow, t_flow = path.retime(start, grid[:1].expand(6), FLOW)
        torch.testing.assert_close(line.at(t_flow), x_flow, rtol=0, atol=1e-10)  # it passes what sampling starts from


def test_lines_from_the_pairs_own_noise_are_wrong_where_the_path_ends_early() -> None:
    """On SD 1.x's table the same student with lines from z lands off by some hundredths at any number of steps; on Flow both are the same."""
    errors = {}
    for path, kind in (PATHS[3], PATHS[0]):
        family = Toy("toy:gaussian", path=path, kind=kind)
        for steps in (1, 4):
            grid = family.grid(steps).double()
            pairs, student = pairs_of(family, grid, 400), Straight(path, kind, grid[:1], noise=lambda z: z)
            drawn = few_step(student, pairs.noise, grid, pairs.cond, renoise="euler")
            errors[type(path).__name__, steps] = (drawn - pairs.x0).square().mean().sqrt().item()
    assert errors["DiscreteVP", 1] > 0.01 and errors["DiscreteVP", 4] > 0.01
    assert errors["Flow", 1] < 1e-12 and errors["Flow", 4] < 1e-12


@pytest.mark.parametrize(("path", "kind"), PATHS[:4], ids=NAMES[:4])
def test_the_loss_is_the_distance_from_the_line_at_its_points(path: Path, kind: Kind) -> None:
    family = Toy("toy:gaussian", path=path, kind=kind)
    method: Any = toy_method(Reflow, toy_setting(family))
    pairs, random = pairs_of(family, method.setting.grid), rng(6)
    batch = Batch(6, pairs.cond, pairs=pairs)
    straight = Straight(path, kind, method.setting.grid[:1])
    assert method.straighten({"student": straight}, batch, random, 0).value < 1e-12

    class Off(Straight):
        def __call__(self, *given: Any) -> Tensor:
            return super().__call__(*given) + torch.tensor([0.3, -0.4])

    assert method.straighten({"student": Off(path, kind, method.setting.grid[:1])}, batch, random, 0).value.item() == pytest.approx(0.125, rel=1e-5)


def test_times_end_where_sampling_begins_and_never_reach_what_no_network_knows() -> None:
    many = rng(4000)
    for (path, kind), last, first in [(PATHS[0], 1.0, 1e-5), (PATHS[3], 0.9363, 0.0284)]:
        method: Any = toy_method(Reflow, toy_setting(Toy("toy:gaussian", path=path, kind=kind)))
        t = method.times(many)
        assert start_time(method.setting) == pytest.approx(last, abs=1e-3)
        assert t.max() <= start_time(method.setting) and t.min() >= first * 0.99
        assert t.mean().item() == pytest.approx(last / 2, abs=0.02)
    method = toy_method(Reflow, toy_setting(Toy("toy:gaussian")), times={"lo": 1.0, "hi": 1.0})
    assert method.times(many).eq(1).all()  # one-step distillation


def test_the_u_has_its_published_weight_at_the_ends_whatever_the_teachers_shift() -> None:
    sampling = validate(ReflowConfig, {"name": "reflow", "times": {"name": "u_shaped"}}, "distiller").times
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = sampling.quantile(u, teacher_shift=5.0)
    assert (t < 0.1).double().mean().item() == pytest.approx(0.1725, abs=1e-4)
    assert (t > 0.9).double().mean().item() == pytest.approx(0.1725, abs=1e-4)
    flat = TimeSampling(name="u_shaped", a=0.01, shift=1.0).quantile(u, teacher_shift=1.0)
    assert (flat - u).abs().max() < 1e-5
    steep = TimeSampling(name="u_shaped", a=10, shift=1.0).quantile(u, teacher_shift=1.0)
    density = torch.cosh(10 * (u - 0.5))
    expected = (density.cumsum(0) / density.sum())[9_999]
    assert (steep < 0.1).double().mean().item() == pytest.approx(expected.item(), abs=1e-3)


# Distances


def test_distances_of_velocities_are_those_of_the_released_code() -> None:
    prediction, target, t = normal(5, 3, 4, 4), normal(5, 3, 4, 4, seed=1), torch.tensor([0.1, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    square = (prediction - target).flatten(1).square().sum(1)
    c = 0.00054 * 48
    torch.testing.assert_close(premetrics.velocity_distance(VelocityConfig(), prediction, target, t), square / 48)
    huber = VelocityConfig(metric="huber", weight="one_minus_t")
    torch.testing.assert_close(premetrics.velocity_distance(huber, prediction, target, t), (1 - t) * ((square + c**2).sqrt() - c) / 48)
    wide = VelocityConfig(metric="huber", c=100)  # near 0 it is half the square over c D, over D
    small = premetrics.velocity_distance(wide, prediction, target, t)
    torch.testing.assert_close(small, square / (2 * 100 * 48 * 48), rtol=1e-3, atol=0)


def doubled(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of the tests' own."""
    return 2 * pixels.flatten(1), pixels.mean((1, 2, 3))[:, None]


def unfit(pixels: Tensor) -> Tensor:
    return pixels.mean()


FEATURES = f"{__name__}:doubled"


def pictured(method: type[Reflow] = Reflow, **keys: Any) -> Any:
    """A method whose samples are pictures (3, 2, 2) that decode to their half."""
    setting = replace(toy_setting(Toy("toy:gaussian")), shape=(3, 2, 2), decode=lambda x: x / 2)
    return toy_method(method, setting, **keys)


class Always:
    """A student of one velocity."""

    path = Flow()

    def __init__(self, velocity: Tensor) -> None:
        self.velocity = velocity.requires_grad_()

    def __call__(self, *_: Any) -> Tensor:
        return self.velocity


def test_pictures_are_compared_decoded_with_their_weights_and_gradients() -> None:
    x0, noise, velocity = (normal(4, 3, 2, 2, seed=seed).float() for seed in range(3))
    line, t = Line(noise, x0, {}), torch.tensor([0.25, 0.5, 1.0, 0.75])
    student = Always(velocity)
    predicted = line.at(t) - t[:, None, None, None] * velocity.detach()
    difference = (predicted - x0) / 2
    expected = ((2 * difference).square().flatten(1).mean(1) + difference.mean((1, 2, 3)).square()) / 2
    of_velocity = (velocity.detach() - (noise - x0)).square().flatten(1).mean(1)
    for weight, factor in (("constant", torch.ones(4)), ("inverse_time", 1 / t)):
        method = pictured(perceptual={"metric": FEATURES, "weight": weight, "scale": 3.0})
        loss = method.distance(student, line, t, 0)
        torch.testing.assert_close(loss.logs["perceptual"], 3 * factor * expected)
        torch.testing.assert_close(loss.value, (of_velocity + 3 * factor * expected).mean())
    (gradient,) = torch.autograd.grad(loss.value, student.velocity)
    moved = velocity.detach() - 1e-3 * gradient
    assert method.distance(Always(moved), line, t, 0).value < loss.value


def test_pictures_count_from_the_step_that_is_asked_for_and_alone_if_so() -> None:
    line, t = Line(normal(2, 3, 2, 2).float(), normal(2, 3, 2, 2, seed=1).float(), {}), torch.tensor([0.5, 1.0])
    student = Always(torch.zeros(2, 3, 2, 2))
    for alone in (False, True):
        method = pictured(perceptual={"metric": FEATURES, "after": 5, "alone": alone})
        before, then = (method.distance(student, line, t, step) for step in (4, 5))
        assert "perceptual" not in before.logs
        torch.testing.assert_close(before.value, before.logs["velocity"].mean())
        rest = 0 if alone else then.logs["velocity"].mean()
        torch.testing.assert_close(then.value, then.logs["perceptual"].mean() + rest)


@pytest.mark.parametrize("name", ["digits", "scenes"])
def test_bundled_features_see_a_difference_and_are_not_the_judges(name: str) -> None:
    from fastgen.assets import DIGITS_CLASSIFIER, DIGITS_FEATURES, SCENES_CLASSIFIER, SCENES_FEATURES
    from fastgen.feature_distance import load_distance

    size = {"digits": 8, "scenes": 16}[name]
    distance = load_distance(f"fastgen:{name}")
    a = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    b = a.clone().requires_grad_()
    assert distance(a, a).abs().max() == 0
    apart = distance(a, (b * 0.5).clamp(0, 1))
    assert apart.shape == (3,) and bool((apart > 0).all())
    apart.sum().backward()
    assert b.grad is not None and bool(b.grad.abs().sum() > 0)
    judge, ours = {"digits": (DIGITS_CLASSIFIER, DIGITS_FEATURES), "scenes": (SCENES_CLASSIFIER, SCENES_FEATURES)}[name]
    assert (judge / "model.safetensors").read_bytes() != (ours / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("metric", "picture", "message"),
    [
        ("fastgen:digits", (3, 16, 16), r"fastgen:digits looks at pictures \(3, 8, 8\), the teacher's are \(3, 16, 16\)"),
        ("fastgen:digits", (2,), r"fastgen:digits compares pictures \(3, H, W\), the teacher's samples are \(2,\)"),
        ("fastgen:faces", (3, 8, 8), r"no bundled features 'fastgen:faces'"),
        ("lpips", (2,), r"lpips compares pictures"),
        ("psnr", (3, 8, 8), r"'psnr' is none of fastgen:digits, fastgen:scenes, module:function"),
        ("./nowhere.py:f", (3, 8, 8), r"no file '\./nowhere\.py'"),
        (f"{__name__}:nothing", (3, 8, 8), r"has no 'nothing'"),
    ],
)
def test_metrics_that_cannot_be_had_are_refused_before_anything_is_loaded(metric: str, picture: tuple[int, ...], message: str) -> None:
    facts = Facts(1, 1.0, (1.0,), 1.0, picture=picture, train_steps=9)
    config: Any = validate(ReflowConfig, {"name": "reflow", "perceptual": {"metric": metric}}, "distiller")
    with pytest.raises(UserError, match=rf"recipe key distiller\.perceptual\.metric: .*{message}"):
        Reflow.check(config, facts)


def test_a_metric_that_returns_something_else_is_named() -> None:
    method = pictured(perceptual={"metric": f"{__name__}:unfit"})
    line = Line(torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2), {})
    with pytest.raises(UserError, match=r"distiller\.perceptual\.metric: '.*:unfit' returned \[\(\)\] for 2 pictures"):
        method.distance(Always(torch.zeros(2, 3, 2, 2)), line, torch.ones(2), 0)


def broken(pixels: Tensor) -> Tensor:
    raise OverflowError("too\nbright")


def test_what_a_metric_raises_is_one_line() -> None:
    method = pictured(perceptual={"metric": f"{__name__}:broken"})
    line = Line(torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2), {})
    with pytest.raises(UserError, match=r"distiller\.perceptual\.metric: '.*:broken' raised OverflowError: too bright"):
        method.distance(Always(torch.zeros(2, 3, 2, 2)), line, torch.ones(2), 0)


def test_times_that_teach_what_sampling_does_not_ask_are_refused() -> None:
    facts = Facts(4, 1.0, (1.0, 0.75, 0.5, 0.25), 1.0, picture=(3, 8, 8), train_steps=9)
    for times, message in (({"lo": 1.0}, r"lo: 1 trains the noise end alone, but student\.steps 4"), ({"lo": 0.0, "hi": 0.0}, r"hi: 0 is where")):
        config: Any = validate(ReflowConfig, {"name": "reflow", "times": times}, "distiller")
        with pytest.raises(UserError, match=rf"recipe key distiller\.times\.{message}"):
            Reflow.check(config, facts)


def test_a_metric_is_identified_by_its_file() -> None:
    config = PerceptualConfig(metric=FEATURES)
    given = ReflowConfig(name="reflow", perceptual=config)
    assert set(Reflow.files(given)) == {"distiller.perceptual.metric"}
    assert Reflow.files(ReflowConfig(name="reflow")) == {}


# SlimFlow


def test_annealed_noise_begins_foreign_ends_as_the_pairs_own_and_keeps_its_variance() -> None:
    for schedule in ("linear", "cosine"):
        anneal = AnnealConfig(steps=100, schedule=schedule)
        assert [anneal.share(step) for step in (0, 100, 250)] == [1.0, 0.0, 0.0]
        assert anneal.share(50) == pytest.approx(0.5)
    method: Any = toy_method(SlimFlow, toy_setting(Toy("toy:gaussian")), anneal={"steps": 10})
    noise = normal(20_000, 2).float()
    pairs, random = PairBatch(noise, torch.zeros_like(noise), {}), rng(20_000)
    for step in (0, 3, 7, 10):
        blended = method.line(pairs, random, step).noise
        correlation = (blended * noise).mean().item() / noise.square().mean().item()
        assert blended.std().item() == pytest.approx(1, abs=0.02)
        assert correlation == pytest.approx(math.sqrt(1 - (1 - step / 10) ** 2), abs=0.02)
    assert torch.equal(blended, noise)


def test_pairs_are_mirrored_together() -> None:
    method: Any = toy_method(SlimFlow, replace(toy_setting(Toy("toy:gaussian")), shape=(3, 2, 2)), flip=True)
    noise, x0 = normal(64, 3, 2, 2), normal(64, 3, 2, 2, seed=1)
    line = method.line(PairBatch(noise, x0, {}), rng(64), 0)
    mirrored = (line.noise == noise.flip(-1)).flatten(1).all(1)
    assert 16 < int(mirrored.sum()) < 48
    assert torch.equal(line.x0, torch.where(mirrored[:, None, None, None], x0.flip(-1), x0))
    assert torch.equal(line.noise[~mirrored], noise[~mirrored])


@pytest.mark.parametrize(("path", "kind"), [PATHS[0], PATHS[3]], ids=[NAMES[0], NAMES[3]])
def test_the_two_step_target_is_the_students_half_and_the_teachers_rest(path: Path, kind: Kind) -> None:
    """A straight student and teacher agree with themselves; a teacher that is off by d in velocity moves the target by half-way time times d."""
    family = Toy("toy:gaussian", path=path, kind=kind)
    method: Any = toy_method(SlimFlow, toy_setting(family), two_step={"lo": 0.4, "hi": 0.4})
    assert set(method.roles_for(method.config)) == {"student", "teacher"}
    assert set(SlimFlow.roles_for(SlimFlowConfig(name="slimflow"))) == {"student"}
    assert len(method.updates(0)[0].terms) == 2
    straight = Straight(path, kind, method.setting.grid[:1])

    class Off(Straight):
        def __call__(self, *given: Any) -> Tensor:
            return super().__call__(*given) + torch.tensor([0.3, -0.4])

    batch, random = Batch(6, family.encode_prompts([""] * 6)), rng(6)
    assert method.two_steps({"student": straight, "teacher": straight}, batch, random, 0).value < 1e-10
    off = method.two_steps({"student": straight, "teacher": Off(path, kind, method.setting.grid[:1])}, batch, random, 0)
    # x0 is off by -.4 T d; the line's velocity from its start at T by that over T, with the other sign.
    assert off.value.item() == pytest.approx(0.4**2 * 0.125, rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"anneal": {"steps": 10}}, r"anneal\.steps: 10, but training ends after train\.steps 9"),
        ({"flip": True}, r"flip: the teacher's samples are vectors"),
        ({"perceptual": {"metric": FEATURES, "after": 9}}, r"perceptual\.after: 9 leaves none of train\.steps 9"),
    ],
)
def test_what_does_not_fit_the_rest_is_refused(keys: dict[str, Any], message: str) -> None:
    config: Any = validate(SlimFlowConfig, {"name": "slimflow", **keys}, "distiller")
    facts = Facts(1, 1.0, (1.0,), 1.0, picture=(2,) if "flip" in keys else (3, 8, 8), train_steps=9)
    with pytest.raises(UserError, match=rf"recipe key distiller\.{message}"):
        SlimFlow.check(config, facts)
    with pytest.raises(UserError, match=r"distiller\.two_step: lo must not exceed hi"):
        validate(SlimFlowConfig, {"name": "slimflow", "two_step": {"lo": 0.9}}, "distiller")


# Training


def trained(method: str, steps: int = 600, **keys: Any) -> tuple[float, float]:
    """(squared error of one student step, of the teacher's one step) from the teacher's own many-step samples of two modes."""
    family = Toy("toy:mixture")
    teacher = toy_trainer(toy_method(SlimFlow, toy_setting(family), two_step={}), family).models["teacher"]
    sampler = TeacherSampler(teacher, family.grid(60), (2,), "heun")
    chosen: Any = {"reflow": Reflow, "slimflow": SlimFlow}[method]
    trainer = toy_trainer(
        toy_method(chosen, replace(toy_setting(family), train_steps=steps), **keys),
        family,
        optimizers=optimizer_block(name="adam", lr=2e-3),
        steps=steps,
        batch_size=256,
        ema=0.98,
    )
    trainer.data = training.with_pairs(
        trainer.data.parts[0], make_pairs(sampler, family.encode_prompts, {"": 1.0}, range(4096), seed=1, batch=4096), family, Keeping(CPU)
    )
    trainer.run([])
    trainer.ema.settle()
    fresh = make_pairs(sampler, family.encode_prompts, {"": 1.0}, range(512), seed=2, batch=512)
    noise, cond = fresh.select(torch.arange(512))[0], family.encode_prompts([""] * 512)
    with torch.no_grad():
        errors = [
            (few_step(predict, noise, family.grid(1), cond, renoise="euler") - samples_of(fresh)).square().mean().item()
            for predict in (trainer.models["student"], teacher)
        ]
    return errors[0], errors[1]


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("reflow", {}),
        ("reflow", {"times": {"name": "u_shaped"}, "velocity": {"metric": "huber", "weight": "one_minus_t", "c": 0.01}}),
        ("slimflow", {"anneal": {"steps": 200}}),
    ],
    ids=["reflow", "rfpp", "slimflow"],
)
def test_a_straightened_student_lands_in_one_step_where_its_teacher_lands_in_many(method: str, keys: dict[str, Any]) -> None:
    student, teacher = trained(method, **keys)
    assert student < teacher / 3


def test_reflow_straightens_two_modes() -> None:
    """The page's own toy: S falls from .59 to a few thousandths, and the error of one step by more than twenty times."""
    family = Toy(Mixture([0.5, 0.5], [[2.0, 0.0], [-2.0, 0.0]], [[0.09, 0.09]] * 2), width=128)
    teacher = Predictor(Denoiser(family.load_backbone(), family), family)
    sampler = TeacherSampler(teacher, family.grid(60), (2,), "heun")
    trainer = toy_trainer(
        toy_method(Reflow, replace(toy_setting(family), train_steps=1500)),
        family,
        optimizers=optimizer_block(name="adam", lr=2e-3, schedule="cosine"),
        steps=1500,
        batch_size=256,
        ema=0.98,
    )
    pairs = make_pairs(sampler, family.encode_prompts, {"": 1.0}, range(8192), seed=1, batch=8192)
    trainer.data = training.with_pairs(trainer.data.parts[0], pairs, family, Keeping(CPU))
    trainer.run([])
    trainer.ema.settle()
    fresh = make_pairs(sampler, family.encode_prompts, {"": 1.0}, range(1024), seed=2, batch=1024)
    noise, cond = fresh.select(torch.arange(1024))[0], family.encode_prompts([""] * 1024)
    curvature, error = [], []
    with torch.no_grad():
        for predict in (teacher, trainer.models["student"]):
            curvature.append(follow(predict, noise, flow_times(FLOW, 64), cond).curvature.mean().item() / 2)
            error.append((few_step(predict, noise, family.grid(1), cond, renoise="euler") - samples_of(fresh)).square().mean().item())
    assert curvature[0] == pytest.approx(0.59, abs=0.05) and curvature[1] < 0.02
    assert error[1] < error[0] / 20


def test_bundled_features_are_compared_as_lpips_compares_its_own() -> None:
    """Sums over channels of unit vectors' squared differences, averaged over positions, then over layers."""
    from fastgen.assets import DIGITS_FEATURES
    from fastgen.assets.classifier import load_classifier
    from fastgen.feature_distance import load_distance

    network, images = load_classifier(DIGITS_FEATURES), torch.rand(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = []
    x, y = (2 * each.mean(1, keepdim=True) - 1 for each in images)
    for module in network.trunk:
        x, y = module(x), module(y)
        if isinstance(module, torch.nn.ReLU):
            apart = torch.nn.functional.normalize(x, dim=1) - torch.nn.functional.normalize(y, dim=1)
            expected.append(apart.square().sum(1).flatten(1).mean(1) if apart.ndim > 2 else apart.square().sum(1))
    torch.testing.assert_close(load_distance("fastgen:digits")(*images), torch.stack(expected).mean(0), rtol=1e-4, atol=1e-6)
