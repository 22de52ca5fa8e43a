"""The first-step anchor against the teacher's sampling steps taken by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import oracle
import pytest
import torch
from matching_cases import Means, batch_of, network, schedule_of
from test_dmd2 import disturb, gradients
from torch import Tensor
from toy_runs import MEAN, VARIANCE, Recorded, rng, toy_method, toy_roles, toy_setting

from fastgen.config import validate
from fastgen.distillers.anchor import AnchorConfig, anchor_loss
from fastgen.distillers.base import Facts, Setting
from fastgen.distillers.dmd2 import DMD2, DMD2Config
from fastgen.errors import UserError
from fastgen.families.toy import Toy
from fastgen.path import Flow, Path, TrigFlow, VarianceExploding, VariancePreserving
from fastgen.roles import Roles

COUNT = 5


def case(path: Any, grid: tuple[float, ...], shift: float) -> tuple[Setting, Roles]:
    family = Toy("toy:mixture", path=path)
    setting = replace(toy_setting(family, grid=grid, guidance=2.0, negative="2"), shift=shift)
    roles = toy_roles(DMD2, family, dtype=torch.float64)
    disturb(roles, "student")
    return setting, roles


def guided_x0(roles: Roles, x: Tensor, t: float) -> Tensor:
    """The teacher's guided mean at path time t: n + 2 (c - n)."""
    times = torch.full((len(x),), t, dtype=torch.float64)
    conditional, negative = (roles["teacher"].predictor(x, times, batch_of(len(x), k).cond) for k in (1, 2))
    return negative + 2 * (conditional - negative)


@pytest.mark.parametrize(("grid", "shift"), [((1.0, 0.75, 0.5), 1.0), ((1.0, 0.9, 0.75), 3.0), ((0.9, 0.3), 1.0)])
def test_the_loss_by_hand_on_flow(grid: tuple[float, ...], shift: float) -> None:
    """The student's velocity at the first step and the secant to where four guided Euler steps, even before the shift, lead from noise at t = 1."""
    setting, roles = case(Flow(), grid, shift)
    config = AnchorConfig(weight=0.05, evaluations=4)
    noise = rng(COUNT).normal("noise", (2,)).double()
    even = [t / (shift - (shift - 1) * t) for t in (1.0, grid[1])]
    between = [even[0] + (even[1] - even[0]) * i / 4 for i in range(5)]
    times = [shift * u / (1 + (shift - 1) * u) for u in between]
    x = noise
    with torch.no_grad():
        for t, t_next in pairwise(times):
            x = x + (t_next - t) * (x - guided_x0(roles, x, t)) / t
    velocity = roles["student"].denoiser(noise, torch.full((COUNT,), grid[0]).double(), batch_of(COUNT, 1).cond).prediction
    want = 0.05 * (velocity - (noise - x) / (grid[0] - grid[1])).square().mean()
    models = {name: Recorded(predictor) for name, predictor in roles.predictors().items()}
    got = anchor_loss(models["student"], models["teacher"], batch_of(COUNT, 1), rng(COUNT), setting, config)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-9)
    got.backward()
    assert gradients(roles, "student")
    assert models["teacher"].in_graph == [False] * 4
    assert models["student"].in_graph == [True]


def test_the_loss_by_hand_on_ve() -> None:
    """Teacher's steps in sigma from pure noise times 80; velocities in flow time sigma/(1 + sigma), where x shrinks by 1 + sigma."""
    grid = (0.5, 0.05)
    setting, roles = case(VarianceExploding(), grid, 1.0)
    first, second = 40.0, 4.0
    noise = rng(COUNT).normal("noise", (2,)).double()
    times = [80 + (second - 80) * i / 3 for i in range(4)]
    start, x = noise * first, noise * 80
    with torch.no_grad():
        for t, t_next in pairwise(times):
            x = x + (t_next - t) * (x - guided_x0(roles, x, t)) / t
    target = (start / 41 - x / 5) / (40 / 41 - 4 / 5)
    x0 = roles["student"].predictor(start, torch.full((COUNT,), first).double(), batch_of(COUNT, 1).cond)
    velocity = (start / 41 - x0) / (40 / 41)
    config = AnchorConfig(weight=1.0, evaluations=3)
    got = anchor_loss(roles["student"].predictor, roles["teacher"].predictor, batch_of(COUNT, 1), rng(COUNT), setting, config)
    torch.testing.assert_close(got.double(), (velocity - target).square().mean(), rtol=1e-5, atol=1e-9)


