"""The loop against steps taken by hand: accumulation, schedules, clipping, averages, failures, and methods it has never seen."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from toy_runs import optimizer_block, toy_method, toy_setting, toy_trainer, weights

from fastgen.distillers.base import Batch, Blend, Distiller, Loss, Models, Update
from fastgen.distillers.dmd2 import DMD2
from fastgen.distillers.flow_matching import FlowMatching
from fastgen.errors import TrainingFailed
from fastgen.families.toy import Toy
from fastgen.optimizers import make_optimizer
from fastgen.rng import SampleRng
from fastgen.roles import RoleSpec, frozen, student, trainable
from fastgen.trainer import Trainer, lr_factor

SGD = optimizer_block(name="sgd", lr=0.1, betas=(0.0, 0.0), clip=1e9)


class TwoTerms(Distiller):
    """Two networks trained in one update on the sum of two terms; the second ties them together."""

    roles: ClassVar[dict[str, RoleSpec]] = {"student": student(), "judge": trainable(), "teacher": frozen()}

    def updates(self, step: int) -> list[Update]:
        return [Update(("student", "judge"), (self.pull, self.tie))]

    def pull(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        x, t = rng.normal("x", (2,)), 0.1 + 0.8 * rng.uniform("t")
        error = models["student"](x, t, batch.cond) - rng.normal("target", (2,))
        return Loss(error.square().mean(), {"error": error.detach().abs().mean()})

    def tie(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        x, t = rng.normal("x", (2,)), 0.1 + 0.8 * rng.uniform("t")
        difference = models["student"](x, t, batch.cond) - 2 * models["judge"](x, t, batch.cond) + 0.5 * models["teacher"](x, t, batch.cond)
        return Loss(difference.square().mean())


def two_terms(**options: Any) -> Trainer:
    family = Toy("toy:mixture")
    return toy_trainer(toy_method(TwoTerms, toy_setting(family)), family, **{"optimizers": SGD, **options})


def dmd2(**options: Any) -> Trainer:
    family = Toy("toy:mixture")
    method = toy_method(DMD2, toy_setting(family, steps=3, guidance=1.5, negative="1"), critic_updates=2)
    return toy_trainer(method, family, prompts=["", "0", "2"], **{"optimizers": SGD, **options})


def flow_matching(**options: Any) -> Trainer:
    family = Toy("toy:mixture")
    latents = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    method = toy_method(FlowMatching, toy_setting(family, negative="1"), drop=0.3)
    return toy_trainer(method, family, latents=latents, **{"optimizers": SGD, **options})


RUNS = pytest.mark.parametrize("make", [dmd2, flow_matching, two_terms])


def gradients_by_hand(trainer: Trainer, *, scale: float = 1.0) -> dict[str, list[Tensor]]:
    """Gradients of the first update's summed terms, in one graph, at the current weights."""
    (update,) = trainer.distiller.updates(trainer.step)
    rng = SampleRng(trainer.settings.seed, (trainer.step, 0), range(trainer.settings.batch_size))
    batch = trainer.data.draw(rng.at("data"))
    total = sum(term(trainer.models, batch, rng.at(term.__name__), trainer.step).value for term in update.terms)
    owned = [trainer.parameters[name] for name in update.trains]
    flat = torch.autograd.grad(total * scale, [p for own in owned for p in own])  # type: ignore[union-attr]
    found = iter(flat)
    return {name: [next(found) for _ in own] for name, own in zip(update.trains, owned, strict=True)}


