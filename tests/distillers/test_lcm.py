"""LCM with exact consistency functions, its guided teacher steps by hand, and the guidance that the student is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import SCHEDULES, gaussian_ode_map, gaussian_posterior_mean
from torch import Tensor
from toy_runs import MEAN, VARIANCE, Recorded, normal, optimizer_block, rng, toy_method, toy_roles, toy_setting, toy_trainer

from fastgen.config import Recipe, validate
from fastgen.distillers.base import Batch
from fastgen.distillers.lcm import LCM, LCMConfig, pseudo_huber
from fastgen.distillers.solver import SolverConfig, draw_step
from fastgen.errors import UserError
from fastgen.families.toy import Toy
from fastgen.path import Flow, Path, TrigFlow, VarianceExploding, VariancePreserving
from fastgen.plan import plan
from fastgen.sampling import few_step

FLOW = SCHEDULES["Flow"]


class ExactConsistency:
    """The velocity whose x0 is where the ODE of N(MEAN, diag VARIANCE) ends, from every (x, t) on Flow with t > 0."""

    path = Flow()

    def __call__(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], kind: str = "x0", path: Path | None = None) -> Tensor:
        assert kind == "velocity" and path == Flow() and (t > 0).all()
        spread = ((1 - t)[:, None] ** 2 * VARIANCE + t[:, None] ** 2).sqrt()
        x0 = MEAN + (x - (1 - t)[:, None] * MEAN) * VARIANCE.sqrt() / spread
        torch.testing.assert_close(x0[:1], gaussian_ode_map(x[:1], t[0].item(), 0.0, FLOW, MEAN, VARIANCE.diag()))
        return (x - x0) / t[:, None]


def gap(family: Toy, student: Any = None, **config: Any) -> float:
    """RMS change of the student's x0 over one teacher step, on 256 points."""
    method: Any = toy_method(LCM, toy_setting(family), **config)
    models: Any = {"student": student or ExactConsistency(), "teacher": toy_roles(method, family, dtype=torch.float64)["teacher"].predictor}
    latents = MEAN + normal(256, 2) * VARIANCE.sqrt()
    return method.consistency(models, Batch(256, {}, latents), rng(256), 0).logs["gap"].item()


@pytest.mark.parametrize("path", [Flow(), TrigFlow(), VariancePreserving(), VarianceExploding()], ids=lambda path: type(path).__name__)
def test_an_exact_consistency_function_has_no_loss_up_to_the_solvers_error(path: Path) -> None:
    """One Euler step has an error of second order in its length, for teachers on any path."""
    family = Toy("toy:gaussian", path=path, kind="velocity" if path in (Flow(), TrigFlow()) else "eps")
    gaps = [gap(family, num_times=count, skip=1) for count in (25, 100, 400)]
    assert gaps[0] < 0.01
    assert gaps[0] / gaps[1] > 10 and gaps[1] / gaps[2] > 10
    assert gap(family, num_times=400, skip=4) == pytest.approx(gaps[1], rel=0.2)


def test_the_undistilled_teacher_is_not_consistent() -> None:
    family = Toy("toy:gaussian")
    student = toy_roles(toy_method(LCM, toy_setting(family)), family, dtype=torch.float64)["student"].predictor
    assert gap(family, student, num_times=100, skip=1) > 20 * gap(family, num_times=100, skip=1)


def test_the_target_near_data_is_the_sample_itself() -> None:
    """With one step to t' = 0 the loss is the distance to the teacher's own x0 there: plain regression."""
    family = Toy("toy:gaussian")
    method: Any = toy_method(LCM, toy_setting(family), num_times=10, skip=10)
    roles = toy_roles(method, family, dtype=torch.float64)
    t, t_next = draw_step(method.config, method.setting, rng(64))
    assert not t_next.any() and t.unique().tolist() == pytest.approx([i / 10 for i in range(1, 11)])
    latents = normal(64, 2)
    x = (1 - t)[:, None] * latents + t[:, None] * rng(64).normal("noise", (2,))
    student = Recorded(roles["student"].predictor)
    loss = method.consistency({"student": student, "teacher": roles["teacher"].predictor}, Batch(64, {}, latents), rng(64), 0)
    inner = t < 1
    want = gaussian_posterior_mean(x, t, FLOW, MEAN, VARIANCE.diag())
    assert loss.logs["gap"].item() <= 1e-7  # the student starts as the teacher, whose x0 it is
    assert student.in_graph == [True, False]
    torch.testing.assert_close((x - t[:, None] * student(x, t, {}, "velocity"))[inner], want[inner], rtol=1e-6, atol=1e-6)


def test_steps_follow_the_teachers_shifted_grid() -> None:
    config = validate(SolverConfig, {"name": "lcm", "num_times": 40, "skip": 7})
    setting = toy_setting(Toy("toy:gaussian"))
    t, t_next = draw_step(config, setting, rng(2000))
    places, below = (t * 40).round(), (t_next * 40).round()
    assert places.unique().tolist() == list(range(1, 41))
    assert torch.equal(below, (places - 7).clamp(min=0))
    object.__setattr__(setting, "shift", 3.0)
    shifted, _ = draw_step(config, setting, rng(2000))
    torch.testing.assert_close(shifted, 3 * t / (1 + 2 * t))
    ends = draw_step(config, toy_setting(Toy("toy:gaussian", path=VarianceExploding())), rng(2000))[0]
    assert ends.max().item() == pytest.approx(80 / 81)


