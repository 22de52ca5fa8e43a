"""The adversarial terms: values by hand, whose parameters they train, and what their optimum means."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from matching_cases import batch_of, double
from test_dmd2 import disturb
from torch import Tensor
from torch.nn.functional import softplus
from toy_runs import Recorded, normal, optimizer_block, rng, toy_method, toy_roles, toy_setting, toy_trainer

from fastgen.config import validate
from fastgen.distillers import gan
from fastgen.distillers.base import Batch, Loss
from fastgen.distillers.dmd2 import DMD2
from fastgen.distillers.gan import GANConfig
from fastgen.distillers.phased_dmd import PhasedDMD
from fastgen.errors import TrainingFailed, UserError
from fastgen.families.toy import Toy
from fastgen.path import Flow
from fastgen.roles import LoraTuning, Roles, build_roles

FEATURES = pytest.mark.parametrize("features", ["teacher", "fake_score"])
ADAPTERS = pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
COUNT = 6


@torch.no_grad()
def disturb_heads(roles: Roles) -> None:
    for name, role in roles.trained.items():
        for key, parameter in role.parameters().items():
            if key.startswith("heads."):
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name + key)))


def case(*, adapters: bool = False, dtype: torch.dtype = torch.float64, autocast: torch.dtype | None = None, **keys: Any) -> tuple[Any, Roles, Batch]:
    """A one-step method with a discriminator, its roles with every network and head moved off its start, and a batch of real data."""
    family = Toy("toy:mixture", width=32)
    method: Any = toy_method(DMD2, toy_setting(family, grid=[0.7]), gan=keys)
    tuning = LoraTuning(rank=3, alpha=3.0, targets=family.lora_targets) if adapters else None
    roles = build_roles(method.roles_for(method.config), family, family.load_backbone().to(dtype), tuning=tuning, autocast=autocast)
    if adapters:
        for name in ("student", "fake_score"):
            for i, (key, parameter) in enumerate(roles[name].parameters().items()):
                if "lora_B" in key:
                    parameter.data += 0.2 * normal(*parameter.shape, seed=i + len(name)).to(dtype)
    else:
        disturb(roles, "student", "fake_score")
    disturb_heads(roles)
    return method, roles, batch_of(COUNT, 1, family.mixture.sample(COUNT, torch.Generator().manual_seed(0)).to(dtype))


def touched(roles: Roles) -> set[tuple[str, str]]:
    """(role, part) of all parameters with gradients, each of which must move."""
    found = set()
    for name, role in roles.trained.items():
        for key, parameter in role.parameters().items():
            if parameter.grad is not None:
                found.add((name, "heads" if key.startswith("heads.") else "network"))
    trained = {id(parameter) for role in roles.trained.values() for parameter in role.parameters().values()}
    assert all(p.grad is None for role in roles.values() for p in role.denoiser.parameters() if id(p) not in trained)
    return found


@ADAPTERS
@FEATURES
def test_each_turn_reaches_only_what_it_trains(features: Any, adapters: bool) -> None:
    method, roles, batch = case(adapters=adapters, features=features, r1=0.5)
    own = {("discriminator", "heads")} if features == "teacher" else {("fake_score", "heads"), ("fake_score", "network")}
    wanted = {"critic": {("fake_score", "network")}, "discriminate": own, "match": {("student", "network")}}
    critic, *_, improve = method.updates(0)
    assert critic.trains == (("fake_score", "discriminator") if features == "teacher" else ("fake_score",))
    assert improve.trains == ("student",)
    seen = []
    for update in (critic, improve):
        for term in update.terms:
            with roles.training(update.trains):
                term(roles.predictors(), batch, rng(COUNT), 0).value.backward()
            assert touched(roles) == wanted[term.__name__]
            for role in roles.values():
                role.denoiser.zero_grad(set_to_none=True)
            seen.append(term.__name__)
    assert seen == ["critic", "discriminate", "match"]


@ADAPTERS
@FEATURES
def test_half_precision_changes_losses_and_gradients_little(features: Any, adapters: bool) -> None:
    """Losses and gradients are fp32 under bf16 autocast; each term's are within a few percent of full precision's."""
    results = []
    for autocast in (None, torch.bfloat16):
        method, roles, batch = case(adapters=adapters, dtype=torch.float32, autocast=autocast, features=features, weight=1.0)
        critic, *_, improve = method.updates(0)
        for update in (critic, improve):
            own = [parameter for name in update.trains for parameter in roles[name].parameters().values()]
            for term in update.terms:
                with roles.training(update.trains):
                    loss = term(roles.predictors(), batch, rng(COUNT), 0).value
                    gradients = torch.autograd.grad(loss, own, allow_unused=True)
                assert loss.dtype == torch.float32
                assert all(gradient.dtype == torch.float32 for gradient in gradients if gradient is not None)
                results.append((loss.item(), torch.cat([g.flatten() for g in gradients if g is not None])))
    for (wide, gradient), (narrow, other) in zip(results[:3], results[3:], strict=True):
        assert narrow == pytest.approx(wide, rel=0.05)
        assert torch.nn.functional.cosine_similarity(gradient, other, dim=0) >= 0.99


def test_the_discriminator_enters_late_in_every_phase() -> None:
    """`start` counts from where the present fake score's matching began."""
    phases = [{"start": 1, "end": 0.6}, {"start": 0.6, "end": 0}]
    grid = (1.0, 0.6)
    family = Toy("toy:mixture", width=32)
    setting = replace(toy_setting(family, grid=grid), train_steps=6)
    method: Any = toy_method(PhasedDMD, setting, phases=phases, gan={"start": 2})
    roles = toy_roles(method, family)
    latents = family.mixture.sample(COUNT, torch.Generator().manual_seed(0)).float()
    logged = [method.match(roles.predictors(), batch_of(COUNT, 1, latents), rng(COUNT, step), step).logs for step in range(6)]
    assert ["gan" in logs for logs in logged] == [False, False, True, False, False, True]


