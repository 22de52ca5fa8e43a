"""DMD2's mechanics one by one on closed-form teachers, and the distribution a student ends at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_runs import Recorded, normal, optimizer_block, toy_method, toy_roles, toy_setting, toy_trainer

from fastgen.config import Recipe, validate
from fastgen.data.training import PairBatch
from fastgen.denoiser import guided
from fastgen.distillers.base import Batch, Setting, Update
from fastgen.distillers.dmd import DMD, DMDConfig
from fastgen.distillers.dmd2 import DMD2, DMD2Config
from fastgen.distillers.f_distill import FDistill
from fastgen.distillers.phased_dmd import PhasedDMD
from fastgen.distillers.rollout import Sample, student_samples
from fastgen.distillers.tbcm import TBCMConfig
from fastgen.errors import UserError
from fastgen.families.toy import Mixture, Toy
from fastgen.path import Flow, Path, VarianceExploding
from fastgen.plan import plan
from fastgen.rng import SampleRng
from fastgen.roles import Roles
from fastgen.sampling import few_step
from fastgen.trainer import Trainer

GRID = (0.9, 0.65, 0.4, 0.2)


def two_gaussians() -> Mixture:
    """Components of equal covariance: guidance between them is exactly a third such Gaussian."""
    return Mixture([0.5, 0.5], [[1.0, -0.5], [0.2, 0.4]], [[0.3, 0.2], [0.3, 0.2]])


def prompt(component: int, count: int) -> Batch:
    return Batch(count, {"component": torch.full((count,), component)})


def rng(ids: Sequence[int], scope: int = 0) -> SampleRng:
    return SampleRng(0, (scope,), ids)


@torch.no_grad()
def disturb(roles: Roles, *names: str) -> None:
    """Move the roles' residual networks off zero, each by numbers of its own."""
    for name in names:
        generator = torch.Generator().manual_seed(sum(name.encode()))
        out: Any = roles[name].denoiser.backbone.out
        out.bias.normal_(std=0.3, generator=generator)
        out.weight.normal_(std=0.1, generator=generator)


def gradients(roles: Roles, name: str) -> list[Tensor]:
    return [p.grad for p in roles[name].denoiser.backbone.parameters() if p.grad is not None]


def test_no_gradient_when_the_fake_score_is_the_teacher() -> None:
    family = Toy("toy:mixture")
    roles, method = toy_roles(DMD2, family), toy_method(DMD2, toy_setting(family, grid=[0.7]))
    loss = method.updates(0)[-1].terms[0](roles.predictors(), prompt(-1, 16), rng(range(16)), 0)
    loss.value.backward()
    # The two have equal weights at other addresses, where the last bits of a product may differ.
    assert loss.value.item() <= 1e-10  # half the mean square of a gradient that is 1 where the two differ
    assert gradients(roles, "student")
    assert max(grad.abs().max().item() for grad in gradients(roles, "student")) <= 1e-5
    disturb(roles, "fake_score")
    method.updates(0)[-1].terms[0](roles.predictors(), prompt(-1, 16), rng(range(16)), 0).value.backward()
    assert max(grad.abs().max().item() for grad in gradients(roles, "student")) > 1e-3


def test_terms_leave_gradients_in_the_role_they_train_alone() -> None:
    """Even while every trained role requires gradients."""
    family = Toy("toy:mixture")
    roles, method = toy_roles(DMD2, family), toy_method(DMD2, toy_setting(family, grid=GRID))
    for update, trains in zip(method.updates(0)[-2:], ("fake_score", "student"), strict=True):
        disturb(roles, "student", "fake_score")
        update.terms[0](roles.predictors(), prompt(-1, 8), rng(range(8)), 0).value.backward()
        assert update.trains == (trains,)
        assert gradients(roles, trains)
        for other in roles.keys() - {trains}:
            assert not gradients(roles, other), f"{other} has gradients after the update of {trains}"
        roles[trains].denoiser.zero_grad(set_to_none=True)


class OneTurn(DMD2):
    """Only the first update of a step (the critic's), or only the last (the student's)."""

    turn = 0

    def updates(self, step: int) -> list[Update]:
        return [super().updates(step)[self.turn]]


