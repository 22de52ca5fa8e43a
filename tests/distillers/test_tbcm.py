"""TBCM: the trajectories it trains on, what it leaves alone, and what its student becomes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_scm import ExactConsistency
from torch import Tensor
from toy_runs import MEAN, VARIANCE, Recorded, rng, toy_method, toy_roles, toy_setting, toy_trainer, weights

from fastgen import run
from fastgen.config import Recipe, validate
from fastgen.distillers.base import Batch
from fastgen.distillers.points import TRIG, Points
from fastgen.distillers.scm import SCM
from fastgen.distillers.tbcm import TBCM
from fastgen.errors import UserError
from fastgen.families.toy import Toy
from fastgen.path import Flow, VariancePreserving


def prompts(*components: int) -> Batch:
    return Batch(len(components), {"component": torch.tensor(components)})


def draw(family: Toy, batch: Batch, *, guidance: float = 1.0, **trajectory: Any) -> tuple[Points, Any]:
    """The points of one batch in float64, and the teacher's predictor."""
    method: Any = toy_method(TBCM, toy_setting(family, guidance=guidance), trajectory=trajectory)
    roles = toy_roles(method, family, dtype=torch.float64)
    return method.draw_points(roles.predictors(), batch, rng(batch.size)), roles["teacher"].predictor