def one_step(roles: Roles, method: Any, draws: Any) -> Tensor:
    """The student's sample on Flow from t = .7, by hand."""
    noise = draws.normal("noise", (2,))
    t = torch.full((COUNT,), 0.7, dtype=torch.float64)
    return noise - 0.7 * roles["student"].denoiser(noise, t, batch_of(COUNT, 1).cond).prediction


@FEATURES
def test_the_discriminators_loss_by_hand(features: Any) -> None:
    """Real and generated samples under noises of their own at equal levels, and the penalty's real data moved before they are noised."""
    method, roles, batch = case(features=features, times={"lo": 0.2, "hi": 0.6}, r1=0.5, r1_noise=0.05)
    draws = rng(COUNT)
    t = (0.2 + 0.4 * draws.uniform("gan_time"))[:, None]
    eps, other = draws.normal("real_noise", (2,)), draws.normal("fake_noise", (2,))
    judge = roles["discriminator" if features == "teacher" else "fake_score"].denoiser

    def logits(x0: Tensor, noise: Tensor) -> Tensor:
        return judge((1 - t) * x0 + t * noise, t[:, 0], batch.cond, judge=True).logits

    assert batch.latents is not None
    real, fake = logits(batch.latents, eps), logits(one_step(roles, method, draws), other)
    moved = logits(batch.latents + 0.05 * draws.normal("r1_noise", (2,)), eps)
    penalty = (moved - real).square().mean()
    want = (1 + fake.exp()).log().mean() + (1 + (-real).exp()).log().mean() + 0.5 * penalty
    loss = method.discriminate(roles.predictors(), batch, draws, 0)
    torch.testing.assert_close(loss.value, (1.0 if features == "teacher" else 1e-2) * want)
    assert real.shape == (COUNT, 3)
    assert {name: value.item() for name, value in loss.logs.items()} == {
        "real": pytest.approx(real.mean().item()), "fake": pytest.approx(fake.mean().item()), "r1": pytest.approx(penalty.item())
    }  # fmt: skip


@FEATURES
def test_the_students_loss_by_hand(features: Any) -> None:
    """Beside the matching, weight softplus(-D) of its own re-noised samples, and the gradient of that."""
    method, roles, batch = case(features=features, times={"lo": 0.2, "hi": 0.6}, weight=0.3)
    plain: Any = toy_method(DMD2, method.setting)
    draws, models = rng(COUNT), roles.predictors()
    t = (0.2 + 0.4 * draws.uniform("gan_time"))[:, None]
    carried = (1 - t) * one_step(roles, method, draws) + t * draws.normal("gan_noise", (2,))
    judge = roles["discriminator" if features == "teacher" else "fake_score"].denoiser
    want = 0.3 * (1 + (-judge(carried, t[:, 0], batch.cond, judge=True).logits).exp()).log().mean()
    alone, both = (m.match(models, batch, draws, 0) for m in (plain, method))
    torch.testing.assert_close(both.value - alone.value, want)
    assert both.logs["gan"].item() == pytest.approx(want.item() / 0.3)
    own = list(roles["student"].parameters().values())
    with_gan, without, by_hand = (torch.autograd.grad(value, own) for value in (both.value, alone.value, want))
    for a, b, c in zip(with_gan, without, by_hand, strict=True):
        torch.testing.assert_close(a - b, c)
    assert max(gradient.abs().max().item() for gradient in by_hand) > 1e-5