@pytest.mark.parametrize(("turn", "moves"), [(0, "fake_score"), (-1, "student")])
def test_an_update_changes_the_role_it_trains_alone(turn: int, moves: str) -> None:
    family = Toy("toy:mixture")
    method = toy_method(OneTurn, toy_setting(family, grid=GRID))
    vars(method)["turn"] = turn
    trainer = toy_trainer(method, family)
    disturb(trainer.roles, "student", "fake_score")
    before = {name: {k: v.clone() for k, v in role.denoiser.state_dict().items()} for name, role in trainer.roles.items()}
    trainer.train_step()
    for name, role in trainer.roles.items():
        same = {key for key, value in role.denoiser.state_dict().items() if torch.equal(value, before[name][key])}
        if name == moves:
            assert {key for key in before[name] if ".mixture." not in key}.isdisjoint(same)
        else:
            assert same == before[name].keys()
        assert not gradients(trainer.roles, name)


def test_exactly_one_student_evaluation_is_in_the_graph() -> None:
    family = Toy("toy:mixture")
    roles, method = toy_roles(DMD2, family), toy_method(DMD2, toy_setting(family, grid=GRID))
    exits = []
    for step in range(16):
        models = {name: Recorded(predictor) for name, predictor in roles.predictors().items()}
        method.updates(step)[-1].terms[0](models, prompt(-1, 4), rng(range(4), step), step)
        in_graph = models["student"].in_graph
        assert in_graph == [False] * (len(in_graph) - 1) + [True]
        assert models["teacher"].in_graph == models["fake_score"].in_graph == [False]
        exits.append(len(in_graph) - 1)
    assert set(exits) == {0, 1, 2, 3}


def test_the_critic_rolls_out_without_a_graph() -> None:
    family = Toy("toy:mixture")
    roles, method = toy_roles(DMD2, family), toy_method(DMD2, toy_setting(family, grid=GRID))
    for step in range(8):
        models = {name: Recorded(predictor) for name, predictor in roles.predictors().items()}
        method.updates(step)[0].terms[0](models, prompt(-1, 4), rng(range(4), step), step)
        assert not any(models["student"].in_graph)
        assert models["fake_score"].in_graph == [True]
        assert not models["teacher"].inputs