def exact_means(schedule: oracle.Schedule) -> Means:
    """The teacher of N(MEAN, VARIANCE)."""

    def means(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x0 = oracle.gaussian_posterior_mean(x, t, schedule, MEAN, torch.diag(VARIANCE))
        alpha, sigma = schedule.at(t, x)
        return x0, (x - alpha * x0) / sigma

    return means


@pytest.mark.parametrize("path", [Flow(), TrigFlow(), VariancePreserving(), VarianceExploding()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("grid", [(1.0, 0.4), (0.9, 0.6, 0.3)])
def test_the_anchor_is_what_the_teachers_sampler_draws(path: Path, grid: tuple[float, ...]) -> None:
    """Each step keeps (x0, eps), whatever the path: alpha' x0 + sigma' eps. The student predicts no velocity, so the loss is the target's."""
    schedule, family = schedule_of(path), Toy("toy:gaussian", path=path)
    setting = toy_setting(family, grid=grid)
    means = exact_means(schedule)
    noise = rng(COUNT).normal("noise", (2,)).double()
    times = [path.t_max * (1 + (grid[1] - 1) * i / 4) for i in range(5)]
    scale = path.t_max if isinstance(path, VarianceExploding) else 1.0
    x = noise * scale
    for t, t_next in pairwise(times):
        x = schedule.noisy(*means(x, torch.full((COUNT,), t).double()), torch.full((COUNT,), t_next).double())
    ends = [torch.full((COUNT,), path.t_max * t).double() for t in grid[:2]]
    start = noise * (ends[0][0] if scale > 1 else 1.0)
    # On Flow x is divided by alpha + sigma, and the time is sigma / (alpha + sigma).
    (first, t), (last, t_next) = ((y / (a + b), b / (a + b)) for y, (a, b) in ((y, schedule.at(e, y)) for y, e in zip((start, x), ends, strict=True)))
    still = network(path, "x0", lambda x, t: (x / sum(schedule.at(t, x)), x))  # its eps is the same: no velocity on Flow
    config = AnchorConfig(weight=1.0, evaluations=4)
    got = anchor_loss(still, network(path, "velocity", means), batch_of(COUNT), rng(COUNT), setting, config)
    torch.testing.assert_close(got.double(), ((first - last) / (t - t_next)).square().mean(), rtol=1e-5, atol=1e-9)


def test_a_student_that_makes_the_teachers_one_step_has_no_loss() -> None:
    setting, roles = case(Flow(), (1.0, 0.6), 1.0)
    teacher = roles["teacher"].predictor
    config = AnchorConfig(evaluations=1)
    assert anchor_loss(setting.guide(teacher), teacher, batch_of(COUNT, 1), rng(COUNT), setting, config).item() <= 1e-12
    assert anchor_loss(teacher, teacher, batch_of(COUNT, 1), rng(COUNT), setting, config).item() > 1e-4


def test_later_steps_match_and_the_first_follows() -> None:
    """The student's update has both terms; neither the matching's rollouts nor the critic's end at the first step."""
    setting, roles = case(Flow(), (1.0, 0.75, 0.5, 0.25), 1.0)
    method: Any = toy_method(DMD2, setting, anchor={"evaluations": 2})
    *critics, improve = method.updates(0)
    assert [[term.__name__ for term in update.terms] for update in (critics[0], improve)] == [["critic"], ["match", "anchor"]]
    exits: dict[str, set[int]] = {"critic": set(), "match": set()}
    for step in range(24):
        for name, seen in exits.items():
            models = {role: Recorded(predictor) for role, predictor in roles.predictors().items()}
            getattr(method, name)(models, batch_of(3, 1), rng(3, step), step)
            seen.add(len(models["student"].inputs) - 1)
    assert exits == {"critic": {1, 2, 3}, "match": {1, 2, 3}}


@pytest.mark.parametrize(
    ("keys", "facts", "message"),
    [
        (
            {},
            Facts(1, 1.0, (1.0,), 1.0),
            "recipe key distiller.anchor: a one-step student has no step beside its first; it needs student.steps >= 2",
        ),
        (
            {"rollout": {"times": "sampled"}},
            Facts(2, 1.0, (1.0, 0.5), 1.0),
            "recipe key distiller.anchor: needs rollout.times: grid, on which the first step's end is known",
        ),
    ],
)
def test_mistakes(keys: dict[str, Any], facts: Facts, message: str) -> None:
    with pytest.raises(UserError) as caught:
        DMD2.check(validate(DMD2Config, {"name": "dmd2", "anchor": {}, **keys}, "distiller"), facts)
    assert str(caught.value) == message