def snapshot(trainer: Trainer) -> dict[str, list[Tensor]]:
    return {name: [p.detach().clone() for p in own] for name, own in trainer.parameters.items()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


@RUNS
@pytest.mark.parametrize("size", [1, 4, 6])
def test_micro_batches_change_nothing(make: Any, size: int) -> None:
    """Weights after three plain SGD steps, hence gradients, and every logged number but `sample_std`, which is a micro-batch's."""
    whole, parts = make(batch_size=12), make(batch_size=12, micro_batch=size)
    start = weights(whole)
    for _ in range(3):
        logs = [trainer.train_step() for trainer in (whole, parts)]
        for log in logs:
            log.pop("match/sample_std", None)
        assert logs[0] == pytest.approx(logs[1], rel=1e-4, abs=1e-6)
    assert largest_difference(weights(whole), start) > 1e-3
    assert largest_difference(weights(whole), weights(parts)) <= 1e-6


@RUNS
def test_two_equal_runs_end_bitwise_equal(make: Any) -> None:
    ends = []
    for seed in (3, 3, 4):
        trainer = make(seed=seed, optimizers=optimizer_block(lr=1e-2))
        trainer.run([])
        ends.append(weights(trainer))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert largest_difference(ends[0], ends[2]) > 1e-3


def test_a_step_descends_the_sum_of_all_terms_in_all_trained_roles() -> None:
    trainer = two_terms()
    before, want = snapshot(trainer), gradients_by_hand(trainer)
    metrics = trainer.train_step()
    for name, own in trainer.parameters.items():
        for start, parameter, gradient in zip(before[name], own, want[name], strict=True):
            torch.testing.assert_close(parameter.detach(), start - 0.1 * gradient, rtol=1e-5, atol=1e-7)
        norm = torch.cat([gradient.flatten() for gradient in want[name]]).norm().item()
        assert metrics[f"grad_norm/{name}"] == pytest.approx(norm, rel=1e-5)
    assert metrics.keys() == {"loss/pull", "loss/tie", "pull/error", "grad_norm/student", "grad_norm/judge", "lr/student", "lr/judge"}


def test_logged_losses_average_over_the_updates_of_a_step() -> None:
    trainer, seen = dmd2(), []

    def watch(term: Any) -> Any:
        def critic(*arguments: Any) -> Loss:
            loss = term(*arguments)
            seen.append(loss.value.item())
            return loss

        return critic

    inner = trainer.distiller.updates
    vars(trainer.distiller)["updates"] = lambda step: [
        Update(u.trains, tuple(watch(t) if t.__name__ == "critic" else t for t in u.terms)) for u in inner(step)
    ]
    metrics = trainer.train_step()
    assert len(seen) == 2
    assert metrics["loss/critic"] == pytest.approx(sum(seen) / 2, rel=1e-6)


def test_clipping_scales_each_roles_gradient_to_the_limit() -> None:
    clip = 0.01
    trainer = two_terms(optimizers=SGD.model_copy(update={"lr": 1.0, "clip": clip}))
    before, gradients = snapshot(trainer), gradients_by_hand(trainer)
    metrics = trainer.train_step()
    for name, own in trainer.parameters.items():
        moved = torch.cat([(p.detach() - start).flatten() for p, start in zip(own, before[name], strict=True)])
        flat = torch.cat([gradient.flatten() for gradient in gradients[name]])
        assert flat.norm() > 2 * clip
        assert metrics[f"grad_norm/{name}"] == pytest.approx(flat.norm().item(), rel=1e-5)  # before clipping
        torch.testing.assert_close(moved, -flat * clip / flat.norm(), rtol=1e-4, atol=1e-6)


def test_a_small_gradient_is_not_clipped() -> None:
    ends = []
    for clip in (1e3, 1e9):
        trainer = two_terms(optimizers=SGD.model_copy(update={"clip": clip}))
        trainer.train_step()
        ends.append(weights(trainer))
    assert largest_difference(*ends) <= 1e-6


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_optimizers_follow_torch_on_the_same_gradients(name: Any) -> None:
    block = optimizer_block(name=name, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    plain: dict[str, Any] = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, foreach=False, fused=False),
        "adam": lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, foreach=False, fused=False),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, weight_decay=0.1, foreach=False),
    }
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 3, generator=generator)), torch.nn.Parameter(torch.randn(7, generator=generator))]
    theirs = copy.deepcopy(ours)
    optimizers = make_optimizer(block, ours), plain[name](theirs)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("schedule", "warmup", "steps", "want"),
    [
        ("constant", 0, 10, {0: 1.0, 5: 1.0, 9: 1.0}),
        ("constant", 4, 10, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 9: 1.0}),
        ("linear", 0, 10, {0: 1.0, 5: 0.5, 9: 0.1}),
        ("linear", 4, 14, {0: 0.25, 3: 1.0, 4: 1.0, 9: 0.5, 13: 0.1}),
        ("cosine", 0, 12, {0: 1.0, 4: 0.75, 6: 0.5, 8: 0.25, 11: 0.0170371}),
        ("cosine", 2, 14, {0: 0.5, 1: 1.0, 2: 1.0, 8: 0.5, 13: 0.0170371}),
        ("cosine", 20, 10, {0: 0.05, 9: 0.5}),
    ],
)
def test_learning_rate_schedules_by_hand(schedule: Any, warmup: int, steps: int, want: dict[int, float]) -> None:
    block = optimizer_block(lr=1.0, schedule=schedule, warmup=warmup)
    assert {step: lr_factor(block, step, steps) for step in want} == pytest.approx(want, rel=1e-5)