@pytest.mark.parametrize("renoise", ["euler", "stochastic", "fixed"])
def test_exit_and_samples_do_not_depend_on_how_the_batch_is_split(renoise: Any) -> None:
    family = Toy("toy:mixture")
    setting, student = toy_setting(family, grid=GRID), toy_roles(DMD2, family)["student"].predictor
    splits = [[range(6)], [range(2), range(2, 6)], [[i] for i in range(6)]]
    for step in range(8):
        counts, samples = set(), []
        for split in splits:
            parts = []
            for ids in split:
                recorded = Recorded(student)
                parts.append(student_samples(recorded, setting, prompt(-1, len(ids)).cond, rng(ids, step), renoise=renoise, train=False).x)
                counts.add(len(recorded.inputs))
            samples.append(torch.cat(parts))
        assert len(counts) == 1
        for other in samples[1:]:
            torch.testing.assert_close(other, samples[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", [Flow(), VarianceExploding()], ids=["Flow", "VarianceExploding"])
def test_a_rollout_starts_at_pure_noise_and_walks_the_grid(path: Path) -> None:
    """By hand on Flow: x <- x + (t' - t) velocity, then x0 = x - t velocity. On VE the first x is the noise times sigma."""
    family = Toy("toy:mixture", path=path)
    setting = toy_setting(family, grid=GRID)
    roles = toy_roles(DMD2, family)
    disturb(roles, "student")
    times = [t * path.t_max for t in GRID]
    seen = set()
    for step in range(12):
        student = Recorded(roles["student"].predictor)
        cond = prompt(-1, 5).cond
        sample = student_samples(student, setting, cond, rng(range(5), step), renoise="euler", train=False).x
        called = [t.unique().item() for _, t, _ in student.inputs]
        assert called == pytest.approx(times[: len(called)])
        x = rng(range(5), step).normal("noise", (2,)) * (times[0] if isinstance(path, VarianceExploding) else 1)
        torch.testing.assert_close(student.inputs[0][0], x)
        with torch.no_grad():
            for t, t_next in zip(called, [*called[1:], 0.0], strict=True):
                x = x + (t_next - t) * roles["student"].predictor(x, torch.full((5,), t), cond, "velocity")
        torch.testing.assert_close(sample, x, rtol=1e-5, atol=2e-5)
        seen.add(len(called))
    assert seen == {1, 2, 3, 4}


def test_a_one_step_student_sees_pure_noise_at_the_explicit_time() -> None:
    family = Toy("toy:mixture")
    student = Recorded(toy_roles(DMD2, family)["student"].predictor)
    student_samples(student, toy_setting(family, grid=[0.6]), prompt(-1, 5).cond, rng(range(5)), renoise="euler", train=True)
    ((x, t, _),) = student.inputs
    torch.testing.assert_close(x, rng(range(5)).normal("noise", (2,)), rtol=0, atol=0)
    torch.testing.assert_close(t.double(), torch.full((5,), 0.6, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_critic_updates_come_before_the_one_student_update(count: int) -> None:
    method = toy_method(DMD2, toy_setting(Toy("toy:mixture")), critic_updates=count)
    for step in (0, 7):
        updates = method.updates(step)
        assert [update.trains for update in updates] == [("fake_score",)] * count + [("student",)]
        assert [[term.__name__ for term in update.terms] for update in updates] == [["critic"]] * count + [["match"]]


def test_every_critic_update_draws_its_own_samples() -> None:
    family = Toy("toy:mixture")
    trainer = toy_trainer(toy_method(DMD2, toy_setting(family), critic_updates=3), family)
    student = Recorded(trainer.models["student"])
    trainer.models["student"] = student
    trainer.train_step()
    noises = [x for x, _, _ in student.inputs]
    assert len(noises) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])


def test_critic_loss_is_the_denoising_error_in_the_networks_own_kind() -> None:
    family = Toy("toy:mixture")
    roles, setting = toy_roles(DMD2, family), toy_setting(family, grid=[0.7])
    disturb(roles, "student", "fake_score")
    models, batch = roles.predictors(), prompt(-1, 6)
    method = toy_method(DMD2, setting, critic_times={"lo": 0.2, "hi": 0.6})
    got = method.updates(0)[0].terms[0](models, batch, rng(range(6)), 0).value
    draws = rng(range(6))
    with torch.no_grad():
        x0 = few_step(models["student"], draws.normal("noise", (2,)), setting.grid, batch.cond, renoise="euler")
        t, eps = 0.2 + 0.4 * draws.uniform("critic_time"), draws.normal("critic_noise", (2,))
        velocity = models["fake_score"].denoiser((1 - t)[:, None] * x0 + t[:, None] * eps, t, batch.cond).prediction
    torch.testing.assert_close(got, ((velocity - (eps - x0)) ** 2).mean())


def match_by_hand(roles: Roles, setting: Setting, batch: Batch, *, weight: str, guidance: float, negative: int) -> tuple[Tensor, Tensor]:
    """(loss, gradient in the student's output bias) of a one-step Flow student, from the definitions."""
    models, draws = roles.predictors(), rng(range(batch.size))
    noise, eps = draws.normal("noise", (2,)), draws.normal("match_noise", (2,))
    t = (0.02 + 0.96 * draws.uniform("match_time"))[:, None]
    with torch.no_grad():
        start = setting.grid[0].float().expand(batch.size)
        x = noise - start[:, None] * models["student"].denoiser(noise, start, batch.cond).prediction
        noised = (1 - t) * x + t * eps

        def mean(role: str, component: Tensor) -> Tensor:
            return noised - t * models[role].denoiser(noised, t[:, 0], {"component": component}).prediction

        conditional, fake = (mean(role, batch.cond["component"]) for role in ("teacher", "fake_score"))
        unconditional = mean("teacher", torch.full((batch.size,), negative))
        real = unconditional + guidance * (conditional - unconditional)
        scale = ((1 - t) / t) ** 2 if weight == "kl" else 1 / (x - real).abs().mean(1, keepdim=True)
        g = scale * (fake - real)
    return 0.5 * (g**2).mean(), -start[0] * g.sum(0) / g.numel()  # x0 = x - t v


@pytest.mark.parametrize("weight", ["normalised", "kl"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_guidance_enters_the_real_score_alone(weight: str, guidance: float) -> None:
    family = Toy("toy:mixture")
    setting = toy_setting(family, grid=[0.7], guidance=guidance, negative="2")
    roles, method, batch = toy_roles(DMD2, family), toy_method(DMD2, setting, weight=weight), prompt(0, 6)
    disturb(roles, "student", "fake_score")
    models = {name: Recorded(predictor) for name, predictor in roles.predictors().items()}
    loss = method.updates(0)[-1].terms[0](models, batch, rng(range(6)), 0).value
    loss.backward()
    want, bias_gradient = match_by_hand(roles, setting, batch, weight=weight, guidance=guidance, negative=2)
    torch.testing.assert_close(loss.detach(), want, rtol=1e-4, atol=1e-6)
    bias: Any = roles["student"].denoiser.backbone.out
    torch.testing.assert_close(bias.bias.grad, bias_gradient, rtol=1e-4, atol=1e-6)
    calls = {name: [cond["component"].tolist() for _, _, cond in model.inputs] for name, model in models.items()}
    both = [[2] * 6 + [0] * 6] if guidance != 1 else [[0] * 6]
    assert calls == {"student": [[0] * 6], "teacher": both, "fake_score": [[0] * 6]}


def test_guided_score_of_equal_covariances_is_that_of_a_shifted_gaussian() -> None:
    """n + w (c - n) with w = 2: N(m_u + 2 (m_c - m_u), S) at every time; the other convention would be w = 3."""
    mixture = two_gaussians()
    shifted = Mixture([1.0], [[1.8, -1.4]], [[0.3, 0.2]])
    family = Toy(mixture)
    teacher = toy_roles(DMD2, family, dtype=torch.float64)["teacher"].predictor
    target = toy_roles(DMD2, Toy(shifted), dtype=torch.float64)["teacher"].predictor
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(0.02, 0.98, 50, dtype=torch.float64)
    with torch.no_grad():
        got = guided(teacher, 2.0, family.encode_prompts(["1"]))(x, t, prompt(0, 50).cond)
        torch.testing.assert_close(got, target(x, t, prompt(-1, 50).cond), rtol=1e-10, atol=1e-10)


def test_the_shifted_gaussian_is_a_guided_students_optimum() -> None:
    """With the fake score of N(m_u + 2 (m_c - m_u), S) the update vanishes; with that of N(m_c, S) it does not."""
    family = Toy(two_gaussians())
    setting = toy_setting(family, grid=[0.7], guidance=2.0, negative="1")
    method, sizes = toy_method(DMD2, setting), []
    for means in ([[1.8, -1.4]], [[1.0, -0.5]]):
        models = toy_roles(DMD2, family).predictors()
        models["fake_score"] = toy_roles(DMD2, Toy(Mixture([1.0, 1.0], means * 2, [[0.3, 0.2]] * 2)))["teacher"].predictor
        sizes.append(method.updates(0)[-1].terms[0](models, prompt(0, 64), rng(range(64)), 0).logs["gradient"].item())
    assert sizes[0] < 1e-5
    assert sizes[1] > 0.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"critic_updates": 0}, "recipe key distiller.critic_updates: Input should be greater than or equal to 1 (given: 0)"),
        ({"critic_update": 3}, "recipe key distiller.critic_update: unknown key; did you mean 'critic_updates'?"),
        ({"weight": "sum"}, "recipe key distiller.weight: Input should be 'normalised', 'alpha' or 'kl' (given: 'sum')"),
        ({"renoise": "ddim"}, "recipe key distiller.renoise: Input should be 'euler', 'stochastic' or 'fixed' (given: 'ddim')"),
        ({"match_times": {"low": 0.1}}, "recipe key distiller.match_times.low: unknown key; did you mean 'lo'?"),
        ({"critic_times": {"hi": 1.5}}, "recipe key distiller.critic_times.hi: Input should be less than or equal to 1 (given: 1.5)"),
    ],
)
def test_mistakes_in_the_config_name_the_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(DMD2Config, {"name": "dmd2", **config}, "distiller")
    assert str(caught.value).startswith(message)