@pytest.mark.parametrize("route", ["stratified", "logit_normal", "grid"])
@pytest.mark.parametrize("path", [Flow(), VariancePreserving()], ids=["Flow", "VariancePreserving"])
def test_the_stored_velocity_is_the_guided_teachers_at_the_stored_point(route: str, path: Any) -> None:
    family = Toy("toy:mixture", path=path)
    points, teacher = draw(family, prompts(0, 1, 2), guidance=2.0, route=route, evaluations=6)
    assert points.x.shape == (15, 2)
    assert points.cond["component"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    conditional = teacher(points.x, points.t, points.cond, "velocity", TRIG)
    negative = teacher(points.x, points.t, {"component": torch.full((15,), -1)}, "velocity", TRIG)
    # The trajectories came in batches of 3 and these are 15: equal to rounding in float64, no more.
    torch.testing.assert_close(points.velocity, negative + 2.0 * (conditional - negative), rtol=1e-12, atol=1e-12)


def test_each_point_is_one_euler_step_of_the_teacher_from_the_one_before() -> None:
    points, _ = draw(Toy("toy:mixture"), prompts(-1, -1), evaluations=9)
    x, t, v = (value.unflatten(0, (2, 8)) for value in (points.x, points.t, points.velocity))
    x0, eps = TRIG.solve(points.velocity, points.x, points.t, "velocity")
    x0, eps = x0.unflatten(0, (2, 8)), eps.unflatten(0, (2, 8))
    assert (t[:, 1:] < t[:, :-1]).all()
    for i in range(7):
        torch.testing.assert_close(x[:, i + 1], TRIG.mix(x0[:, i], eps[:, i], t[:, i + 1]))
    assert not torch.equal(t[0], t[1])  # each trajectory has times of its own
    assert v.isfinite().all()


def test_routes() -> None:
    """The fixed route is the released one (16 times, shift 2.5, end .0025), each random time lies in its interval, and a
    logit-normal route has the right median."""
    config = toy_method(TBCM, toy_setting(Toy("toy:gaussian"))).config.trajectory
    released = [1.571, 1.542, 1.510, 1.471, 1.427, 1.374, 1.311, 1.236, 1.144, 1.033, 0.900, 0.742, 0.564, 0.373, 0.183, 0.006]
    fixed = config.model_copy(update={"route": "grid"}).flow_times(rng(1), teacher_shift=1.0)
    trig = torch.atan(fixed / (1 - fixed))[0]
    torch.testing.assert_close(trig, torch.tensor(released, dtype=torch.float64), rtol=0, atol=6e-4)
    drawn = config.flow_times(rng(500), teacher_shift=1.0)
    assert (drawn[:, 0] == 1).all()
    assert ((drawn[:, 1:] <= fixed[:, :-1]) & (drawn[:, 1:] >= fixed[:, 1:])).all()
    middle = (drawn[:, 1:] - fixed[:, 1:]) / (fixed[:, :-1] - fixed[:, 1:])
    torch.testing.assert_close(middle.mean(), torch.tensor(0.5, dtype=torch.float64), rtol=0, atol=0.02)
    normal = config.model_copy(update={"route": "logit_normal"}).flow_times(rng(500), teacher_shift=3.0)
    assert (normal[:, 1:] <= normal[:, :-1]).all()
    assert normal[:, 1:].median().item() == pytest.approx(3 / 4, abs=0.02)


def test_the_exact_consistency_function_has_no_loss_along_the_exact_trajectory() -> None:
    """The points need not lie on one exact path: wherever the teacher's velocity is stored, the exact student's tangent is zero."""
    family = Toy("toy:gaussian")
    method: Any = toy_method(TBCM, toy_setting(family))
    roles = toy_roles(method, family, dtype=torch.float64)
    points = method.draw_points(roles.predictors(), prompts(-1, -1, -1), rng(3))
    student = ExactConsistency()
    g = method.tangent(student, points, student(points.x, points.t, points.cond, "velocity", TRIG))
    assert g.abs().max() <= 1e-12
    wrong: Any = roles["teacher"].predictor  # the teacher itself is no consistency function
    assert method.tangent(wrong, points, wrong(points.x, points.t, points.cond, "velocity", TRIG)).abs().max() > 0.05


def test_euler_trajectories_of_a_gaussian_end_at_the_exact_map() -> None:
    """First order: the error of the last point shrinks with the number of evaluations."""
    errors = []
    for count in (16, 64):
        points, _ = draw(Toy("toy:gaussian"), prompts(*[-1] * 8), route="grid", evaluations=count, end=1e-4)
        end = points.x.unflatten(0, (8, count - 1))[:, -1]
        exact = MEAN + rng(8).normal("noise", (2,)).double() * VARIANCE.sqrt()
        errors.append((end - exact).square().mean().sqrt().item())
    assert errors[1] < 0.35 * errors[0]
    assert errors[1] < 0.03


def test_the_teacher_is_called_only_for_trajectories_and_never_differentiated() -> None:
    family = Toy("toy:mixture")
    method = toy_method(TBCM, toy_setting(family), trajectory={"evaluations": 5}, replay=3)
    roles = toy_roles(method, family)
    models = {"student": Recorded(roles["student"].predictor), "teacher": Recorded(roles["teacher"].predictor)}
    for update in method.updates(0):
        for term in update.terms:
            term(models, prompts(0, 1), rng(2), 0)
    assert len(models["teacher"].inputs) == 5
    assert not any(models["teacher"].in_graph)
    assert all(len(x) == 8 for x, _, _ in models["student"].inputs if len(x) > 2)


def test_nothing_opens_an_image_or_a_vae(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from fastgen.families.sd3 import SD3

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an image was touched")

    monkeypatch.setattr(SD3, "encode_latents", refuse)
    monkeypatch.setattr(SD3, "vae", property(refuse))
    monkeypatch.setattr(Image, "open", refuse)
    keys = ["train.steps=1", "train.batch_size=2", "distiller.trajectory={evaluations: 3}", "evaluate.protocol=null"]
    planned = run.plan(Recipe.load("digits_tbcm_2step", keys))
    built = run.build(planned, run.Progress())
    built.trainer.run([])
    assert built.data.parts[0].latents is None
    with pytest.raises(UserError, match=r"data\.images: tbcm does not use it"):
        run.plan(Recipe.load("digits_tbcm_2step", ["data.images=fastgen:digits"]))


def test_it_is_scm_on_trajectories() -> None:
    family, keys = Toy("toy:mixture"), {"trajectory": {"evaluations": 4}, "replay": 2}
    runs = []
    for method, extra in ((TBCM, {}), (SCM, {"points": "teacher_trajectory"})):
        trainer = toy_trainer(toy_method(method, toy_setting(family), **keys, **extra), family)
        trainer.run([])
        runs.append(weights(trainer))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_only_the_teachers_trajectories_are_allowed() -> None:
    for keys in ({"points": "data"}, {"variant": "training"}, {"trajectory": {"route": "random"}}):
        with pytest.raises(UserError, match=rf"recipe key distiller\.{next(iter(keys))}"):
            validate(TBCM.Config, {"name": "tbcm", **keys}, "distiller")


def test_times_stay_below_the_noise_end() -> None:
    points, _ = draw(Toy("toy:gaussian"), prompts(*[-1] * 50))
    assert points.t.max() < math.pi / 2
    assert isinstance(points.x, Tensor)