def test_every_sample_has_its_own_guidance_which_the_student_is_told() -> None:
    family = Toy("toy:mixture")
    setting = toy_setting(family, guidance=2.0, negative="2")
    method: Any = toy_method(LCM, setting, guidance=[1.5, 4.0], num_times=50, skip=5)
    roles = toy_roles(method, family, dtype=torch.float64)
    last: Any = roles["student"].denoiser.inputs.networks["guidance"][-1]  # type: ignore[index, union-attr]
    torch.nn.init.normal_(last.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(roles["student"].denoiser.backbone.out.weight, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr, arg-type]
    models: Any = {name: Recorded(role.predictor) for name, role in roles.items()}
    latents, cond = normal(6, 2), {"component": torch.tensor([0, 1, 0, 1, 0, 1])}
    loss = method.consistency(models, Batch(6, cond, latents), rng(6), 0)
    scale = 1.5 + 2.5 * rng(6).uniform("guidance")
    assert scale.unique().numel() == 6
    assert models["teacher"].inputs[0][2]["component"].tolist() == [2] * 6 + cond["component"].tolist()
    assert all(torch.equal(call[2]["input.guidance"], scale) for call in models["student"].inputs)
    t, t_next = draw_step(method.config, setting, rng(6))
    x = (1 - t)[:, None] * latents + t[:, None] * rng(6).normal("noise", (2,))
    teacher, student = roles["teacher"].predictor, roles["student"].predictor
    with torch.no_grad():
        n, c = teacher(x, t, {"component": torch.full((6,), 2)}), teacher(x, t, cond)
        x0 = n + scale[:, None] * (c - n)
        x_next = (1 - t_next)[:, None] * x0 + t_next[:, None] * (x - (1 - t)[:, None] * x0) / t[:, None]
        told = {**cond, "input.guidance": scale}
        difference = student(x, t, told) - student(x_next, t_next.clamp(min=1e-9), told)
        want = ((difference**2 + 1e-6).sqrt() - 1e-3).mean()
    torch.testing.assert_close(loss.value, want, rtol=1e-6, atol=1e-8)
    with torch.no_grad():  # the default is the recipe's own scale
        torch.testing.assert_close(student(x, t, cond), student(x, t, {**cond, "input.guidance": torch.full((6,), 2.0)}))
        assert (student(x, t, cond) - student(x, t, {**cond, "input.guidance": torch.full((6,), 4.0)})).abs().max() > 1e-3


def test_one_guidance_needs_no_input() -> None:
    assert LCM.roles_for(validate(LCMConfig, {"name": "lcm"}))["student"].inputs == ()
    assert LCM.roles_for(validate(LCMConfig, {"name": "lcm", "guidance": [1, 3]}))["student"].inputs == ("guidance",)


def test_pseudo_huber_is_linear_far_away_and_quadratic_close_by() -> None:
    x = torch.tensor([3.0, 1e-4], dtype=torch.float64)
    far, near = (pseudo_huber(x[i : i + 1], torch.zeros(1, dtype=torch.float64), 1e-3).item() for i in range(2))
    assert far == pytest.approx(3 - 1e-3, abs=1e-6)
    assert near == pytest.approx(1e-8 / 2e-3, rel=1e-2)


def test_training_makes_the_student_consistent() -> None:
    """One step of the undistilled student draws a point; a consistent one spreads as the data do."""
    family = Toy("toy:gaussian", width=32)
    method = toy_method(LCM, toy_setting(family), num_times=24, skip=2)
    latents = family.mixture.sample(4000, torch.Generator().manual_seed(0)).float()
    trainer = toy_trainer(method, family, latents=latents, optimizers=optimizer_block(lr=2e-3), steps=300, batch_size=64, ema=0.95)
    noise, std = normal(4000, 2, seed=4).float(), torch.tensor([0.7, 0.4])

    def spread() -> Tensor:
        with torch.no_grad(), trainer.ema.applied():
            return few_step(trainer.models["student"], noise, method.setting.grid, {}, renoise="euler").std(0)

    assert spread().max() < 0.01  # E[x0 | pure noise] is a point
    trainer.run([])
    assert ((spread() - std).abs() / std).max() < 0.2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"guidance": [3, 2]}, "recipe key distiller.guidance: two increasing scales from 1 to 1000 are needed (given: [3, 2])"),
        ({"guidance": [0.5, 2]}, "recipe key distiller.guidance: two increasing scales"),
        ({"skip": 0}, "recipe key distiller.skip: Input should be greater than or equal to 1 (given: 0)"),
        ({"num_time": 5}, "recipe key distiller.num_time: unknown key; did you mean 'num_times'?"),
        ({"huber": 0}, "recipe key distiller.huber: Input should be greater than 0 (given: 0)"),
    ],
)
def test_mistakes_in_the_config_name_the_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(LCM.Config, {"name": "lcm", **config}, "distiller")
    assert str(caught.value).startswith(message)


def test_the_exported_guidance_must_have_been_trained() -> None:
    with pytest.raises(UserError, match=r"recipe key distiller\.guidance: \[2\.0, 4\.0\] does not hold teacher\.guidance 1\.5"):
        plan(Recipe.load("digits_lcm_2step", ["distiller.guidance=[2, 4]"]))