def samples(trainer: Trainer, component: int) -> Tensor:
    """100,000 one-step samples of the averaged student."""
    noise = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(1))
    cond = prompt(component, len(noise)).cond
    with trainer.ema.applied(), torch.no_grad():
        return few_step(trainer.models["student"], noise, trainer.distiller.setting.grid, cond, renoise="euler")


def toy_run(family: Toy, setting: Setting, *, prompts: Sequence[str] = ("",), seed: int = 0) -> Trainer:
    block = optimizer_block(name="adam", lr=1e-3, betas=(0.0, 0.999), schedule="cosine")
    blocks = {"student": block, "fake_score": block.model_copy(update={"lr": 2e-3})}
    method = toy_method(DMD2, setting, critic_updates=5)
    return toy_trainer(method, family, prompts=prompts, optimizers=blocks, steps=1200, batch_size=64, ema=0.99, seed=seed)


def test_a_students_start_depends_on_its_conditioning_time() -> None:
    """E[x0 | pure noise] is a point at t = 1, from where DMD2 passes through a line (a saddle); at t < 1 it is spread out.

    At t = 0.7 the start is z -> m + alpha s^2 / (alpha^2 s^2 + sigma^2) (z - alpha m) for each dimension's m and s.
    """
    family = Toy("toy:gaussian")
    mean, variance = torch.tensor([0.5, -0.3]), torch.tensor([0.49, 0.16])
    for t in (1.0, 0.7):
        start = samples(toy_run(family, toy_setting(family, grid=[t])), -1)
        gain = (1 - t) * variance / ((1 - t) ** 2 * variance + t**2)
        torch.testing.assert_close(start.std(0), gain, rtol=0.01, atol=1e-6)
        torch.testing.assert_close(start.mean(0), mean - gain * (1 - t) * mean, rtol=0, atol=2e-3)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_one_step_recovers_a_gaussian(seed: int) -> None:
    """Mean and deviation within 3 %; the start's deviations are 61 % and 76 % too small. Measured over seeds 0-2: at most 1.6 %."""
    family = Toy("toy:gaussian", width=32)
    trainer = toy_run(family, toy_setting(family, grid=[0.7]), seed=seed)
    trainer.run([])
    mean, std = torch.tensor([0.5, -0.3]), torch.tensor([0.7, 0.4])
    x = samples(trainer, -1)
    assert ((x.mean(0) - mean) / std).abs().max() <= 0.03
    assert (x.std(0) / std - 1).abs().max() <= 0.03


