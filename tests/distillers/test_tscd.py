"""TSCD: where segments begin, when stages change, the jump and its target by hand, and students that are exact on every segment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import SCHEDULES, gaussian_ode_map
from torch import Tensor
from toy_runs import MEAN, VARIANCE, Recorded, normal, rng, toy_method, toy_roles, toy_setting, toy_trainer

from fastgen.config import Recipe, validate
from fastgen.distillers.base import Batch
from fastgen.distillers.solver import draw_step
from fastgen.distillers.tscd import TSCD
from fastgen.errors import UserError
from fastgen.families.toy import Toy
from fastgen.path import Flow, Path, TrigFlow, VarianceExploding, VariancePreserving
from fastgen.plan import plan
from fastgen.sampling import few_step, ode

FLOW = SCHEDULES["Flow"]


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tscd(family: Toy, *, grid: Any = None, steps: int = 1, **config: Any) -> Any:
    return toy_method(TSCD, toy_setting(family, steps=steps, grid=grid), **config)


def test_segments_begin_at_the_students_own_times() -> None:
    method = tscd(Toy("toy:gaussian"), grid=[1.0, 0.8, 0.5, 0.2], stages=[{"segments": 4}])
    torch.testing.assert_close(method.boundaries(4), times(0, 0.2, 0.5, 0.8))
    torch.testing.assert_close(method.boundaries(2), times(0, 0.5))
    torch.testing.assert_close(method.boundaries(1), times(0))
    torch.testing.assert_close(method.boundaries(8), times(0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9))
    torch.testing.assert_close(method.starts(times(1, 0.81, 0.8, 0.5001, 0.5, 0.1), 4), times(0.8, 0.8, 0.5, 0.5, 0.2, 0))


@pytest.mark.parametrize("path", [TrigFlow(), VariancePreserving(), VarianceExploding()], ids=lambda path: type(path).__name__)
def test_segments_are_flow_times_on_every_path(path: Path) -> None:
    fractions = torch.tensor([0.9, 0.4], dtype=torch.float64)
    grid = path.time(Flow().ratio(fractions)) / path.t_max
    method = tscd(Toy("toy:gaussian", path=path), grid=grid.tolist(), stages=[{"segments": 2}])
    torch.testing.assert_close(method.boundaries(2), times(0, 0.4))


@pytest.mark.parametrize("unit", [1, 3e5, 1e-6])
def test_stages_take_their_shares_of_the_run(unit: float) -> None:
    shares = [{"segments": 8, "share": unit}, {"segments": 4, "share": unit}, {"segments": 1, "share": 3 * unit}]
    method = tscd(Toy("toy:gaussian"), stages=shares)
    object.__setattr__(method.setting, "train_steps", 10)
    assert [method.segments_at(step) for step in range(10)] == [8] * 2 + [4] * 2 + [1] * 6
    assert method.segments_at(10) == 1


@pytest.mark.parametrize("target", ["random", "start"])
def test_the_jump_and_its_target_by_hand(target: str) -> None:
    """DDIM by its definition: x0 and eps of the prediction, mixed at s. At the start of a segment the target is the teacher's sample."""
    family = Toy("toy:mixture")
    setting = toy_setting(family, steps=2, guidance=2.0, negative="2")
    method: Any = toy_method(TSCD, setting, num_times=40, skip=8, stages=[{"segments": 2}], target=target)
    roles = toy_roles(method, family, dtype=torch.float64)
    torch.nn.init.normal_(roles["student"].denoiser.backbone.out.weight, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr, arg-type]
    student, teacher = roles["student"].predictor, Recorded(roles["teacher"].predictor)
    latents, cond = normal(64, 2), {"component": torch.arange(64) % 2}
    loss = method.consistency({"student": student, "teacher": teacher}, Batch(64, cond, latents), rng(64), 0)
    t, t_next = draw_step(method.config, setting, rng(64))
    start = torch.where(t > 0.5, 0.5, 0.0).double()
    t_next = torch.maximum(t_next, start)
    s = start + (rng(64).uniform("target") * (t_next - start) if target == "random" else 0)
    done = t_next == start
    assert 0 < done.sum() < 64 and (start <= s).all() and (s <= t_next).all()
    x = (1 - t)[:, None] * latents + t[:, None] * rng(64).normal("noise", (2,))

    def ddim(predict: Any, x: Tensor, t: Tensor, to: Tensor, cond: Any) -> Tensor:
        x0 = predict(x, t, cond)
        eps = (x - (1 - t)[:, None] * x0) / t[:, None]
        return (1 - to)[:, None] * x0 + to[:, None] * eps

    def guided(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        negative = roles["teacher"].predictor(x, t, {"component": torch.full((64,), 2)})
        return negative + 2.0 * (roles["teacher"].predictor(x, t, cond) - negative)

    with torch.no_grad():
        x_next = ddim(guided, x, t, t_next, cond)
        jump, goal = ddim(student, x, t, s, cond), ddim(student, x_next, t_next.clamp(min=1e-9), s, cond)
        want = (jump - torch.where(done[:, None], x_next, goal)).square().mean()
    torch.testing.assert_close(loss.value, want, rtol=1e-6, atol=1e-9)
    loss.value.backward()
    assert all(p.grad is None for p in roles["teacher"].denoiser.parameters())


class ExactSegments:
    """The average velocity of N(MEAN, diag VARIANCE) from t down to the start of t's segment: the optimum for `target: start`."""

    path = Flow()

    def __init__(self, method: Any, segments: int) -> None:
        self.method, self.segments = method, segments

    def __call__(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], kind: str = "x0", path: Path | None = None) -> Tensor:
        assert kind == "velocity" and path == Flow()
        start = self.method.starts(t, self.segments)
        ends = [gaussian_ode_map(x[i : i + 1], t[i].item(), start[i].item(), FLOW, MEAN, VARIANCE.diag()) for i in range(len(x))]
        return (x - torch.cat(ends)) / (t - start)[:, None]