def test_an_untrained_discriminator_says_nothing() -> None:
    family = Toy("toy:mixture")
    method: Any = toy_method(DMD2, toy_setting(family, grid=[0.7]), gan={"weight": 2.0})
    plain: Any = toy_method(DMD2, method.setting)
    roles = toy_roles(method, family)
    disturb(roles, "fake_score")
    models, batch = roles.predictors(), batch_of(COUNT, -1, normal(COUNT, 2).float())
    assert method.discriminate(models, batch, rng(COUNT), 0).value.item() == pytest.approx(2 * math.log(2))
    own = list(roles["student"].parameters().values())
    both, alone = (m.match(models, batch, rng(COUNT), 0) for m in (method, plain))
    assert both.value.item() == pytest.approx(alone.value.item() + 2 * math.log(2))
    for a, b in zip(*(torch.autograd.grad(loss.value, own) for loss in (both, alone)), strict=True):
        assert torch.equal(a, b)


def test_the_discriminator_enters_the_students_loss_at_its_start() -> None:
    method, roles, batch = case(start=3)
    for step in range(5):
        assert ("gan" in method.match(roles.predictors(), batch, rng(COUNT, step), step).logs) == (step >= 3)
        assert [term.__name__ for term in method.updates(step)[0].terms] == ["critic", "discriminate"]


def test_both_sides_see_equal_levels_in_one_pass_and_stay_above_a_phases_end() -> None:
    """The student's x_s goes on from s, so that its law at t is that of the real data's where p_s is."""
    family = Toy("toy:mixture")
    setting = replace(toy_setting(family, grid=[1.0, 0.6]), train_steps=2)
    phases = [{"start": 1, "end": 0.6}, {"start": 0.6, "end": 0}]
    method: Any = toy_method(PhasedDMD, setting, phases=phases, gan={}, margin=0.05)
    roles = toy_roles(method, family)
    judge, latents = Recorded(roles["discriminator"].predictor), normal(COUNT, 2).float()
    draws = rng(COUNT)
    method.discriminate(roles.predictors() | {"discriminator": judge}, batch_of(COUNT, -1, latents), draws, 0)
    ((x, t, cond),) = judge.inputs
    assert torch.equal(t[:COUNT], t[COUNT:])
    assert cond["component"].tolist() == [-1] * 2 * COUNT
    assert bool((t >= 0.65 - 1e-6).all())
    level = t[:COUNT, None]
    torch.testing.assert_close(x[:COUNT], (1 - level) * latents + level * draws.normal("real_noise", (2,)))
    noise = draws.normal("noise", (2,))
    with torch.no_grad():
        x_s = noise - 0.4 * roles["student"].denoiser(noise, torch.ones(COUNT), batch_of(COUNT).cond).prediction
    ratio = (1 - level) / 0.4
    kept = (level**2 - (0.6 * ratio) ** 2).sqrt()
    torch.testing.assert_close(x[COUNT:], ratio * x_s + kept * draws.normal("fake_noise", (2,)), rtol=1e-4, atol=1e-5)


def test_the_penalty_is_zero_without_a_disturbance_and_the_squared_slope_for_a_small_one() -> None:
    _, roles, batch = case()
    judge, t = roles["discriminator"].predictor, torch.linspace(0.1, 0.9, COUNT).double()
    assert batch.latents is not None
    real, eps, direction = batch.latents, normal(COUNT, 2), normal(COUNT, 2, seed=1)

    def penalty(size: float) -> float:
        return gan.approximate_r1(judge, Flow(), real, eps, size * direction, t, batch.cond).item()

    assert penalty(0.0) <= 1e-24  # the square of rounding
    slopes: Any = torch.autograd.functional.jvp(lambda x: judge.logits(Flow().mix(x, eps, t), t, batch.cond), real, direction)[1]
    assert penalty(1e-5) == pytest.approx(1e-10 * slopes.square().mean().item(), rel=1e-3)
    assert penalty(1.0) > 0


def test_the_optimum_is_the_logarithm_of_the_density_ratio() -> None:
    """N(1, 1) against N(-.5, 1), whose log ratio is 1.5 x - .375: there, and only there, the loss of a linear logit is stationary."""
    quantiles = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    real, fake = quantiles + 1, quantiles - 0.5
    for slope, offset in ((1.5, -0.375), (1.3, -0.375), (1.5, -0.2), (-1.5, 0.375)):
        a, b = double(slope).requires_grad_(), double(offset).requires_grad_()
        loss = gan.discriminator_loss((a * real + b)[:, None], (a * fake + b)[:, None])
        size = torch.cat(torch.autograd.grad(loss, [a, b])).norm().item()
        assert (size < 1e-4) == ((slope, offset) == (1.5, -0.375))