@pytest.mark.slow
def test_a_guided_student_recovers_the_shifted_gaussian() -> None:
    """Guidance 2 between equal covariances has an exact answer; without guidance, or with 3, the mean is 1.5 deviations off."""
    family = Toy(two_gaussians(), width=32)
    trainer = toy_run(family, toy_setting(family, grid=[0.7], guidance=2.0, negative="1"), prompts=["0"])
    trainer.run([])
    mean, std = torch.tensor([1.8, -1.4]), torch.tensor([0.3, 0.2]).sqrt()
    x = samples(trainer, 0)
    assert ((x.mean(0) - mean) / std).abs().max() <= 0.1
    assert (x.std(0) / std - 1).abs().max() <= 0.1


# Options

CONFIGS: dict[str, tuple[type[DMD2], dict[str, Any]]] = {
    "dmd2": (DMD2, {}),
    "gan": (DMD2, {"gan": {"r1": 0.1}}),
    "gan on the fake score": (DMD2, {"gan": {"features": "fake_score", "r1": 0.1}}),
    "anchor": (DMD2, {"anchor": {"evaluations": 2}}),
    "decoupled": (DMD2, {"decoupled": {}}),
    "ida": (DMD2, {"ida": 0.03}),
    "noised data": (DMD2, {"inputs": "data"}),
    "sampled rollout": (DMD2, {"rollout": {"times": "sampled", "steps": 3}, "renoise": "stochastic"}),
    "reward": (DMD2, {"reward": {"name": "matching_cases:first_coordinate"}}),
    "regression": (DMD2, {"regression": {}}),
    "dmd": (DMD, {}),
    "f_distill": (FDistill, {}),
    "f_distill on the fake score": (FDistill, {"gan": {"features": "fake_score"}}),
    "phased": (PhasedDMD, {"phases": [{"start": 1, "end": 0.4}, {"start": 0.4, "end": 0}]}),
    "phased with everything": (
        PhasedDMD,
        {
            "phases": [{"start": 1, "end": 0.4}, {"start": 0.4, "end": 0}],
            "gan": {"features": "fake_score"}, "anchor": {"evaluations": 2}, "decoupled": {}, "ida": 0.03,
            "reward": {"name": "matching_cases:first_coordinate"},
        },
    ),
}  # fmt: skip
IN_GRAPH = {"critic": 0, "discriminate": 0, "match": 1, "anchor": 1, "regress": 1}


def whole_batch(count: int) -> Batch:
    """With latents, prompts and pairs."""
    cond = {"component": torch.full((count,), 1)}
    latents, noise, samples = normal(3, count, 2).float()
    return Batch(count, cond, latents, ("1",) * count, PairBatch(noise, samples, cond))