@pytest.mark.parametrize("segments", [4, 1])
def test_exact_students_have_no_loss_up_to_the_solvers_error(segments: int) -> None:
    family, latents = Toy("toy:gaussian"), MEAN + normal(128, 2) * VARIANCE.sqrt()
    losses = []
    for count in (40, 160):
        method = tscd(family, steps=4, num_times=count, skip=1, stages=[{"segments": segments}], target="start")
        models: Any = {"student": ExactSegments(method, segments), "teacher": toy_roles(method, family, dtype=torch.float64)["teacher"].predictor}
        losses.append(method.consistency(models, Batch(128, {}, latents), rng(128), 0).value.item())
    assert losses[0] < 1e-5
    assert losses[0] / losses[1] > 100  # the error of an Euler step is of second order, its square of fourth


def test_training_on_two_segments_brings_two_steps_to_the_teachers_trajectories() -> None:
    """Two-step samples against a fine integration of the ODE, on one segment less than on the two the student starts from."""
    family = Toy("toy:gaussian", width=32)
    method = tscd(family, steps=2, num_times=32, skip=2, stages=[{"segments": 4}, {"segments": 2, "share": 3}], target="start")
    object.__setattr__(method.setting, "train_steps", 300)
    latents = family.mixture.sample(4000, torch.Generator().manual_seed(0)).float()
    trainer = toy_trainer(method, family, latents=latents, steps=300, batch_size=64, ema=0.95)
    noise = normal(1000, 2, seed=4)
    with torch.no_grad():
        exact = ode(trainer.models["teacher"], noise, torch.linspace(1, 0, 101, dtype=torch.float64), {})

    def error() -> float:
        with torch.no_grad(), trainer.ema.applied():
            x = few_step(trainer.models["student"], noise.float(), method.setting.grid, {}, renoise="euler")
        return (x - exact).square().mean().sqrt().item()

    before = error()
    trainer.run([])
    assert error() < before / 2.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stages": []}, "recipe key distiller.stages: at least one stage is needed"),
        ({"stages": [{"segments": 2}, {"segments": 2}]}, "recipe key distiller.stages: at least one stage is needed, and each must have fewer"),
        ({"stages": [{"segments": 0}]}, "recipe key distiller.stages.0.segments: Input should be greater than or equal to 1 (given: 0)"),
        (
            {"stages": [{"segments": 1, "share": 0}]},
            "recipe key distiller.stages.0.share: Input should be greater than or equal to 0.000001 (given: 0)",
        ),
        ({"target": "end"}, "recipe key distiller.target: Input should be 'random' or 'start' (given: 'end')"),
    ],
)
def test_mistakes_in_the_config_name_the_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(TSCD.Config, {"name": "tscd", **config}, "distiller")
    assert str(caught.value).startswith(message)


def test_the_students_steps_must_fit_the_last_stage() -> None:
    message = r"recipe key distiller\.stages: the last stage has 4 segments, of which student\.steps 3 is not a multiple"
    with pytest.raises(UserError, match=message):
        plan(Recipe.load("digits_tscd_4step", ["student.steps=3"]))