def test_each_role_follows_its_own_schedule() -> None:
    blocks = {
        "student": SGD.model_copy(update={"schedule": "linear"}),
        "judge": SGD.model_copy(update={"lr": 0.4, "warmup": 2}),
    }
    trainer, logged = two_terms(optimizers=blocks, steps=4), []
    trainer.run([lambda step, metrics: logged.append((step, metrics["lr/student"], metrics["lr/judge"]))])
    assert logged == [(1, pytest.approx(0.1), 0.2), (2, pytest.approx(0.075), 0.4), (3, 0.05, 0.4), (4, pytest.approx(0.025), 0.4)]
    assert [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers.values()] == [pytest.approx(0.025), 0.4]


def test_the_average_moves_once_a_step() -> None:
    """d = min(0.15, (1 + n)/(10 + n)) after n updates: 0.1 and then 0.15, whatever the number of critic updates."""
    trainer = dmd2(ema=0.15)
    want = trainer.parameters["student"][-1].detach().clone()
    for decay in (0.1, 0.15, 0.15):
        trainer.train_step()
        want = decay * want + (1 - decay) * trainer.parameters["student"][-1].detach()
    assert trainer.ema["student"].updates == 3
    name = list(trainer.roles["student"].parameters())[-1]
    torch.testing.assert_close(trainer.ema["student"].shadow[name], want, rtol=1e-5, atol=1e-8)


def test_events_see_every_finished_step_and_a_stop_ends_the_run() -> None:
    trainer, steps = dmd2(steps=9), []
    trainer.run([lambda step, metrics: steps.append(step)], should_stop=lambda: trainer.step == 3)
    assert steps == [1, 2, 3]
    trainer.run([lambda step, metrics: steps.append(step)])
    assert steps == [*range(1, 10)]


class Failing(TwoTerms):
    """At step 2 the second term's loss, or its gradient alone, stops being finite."""

    what: ClassVar[str]

    def tie(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        loss = super().tie(models, batch, rng, step)
        if step < 2:
            return loss
        if self.what == "loss":
            return Loss(loss.value * float("nan"))
        judged = models["judge"](rng.normal("x", (2,)), 0.5 + 0 * rng.uniform("t"), batch.cond)
        return Loss(loss.value + (judged - judged.detach()).square().sum().sqrt())  # sqrt at 0: 0, with an infinite slope


class FailingLoss(Failing):
    what = "loss"


class FailingGradient(Failing):
    what = "gradient"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (FailingLoss, "step 2: the loss of term 'tie', which trains role 'student' and 'judge', is nan; "),
        (FailingGradient, "step 2: the gradient norm of role 'judge', from term 'pull' and 'tie', is nan; "),
    ],
)
def test_the_first_number_that_is_not_finite_ends_the_run(method: type[Failing], message: str) -> None:
    family = Toy("toy:mixture")
    trainer = toy_trainer(toy_method(method, toy_setting(family)), family, optimizers=SGD, steps=5)
    finished: list[int] = []
    with pytest.raises(TrainingFailed) as caught:
        trainer.run([lambda step, metrics: finished.append(step)])
    assert str(caught.value).startswith(message)
    assert finished == [1, 2]
    assert trainer.step == trainer.ema["student"].updates == 2
    assert all(bool(value.isfinite().all()) for value in weights(trainer).values())