@pytest.mark.parametrize("name", CONFIGS)
def test_with_every_option_gradients_stay_in_the_roles_that_train(name: str) -> None:
    """In every update of a first and a last step; one evaluation of the student is in the graph of its own terms, none in the others'."""
    (kind, keys), family = CONFIGS[name], Toy("toy:mixture", width=16)
    setting = toy_setting(family, grid=[0.7] if name in ("regression", "dmd") else GRID, guidance=2.0, negative="2")
    method: Any = toy_method(kind, replace(setting, train_steps=4, decode=lambda latents: latents), critic_updates=1, **keys)
    roles = toy_roles(method, family)
    disturb(roles, *(role for role in roles.trained if role != "discriminator"))
    for step in (0, 3):
        for update in method.updates(step):
            for term in update.terms:
                models = {role: Recorded(predictor) for role, predictor in roles.predictors().items()}
                with roles.training(update.trains):
                    term(models, whole_batch(5), rng(range(5), step), step).value.backward()
                students = [flag for role, model in models.items() if role.startswith("student") for flag in model.in_graph]
                assert sum(students) == IN_GRAPH[term.__name__]
            for role in roles.values():
                has = [parameter for parameter in role.parameters().values() if parameter.grad is not None]
                assert bool(has) == (role.name in update.trains), f"{role.name} after {[term.__name__ for term in update.terms]}"
                role.denoiser.zero_grad(set_to_none=True)


def test_inputs_from_data_are_noised_but_for_the_first_step() -> None:
    """One evaluation each: of (1 - t) x0 + t noise at the exit's time, of pure noise where the exit is the first step."""
    family = Toy("toy:mixture")
    roles, method = toy_roles(DMD2, family), toy_method(DMD2, toy_setting(family, grid=GRID), inputs="data")
    batch, exits = whole_batch(5), set()
    assert batch.latents is not None
    for step in range(16):
        models = {name: Recorded(predictor) for name, predictor in roles.predictors().items()}
        method.updates(0)[-1].terms[0](models, batch, rng(range(5), step), step)
        ((x, t, _),) = models["student"].inputs
        noise, at = rng(range(5), step).normal("noise", (2,)), t[0].item()
        want = noise if at == GRID[0] else (1 - at) * batch.latents + at * noise
        torch.testing.assert_close(x, want, rtol=1e-6, atol=1e-6)
        exits.add(at)
    assert exits == set(GRID)
    assert (DMD2.needs_latents(method.config), DMD2.needs_latents(DMD2Config(name="dmd2"))) == (True, False)


def test_a_reward_weighs_samples_by_its_exponential_over_the_running_mean() -> None:
    """exp(2 r) of pixels within [0, 1], over the mean of it and of sums that fade by .9 a step, in each sample's gradient; 1 in the first step."""
    family = Toy("toy:mixture")
    setting = replace(toy_setting(family, grid=[0.7]), decode=lambda latents: 10 * latents - 10)
    method: Any = toy_method(DMD2, setting, reward={"name": "matching_cases:first_coordinate", "beta": 2.0})
    plain: Any = toy_method(DMD2, setting)
    roles = toy_roles(DMD2, family, dtype=torch.float64)
    disturb(roles, "student", "fake_score")
    shift = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    models: dict[str, Any] = dict(roles.predictors())
    student = models["student"]
    models["student"] = lambda x, t, cond: student(x, t, cond) + shift
    models["student"].path = Flow()
    total, count, clamped = 0.0, 0.0, 0
    for step in range(3):
        draws, batch = rng(range(5), step), whole_batch(5)
        red = 10 * student(draws.normal("noise", (2,)), torch.full((5,), 0.7), batch.cond)[:, 0].detach() - 10
        clamped += int(((red < 0) | (red > 1)).sum())
        weights = (2 * red.clamp(0, 1)).exp()
        want = weights * (count + 1) / (total + weights)
        total, count = 0.9 * total + weights.sum().item(), 0.9 * count + 5
        got, alone = (torch.autograd.grad(m.match(models, batch, draws, step).value, shift)[0] for m in (method, plain))
        torch.testing.assert_close(got / alone, want[:, None].expand(5, 2), rtol=1e-5, atol=1e-7)
    assert 0 < clamped < 15