def test_losses_by_hand() -> None:
    real, fake = double([0.3, -1.0], [2.0, 0.0]), double([1.0, 0.5], [-0.5, -3.0])
    assert gan.discriminator_loss(real, fake).item() == pytest.approx((softplus(fake).sum() + softplus(-real).sum()).item() / 4)
    assert gan.generator_loss(fake).item() == pytest.approx(softplus(-fake).sum().item() / 4)
    # a sample that passes for real costs the student less
    assert gan.generator_loss(real + 5) < gan.generator_loss(real)
    torch.testing.assert_close(gan.log_ratio(double([1.0, 4.0], [-30.0, 2.0], [30.0, 30.0])), double(2.5, -10.0, 10.0))


@ADAPTERS
@FEATURES
def test_the_teacher_is_itself_after_steps_and_after_an_error(features: Any, adapters: bool) -> None:
    """And what requires gradients is as before."""
    method, roles, batch = case(adapters=adapters, features=features, dtype=torch.float32)
    trainer = toy_trainer(method, Toy("toy:mixture", width=32), latents=batch.latents, roles=roles)

    def teacher() -> Tensor:
        x, t = normal(COUNT, 2).float(), torch.linspace(0.1, 0.9, COUNT)
        return roles["teacher"].predictor(x, t, batch.cond)

    before, student = teacher(), [p.detach().clone() for p in trainer.parameters["student"]]
    required = {key: p.requires_grad for role in roles.values() for key, p in role.denoiser.named_parameters()}
    trainer.train_step()
    assert torch.equal(teacher(), before)
    assert any(not torch.equal(p, start) for p, start in zip(trainer.parameters["student"], student, strict=True))

    def discriminate(*arguments: Any) -> Loss:
        loss = type(method).discriminate(method, *arguments)
        return Loss(loss.value * float("nan"))

    vars(method)["discriminate"] = discriminate
    with pytest.raises(TrainingFailed, match="term 'discriminate'"):
        trainer.train_step()
    assert torch.equal(teacher(), before)
    assert required == {key: p.requires_grad for role in roles.values() for key, p in role.denoiser.named_parameters()}


@FEATURES
def test_micro_batches_change_nothing(features: Any) -> None:
    """Weights after two plain SGD steps, hence gradients; heads start off zero."""
    ends, sgd = [], optimizer_block(name="sgd", lr=0.1, betas=(0.0, 0.0))
    for size in (None, 1, 4):
        method, roles, batch = case(features=features, dtype=torch.float32, r1=0.5, weight=0.5)
        trainer = toy_trainer(method, Toy("toy:mixture", width=32), latents=batch.latents, roles=roles, optimizers=sgd, micro_batch=size)
        for _ in range(2):
            trainer.train_step()
        ends.append(torch.cat([p.detach().flatten() for own in trainer.parameters.values() for p in own]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weight": 0}, "recipe key distiller.gan.weight: Input should be greater than 0 (given: 0)"),
        ({"features": "student"}, "recipe key distiller.gan.features: Input should be 'teacher' or 'fake_score' (given: 'student')"),
        ({"tap": [1]}, "recipe key distiller.gan.tap: unknown key; did you mean 'taps'?"),
        ({"r1": -1}, "recipe key distiller.gan.r1: Input should be greater than or equal to 0 (given: -1)"),
        ({"taps": []}, "recipe key distiller.gan.taps: auto, or one block or more, each named once (given: [])"),
        ({"taps": [1, 1]}, "recipe key distiller.gan.taps: auto, or one block or more, each named once (given: [1, 1])"),
        ({"r1": 1, "r1_noise": 0}, "recipe key distiller.gan.r1_noise: Input should be greater than 0 (given: 0)"),
        ({"r1_noise": 0.2}, "recipe key distiller.gan.r1_noise: not used with gan.r1: 0.0; remove it"),
        ({"fake_score_weight": 1}, "recipe key distiller.gan.fake_score_weight: not used with gan.features: teacher; remove it"),
        ({"times": {"lo": 0.5, "hi": 0.2}}, "recipe key distiller.gan.times: lo must not exceed hi, got lo 0.5 and hi 0.2"),
    ],
)
def test_mistakes_in_the_config_name_the_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(DMD2.Config, {"name": "dmd2", "gan": keys}, "distiller")
    assert str(caught.value).startswith(message)


def test_taps_choose_the_heads() -> None:
    family = Toy("toy:mixture")
    for taps, want in (("auto", (0, 1, 2)), ((2,), (2,)), ((1, 0), (1, 0))):
        method: Any = toy_method(DMD2, toy_setting(family), gan={"taps": taps})
        heads = toy_roles(method, family)["discriminator"].denoiser.heads
        assert heads is not None and heads.taps == want
    with pytest.raises(UserError, match=r"distiller\.gan\.taps: no block 3; this network has blocks 0 to 2"):
        toy_roles(toy_method(DMD2, toy_setting(family), gan=GANConfig(taps=(0, 3))), family)
