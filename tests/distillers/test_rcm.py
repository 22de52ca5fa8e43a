"""rCM: sCM's term and DMD2's terms in one update, its rollout and schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_dmd2 import disturb, gradients
from toy_runs import Recorded, rng, toy_method, toy_roles, toy_setting, toy_trainer

from fastgen.config import validate
from fastgen.distillers.base import Batch, Models, Setting
from fastgen.distillers.dmd2 import DMD2
from fastgen.distillers.rcm import RCM
from fastgen.distillers.rollout import RolloutConfig, student_samples
from fastgen.distillers.scm import SCM
from fastgen.errors import UserError
from fastgen.families.toy import Toy
from fastgen.timesteps import TimeSampling

GRID = (1.0, 0.75, 0.5, 0.25)


def case(**keys: Any) -> tuple[RCM, Setting, Any, Batch]:
    family = Toy("toy:mixture")
    setting = toy_setting(family, grid=GRID)
    method: Any = toy_method(RCM, setting, **keys)
    roles = toy_roles(method, family, dtype=torch.float64)
    disturb(roles, "student", "fake_score")
    latents = family.mixture.sample(12, torch.Generator().manual_seed(0))
    return method, setting, roles, Batch(12, {"component": torch.full((12,), -1)}, latents)


def test_the_schedule() -> None:
    method, *_ = case(start=2, critic_updates=3, replay=2)
    named = lambda step: [(u.trains, tuple(term.__name__ for term in u.terms)) for u in method.updates(step)]  # noqa: E731
    alone = [(("student",), ("consistency",)), (("student",), ("replayed",))]
    assert named(0) == named(1) == alone
    critic = (("fake_score",), ("critic",))
    assert named(2) == [critic] * 3 + [(("student",), ("consistency", "match")), alone[1]]


def test_its_terms_are_those_of_scm_and_dmd2() -> None:
    method, setting, roles, batch = case(match_weight=0.25)
    models: Models = roles.predictors()
    scm: Any = toy_method(SCM, setting)
    dmd2: Any = toy_method(DMD2, setting)
    assert torch.equal(method.consistency(models, batch, rng(12), 0).value, scm.consistency(models, batch, rng(12), 0).value)
    assert torch.equal(method.critic(models, batch, rng(12), 0).value, dmd2.critic(models, batch, rng(12), 0).value)
    matched = dmd2.match(models, batch, rng(12), 0)
    # both sums over elements: lambda |x - sg(x - g)|^2, where DMD2 has half the mean over the two of them
    torch.testing.assert_close(method.match(models, batch, rng(12), 0).value, 2 * 2 * 0.25 * matched.value)


@pytest.mark.parametrize("times", ["grid", "sampled"])
def test_exactly_one_evaluation_of_the_students_rollout_is_in_the_graph(times: str) -> None:
    method, _, roles, batch = case(rollout={"times": times, **({"steps": 3} if times == "sampled" else {})})
    depths = set()
    for scope in range(12):
        student = Recorded(roles["student"].predictor)
        method.match({**roles.predictors(), "student": student}, batch, rng(12, scope), 0)
        assert student.in_graph == [False] * (len(student.in_graph) - 1) + [True]
        depths.add(len(student.in_graph))
        fake = Recorded(roles["student"].predictor)
        method.critic({**roles.predictors(), "student": fake}, batch, rng(12, scope), 0)
        assert not any(fake.in_graph)
    assert depths == set(range(1, 5 if times == "grid" else 4))


def test_sampled_rollouts_start_at_noise_and_never_go_back() -> None:
    setting = toy_setting(Toy("toy:mixture"), grid=GRID)
    config = RolloutConfig(times="sampled", steps=4, sampling=TimeSampling(lo=0.1, hi=0.9))
    drawn = torch.stack([config.draw(setting, rng(2, scope)) for scope in range(400)])
    assert drawn.dtype == torch.float64
    assert (drawn[:, 0] == 1).all()
    assert (drawn[:, 1:] <= drawn[:, :-1]).all()
    # running minima of U(.1, .9): means .5, .1 + .8/3, .1 + .8/4
    torch.testing.assert_close(drawn[:, 1:].mean(0), torch.tensor([0.5, 0.1 + 0.8 / 3, 0.3], dtype=torch.float64), rtol=0, atol=0.04)
    assert torch.equal(config.draw(setting, rng(7)), config.draw(setting, rng(2)))  # one draw for the whole global batch
    assert torch.equal(RolloutConfig().draw(setting, rng(2)), torch.tensor(GRID, dtype=torch.float64))


def test_a_sampled_rollout_visits_the_times_it_drew() -> None:
    _, setting, roles, batch = case()
    config = RolloutConfig(times="sampled", steps=4)
    for scope in range(6):
        student = Recorded(roles["student"].predictor)
        student_samples(student, setting, batch.cond, rng(12, scope), renoise="euler", train=False, rollout=config)
        visited = torch.stack([t[0] for _, t, _ in student.inputs])
        assert torch.equal(visited, config.draw(setting, rng(12, scope))[: len(visited)])


def test_both_terms_train_the_student_and_nothing_else() -> None:
    method, _, roles, batch = case()
    for term in method.updates(0)[-1].terms:
        for role in roles.values():
            role.denoiser.zero_grad(set_to_none=True)
        term(roles.predictors(), batch, rng(12), 0).value.backward()
        assert gradients(roles, "student")
        assert not gradients(roles, "teacher")
        assert not gradients(roles, "fake_score")


@pytest.mark.parametrize("points", ["data", "teacher_trajectory"])
def test_it_trains_with_images_and_without(points: str) -> None:
    family = Toy("toy:mixture")
    keys: dict[str, Any] = {"trajectory": {"evaluations": 4}} if points == "teacher_trajectory" else {}
    method: Any = toy_method(RCM, toy_setting(family, grid=GRID), points=points, critic_updates=1, **keys)
    assert method.needs_latents(method.config) == (points == "data")
    assert set(method.roles_for(method.config)) == {"student", "fake_score", "teacher"}
    latents = family.mixture.sample(64, torch.Generator().manual_seed(0)).float() if points == "data" else None
    trainer = toy_trainer(method, family, latents=latents)
    before = trainer.roles["fake_score"].denoiser.backbone.out.weight.clone()  # type: ignore[union-attr, operator]
    trainer.run([])
    assert not torch.equal(trainer.roles["fake_score"].denoiser.backbone.out.weight, before)  # type: ignore[union-attr, arg-type]


def test_a_mistake_names_its_key() -> None:
    for keys, said in (
        ({"rollout": {"times": "fixed"}}, r"distiller\.rollout\.times"),
        ({"match_weight": 0}, r"distiller\.match_weight"),
        ({"start": -1}, r"distiller\.start"),
        ({"fake_updates": 5}, r"distiller\.fake_updates: unknown key"),
    ):
        with pytest.raises(UserError, match=said):
            validate(RCM.Config, {"name": "rcm", **keys}, "distiller")