def test_rewards_beyond_the_range_of_exp() -> None:
    family = Toy("toy:mixture")
    setting = replace(toy_setting(family), decode=lambda latents: latents)
    method: Any = toy_method(DMD2, setting, reward={"name": "matching_cases:first_coordinate", "beta": 1e4})
    x0 = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.9999, 0.0]])
    sample = Sample(x0, x0, torch.tensor(1.0))
    ratio = 2.718281828**-1
    total = 2 + ratio  # of the step before, in units of the largest
    assert method.factors({}, whole_batch(4), sample, None, 0).tolist() == [1, 1, 1, 1]
    got = method.factors({}, whole_batch(4), sample, None, 1)
    assert got.tolist() == pytest.approx([5 / (total + 1), 5 / (total + 1), 0, 5 * ratio / (total + ratio)], rel=1e-3)
    higher = method.factors({}, whole_batch(4), Sample(10 * x0, 10 * x0, torch.tensor(1.0)), None, 2)
    assert bool(higher.isfinite().all()) and higher.max() < 10


def test_the_fake_score_moves_towards_the_student_after_each_of_its_updates() -> None:
    """Exactly by the share given, with full weights; the fake score's own learning rate is next to nothing here."""
    family = Toy("toy:mixture", width=16)
    method = toy_method(DMD2, toy_setting(family, grid=[0.7]), critic_updates=2, ida=0.25)
    sgd = optimizer_block(name="sgd", lr=0.1, betas=(0.0, 0.0))
    trainer = toy_trainer(method, family, optimizers={"student": sgd, "fake_score": sgd.model_copy(update={"lr": 1e-12})})
    disturb(trainer.roles, "fake_score")

    def flat(role: str) -> Tensor:
        return torch.cat([p.detach().flatten() for p in trainer.parameters[role]])

    want = flat("fake_score")
    for step in range(3):
        if step:
            want = 0.75 * want + 0.25 * flat("student")
        trainer.train_step()
        torch.testing.assert_close(flat("fake_score"), want, rtol=1e-6, atol=1e-7)
    assert (flat("student") - want).abs().max() > 1e-3


def test_a_warmup_regresses_alone_before_matching_begins() -> None:
    family = Toy("toy:mixture")
    setting = replace(toy_setting(family), train_steps=9)
    for kind, critics in ((DMD2, 5), (DMD, 1)):
        method: Any = toy_method(kind, setting, regression={"warmup": 2}, ida=0.1)
        for step in range(6):
            updates = method.updates(step)
            terms = [[term.__name__ for term in update.terms] for update in updates]
            assert terms == ([["regress"]] if step < 2 else [["critic"]] * critics + [["match", "regress"]])
            assert updates[-1].trains == ("student",)
            assert bool(updates[0].blends) == (step > 2)
    assert (DMD2.needs_pairs(method.config), DMD2.needs_pairs(DMD2Config(name="dmd2"))) == (True, False)


def test_the_regression_by_hand() -> None:
    """weight |x0 - y|^2 at the pairs' noise and prompts, which are not the batch's, conditioned on the grid's time."""
    family = Toy("toy:mixture")
    method: Any = toy_method(DMD, toy_setting(family, grid=[0.7]), regression={"weight": 0.4})
    roles, batch = toy_roles(method, family, dtype=torch.float64), whole_batch(5)
    disturb(roles, "student")
    noise, target = normal(2, 5, 2)
    other = {"component": torch.tensor([0, 1, 2, -1, 0])}
    loss = method.regress(roles.predictors(), replace(batch, pairs=PairBatch(noise, target, other)), rng(range(5)), 0)
    velocity = roles["student"].denoiser(noise, torch.full((5,), 0.7, dtype=torch.float64), other).prediction
    distance = (noise - 0.7 * velocity - target).square().mean()
    torch.testing.assert_close(loss.value, 0.4 * distance)
    torch.testing.assert_close(loss.logs["distance"], distance.detach())


def test_dmd_weighs_its_gradient_with_alpha() -> None:
    assert (DMDConfig(name="dmd").weight, DMDConfig(name="dmd").critic_updates, DMD2Config(name="dmd2").weight) == ("alpha", 1, "normalised")