class Watching(TwoTerms):
    """Keeps weak references to tensors inside the first term's graph, and notes whether they live when the second term is built."""

    watched: ClassVar[list[weakref.ref[Tensor]]]
    alive_with_graph: ClassVar[list[bool]]
    alive_at_second: ClassVar[list[bool]]

    def pull(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        inner = models["student"](rng.normal("x", (2,)), 0.5 + 0 * rng.uniform("t"), batch.cond) * 1.5
        value = inner.square().mean()
        self.watched.append(weakref.ref(inner))
        del inner
        self.alive_with_graph.append(self.watched[-1]() is not None)
        return Loss(value)

    def tie(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        self.alive_at_second.append(self.watched[-1]() is not None)
        return super().tie(models, batch, rng, step)


def test_a_terms_graph_is_freed_before_the_next_term_is_built() -> None:
    Watching.watched, Watching.alive_with_graph, Watching.alive_at_second = [], [], []
    family = Toy("toy:mixture")
    toy_trainer(toy_method(Watching, toy_setting(family)), family, micro_batch=4).train_step()
    assert Watching.alive_with_graph == [True, True]
    assert Watching.alive_at_second == [False, False]


class Experts(Distiller):
    """Trains `student` at even steps and `student_2` at odd ones; a judge is blended and experts settle as the test says."""

    roles: ClassVar[dict[str, RoleSpec]] = {"student": student(), "student_2": student(), "judge": trainable()}
    blends: tuple[Blend, ...] = ()
    settles: tuple[str, ...] = ()

    def updates(self, step: int) -> list[Update]:
        return [Update(("student_2" if step % 2 else "student",), (self.pull,), self.blends, self.settles)]

    def pull(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        x, t = rng.normal("x", (2,)), 0.1 + 0.8 * rng.uniform("t")
        return Loss(models["student_2" if step % 2 else "student"](x, t, batch.cond).square().mean())

    def span(self, role: str) -> tuple[int, int] | None:
        return (1, 5) if role == "student_2" else None


def experts(**options: Any) -> Trainer:
    family = Toy("toy:mixture", width=16)
    return toy_trainer(toy_method(Experts, toy_setting(family)), family, **{"optimizers": SGD, "steps": 6, **options})


def flat(values: Iterable[Tensor]) -> Tensor:
    return torch.cat([value.detach().flatten() for value in values])


def test_only_the_averages_of_trained_roles_move() -> None:
    trainer = experts()
    for updates in ((1, 0), (1, 1), (2, 1)):
        before = {name: flat(average.shadow.values()) for name, average in trainer.ema.items()}
        counts = {name: average.updates for name, average in trainer.ema.items()}
        trainer.train_step()
        for name, now in zip(("student", "student_2"), updates, strict=True):
            assert trainer.ema[name].updates == now
            assert torch.equal(flat(trainer.ema[name].shadow.values()), before[name]) == (now == counts[name])
    assert trainer.ema.keys() == {"student", "student_2"}


def test_an_update_settles_then_blends_then_trains() -> None:
    """The judge moves a quarter of its way to the average that `student` has just taken over, and neither takes part in the step."""
    trainer = experts(ema=0.5)
    for _ in range(3):
        trainer.train_step()
    average, judge = flat(trainer.ema["student"].shadow.values()), flat(trainer.parameters["judge"])
    expert = flat(trainer.parameters["student_2"])
    assert (average - flat(trainer.parameters["student"])).abs().max() > 1e-4
    vars(trainer.distiller).update(blends=(Blend("judge", "student", 0.25),), settles=("student",))
    trainer.train_step()
    assert torch.equal(flat(trainer.parameters["student"]), average)
    torch.testing.assert_close(flat(trainer.parameters["judge"]), 0.75 * judge + 0.25 * average, rtol=1e-6, atol=1e-7)
    assert not torch.equal(flat(trainer.parameters["student_2"]), expert)
    assert torch.equal(flat(trainer.ema["student"].shadow.values()), average)


def test_all_averages_are_applied_and_settled_together() -> None:
    trainer = experts()
    for _ in range(4):
        trainer.train_step()
    weights = {name: flat(trainer.parameters[name]) for name in trainer.ema}
    averages = {name: flat(average.shadow.values()) for name, average in trainer.ema.items()}
    with trainer.ema.applied():
        assert all(torch.equal(flat(trainer.parameters[name]), value) for name, value in averages.items())
    assert all(torch.equal(flat(trainer.parameters[name]), value) for name, value in weights.items())
    trainer.ema.settle()
    assert all(torch.equal(flat(trainer.parameters[name]), value) for name, value in averages.items())
    assert all(not torch.equal(weights[name], value) for name, value in averages.items())


def test_a_role_that_trains_in_part_of_the_run_has_its_schedule_there() -> None:
    """Linear from .1: `student` over the run's six steps, `student_2` over steps 1 to 5."""
    trainer, rates = experts(optimizers=SGD.model_copy(update={"schedule": "linear"})), []
    trainer.step = 2
    trainer.run([lambda step, metrics: rates.append({key: value for key, value in metrics.items() if key.startswith("lr/")})])
    assert rates == [
        pytest.approx(row) for row in ({"lr/student": 0.1 * 4 / 6}, {"lr/student_2": 0.06}, {"lr/student": 0.1 * 2 / 6}, {"lr/student_2": 0.02})
    ]