PAIRS = ["data.pairs=8"]
IMAGES = ["data.prompts=null", "data.images=fastgen:digits"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distiller.gan={}"], "recipe key distiller.gan: needs real data; give data.images in place of data.prompts"),
        (
            ["distiller.inputs=data", "student.steps=2"],
            "recipe key distiller.inputs: data: needs real data; give data.images in place of data.prompts",
        ),
        ([*IMAGES, "distiller.inputs=data"], "recipe key distiller.inputs: data, but a one-step student has no later step that would see them; "),
        (
            ["distiller.renoise=stochastic", "student.steps=4"],
            "recipe key distiller.renoise: stochastic, but the student is sampled and exported with ",
        ),
        ([*IMAGES, "distiller.gan.start=250"], "recipe key distiller.gan.start: 250 leaves none of the 250 student steps in which matching goes on"),
        (
            [*IMAGES, *PAIRS, "distiller.gan.start=50", "distiller.regression.warmup=200"],
            "recipe key distiller.gan.start: 50 leaves none of the 50 student steps in which matching goes on",
        ),
        (
            [*IMAGES, "distiller.gan.taps=[0, 99]", "optimizer.discriminator.lr=1e-3"],
            "recipe key distiller.gan.taps: no block 99; this network has blocks 0 to ",
        ),
        ([*IMAGES, "distiller.gan.taps=[0]"], "recipe key optimizer.discriminator: missing; dmd2 trains student, fake_score, discriminator"),
        (
            ["distiller.decoupled={}", "teacher.guidance=1"],
            "recipe key distiller.decoupled: teacher.guidance is 1, so there is no guidance to match apart",
        ),
        (["distiller.anchor={}"], "recipe key distiller.anchor: a one-step student has no step beside its first; it needs student.steps >= 2"),
        (
            [*PAIRS, "distiller.regression={}", "student.steps=4"],
            "recipe key distiller.regression: a pair says where one step from noise leads, but student.steps is 4",
        ),
        ([*PAIRS, "distiller.regression.warmup=250"], "recipe key distiller.regression.warmup: 250 leaves none of train.steps 250"),
        (["distiller.regression.metric=l1"], "recipe key distiller.regression.metric: Input should be 'latent' or 'lpips' (given: 'l1')"),
        (["distiller.regression={}"], "recipe key data.pairs: missing; dmd2 regresses on noise-sample pairs"),
        (["distiller.ida=1"], "recipe key distiller.ida: Input should be less than 1 (given: 1)"),
        (["distiller.reward.name=brightness"], "recipe key distiller.reward.name: 'brightness' is none of fastgen:digits, module:function, "),
        (["distiller.name=dmd", "distiller.regression=null"], "recipe key distiller.regression: null, but dmd is dmd2 with the regression; "),
        (
            [*PAIRS, "distiller.name=dmd", "student.steps=4"],
            "recipe key student.steps: 4, but dmd distils to one step; use dmd2 or phased_dmd for more",
        ),
        (["distiller.name=f_distill"], "recipe key distiller.gan: needs real data; give data.images in place of data.prompts"),
        ([*IMAGES, "distiller.name=f_distill"], "recipe key optimizer.discriminator: missing; f_distill trains student, fake_score, discriminator"),
        (
            [*IMAGES, *PAIRS, "distiller.gan={}", "distiller.regression.warmup=300"],
            "recipe key distiller.regression.warmup: 300 leaves none of train.steps 250",
        ),
        (["distiller.rollout.steps=2"], "recipe key distiller.rollout.steps: not used with rollout.times: grid; remove it"),
        (["distiller.name=f_distill", "distiller.gan=null"], "recipe key distiller.gan: null, but divergence js needs the ratio "),
        (["student.init=nowhere"], "recipe key student.init: 'nowhere' is neither teacher nor the folder of a run"),
    ],
)
def test_options_that_do_not_fit_the_recipe(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(Recipe.load("digits_dmd2_1step", overrides))
    assert str(caught.value).startswith(message)


def test_a_block_given_in_part_keeps_the_rest_of_its_default() -> None:
    given = {"match_times": {"shift": 1}, "critic_times": {"name": "logit_normal", "lo": 0.1}, "gan": {"times": {"hi": 0.5}}}
    config: Any = validate(DMD2Config, {"name": "dmd2", **given}, "distiller")
    assert (config.match_times.lo, config.match_times.hi, config.match_times.shift) == (0.02, 0.98, 1)
    assert (config.critic_times.name, config.critic_times.lo, config.critic_times.hi) == ("logit_normal", 0.1, 1)
    assert (config.gan.times.lo, config.gan.times.hi) == (0.001, 0.5)
    assert validate(DMD2Config, config.model_dump(mode="json"), "distiller") == config
    other: Any = validate(TBCMConfig, {"name": "tbcm", "trajectory": {"route": "logit_normal", "times": {"mean": 1.0}}}, "distiller")
    assert (other.trajectory.times.name, other.trajectory.times.mean) == ("logit_normal", 1)
