"""Progressive distillation: grids and their halvings, the paper's target by hand, weights, and students that take their teacher's place."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from oracle import SCHEDULES, gaussian_prediction
from torch import Tensor
from toy_runs import MEAN, VARIANCE, Recorded, normal, optimizer_block, rng, toy_method, toy_roles, toy_setting, toy_trainer

from fastgen import checkpoint
from fastgen.config import Recipe, validate
from fastgen.distillers.base import Batch, Facts, Origin
from fastgen.distillers.progressive import Progressive
from fastgen.distillers.solver import integrate
from fastgen.errors import UserError
from fastgen.families.toy import Toy
from fastgen.path import DiscreteVP, Flow, Kind, Path, TrigFlow, VariancePreserving
from fastgen.plan import plan
from fastgen.sampling import few_step, walk

STABLE = DiscreteVP.scaled_linear(1000, 0.00085, 0.012)
WORLDS: dict[str, tuple[Path, Kind]] = {
    "Flow": (Flow(), "velocity"),
    "TrigFlow": (TrigFlow(), "velocity"),
    "VariancePreserving": (VariancePreserving(), "eps"),
    "DiscreteVP": (STABLE, "v"),
}


def progressive(family: Toy, *, steps: int = 4, grid: Any = None, guidance: float = 1.0, train_steps: int = 8, **keys: Any) -> Any:
    setting = toy_setting(family, steps=steps, grid=grid, guidance=guidance, negative="2" if guidance > 1 else "")
    return toy_method(Progressive, replace(setting, train_steps=train_steps), **keys)


def world(name: str, source: str = "toy:gaussian", width: int = 64) -> Toy:
    path, kind = WORLDS[name]
    return Toy(source, path=path, kind=kind, width=width)


def data(count: int = 64) -> Tensor:
    return MEAN + normal(count, 2) * VARIANCE.sqrt()


def flow_time(path: Path, t: Tensor) -> Tensor:
    alpha, sigma = path.coeffs(t)
    return sigma / (alpha + sigma)


def disturb(roles: Any, *names: str) -> None:
    """Make networks differ from the teacher and from one another."""
    for seed, name in enumerate(names):
        torch.nn.init.normal_(roles[name].denoiser.backbone.out.weight, std=0.3, generator=torch.Generator().manual_seed(seed))


# Steps and halvings


@pytest.mark.parametrize("name", WORLDS)
def test_a_students_steps_are_two_of_its_teachers(name: str) -> None:
    """Each grid has every second time of the one before, on every path; the last is the student's own."""
    family = world(name)
    method = progressive(family, halvings=3)
    names = ["student_4", "student_2", "student"]
    assert list(method.roles_for(method.config)) == [*names, "teacher"]
    assert [len(method._steps[each]) for each in names] == [16, 8, 4]
    for fine, coarse in pairwise(names):
        torch.testing.assert_close(method._steps[coarse][:, 1], method._steps[fine][1::2, 0])
    for each in names:
        steps = method._steps[each]
        torch.testing.assert_close(steps[1:, 0], steps[:-1, 2])
        assert steps[-1, 2] == 0 and (steps.diff(dim=1) < 0).all()
        own = family.path.t_max * (1 - torch.arange(len(steps), dtype=torch.float64) / len(steps))
        torch.testing.assert_close(steps[:, 0], flow_time(family.path, own))
    torch.testing.assert_close(method._steps["student"][:, 0], flow_time(family.path, method.setting.grid))


def test_steps_are_divided_before_the_teachers_shift() -> None:
    setting = replace(toy_setting(Toy("toy:gaussian"), grid=[1.0, 0.75]), shift=3.0)
    method: Any = toy_method(Progressive, setting, halvings=2)
    u = 1 - torch.arange(8, dtype=torch.float64) / 8
    torch.testing.assert_close(method._steps["student_2"][:, :2].flatten(), 3 * u / (1 + 2 * u))


@pytest.mark.parametrize(
    ("shares", "want"),
    [(None, ["student_4"] * 3 + ["student_2"] * 3 + ["student"] * 3), ([1.0, 1.0, 7.0], ["student_4", "student_2"] + ["student"] * 7)],
)
def test_halvings_share_the_runs_steps(shares: Any, want: list[str]) -> None:
    method = progressive(Toy("toy:gaussian"), halvings=3, shares=shares, train_steps=9)
    assert [method.updates(step)[0].trains for step in range(9)] == [(name,) for name in want]
    for name in ("student_4", "student_2", "student"):
        own = [step for step, each in enumerate(want) if each == name]
        assert method.span(name) == (own[0], len(own))
        assert [method.finished(name, step) for step in (own[-1], own[-1] + 1)] == [False, True]
    assert method.span("teacher") is None
    assert [method.period(name) for name in ("student_4", "student")] == ["the halving to 16 steps", "the halving to 4 steps"]


def test_each_student_begins_as_the_average_of_the_one_before_which_then_teaches_it() -> None:
    method = progressive(Toy("toy:gaussian"), halvings=2, train_steps=6)
    changes = []
    for step in range(6):
        (update,) = method.updates(step)
        changes.append((update.settles, [(blend.target, blend.source, blend.weight) for blend in update.blends]))
    assert changes[3] == (("student_2",), [("student", "student_2", 1.0)])
    assert changes[:3] + changes[4:] == [((), [])] * 5
    needed = {name: [method.needed(name, step) for step in (0, 3, 5, 6)] for name in ("student_2", "student", "teacher")}
    assert needed == {"student_2": [True, True, True, False], "student": [True] * 4, "teacher": [True] * 4}


def test_a_run_of_two_halvings_hands_its_student_on() -> None:
    """The trainer's own steps: at the third of four, the second student is the first one's average, to the bit."""
    family = Toy("toy:gaussian", width=16)
    method = progressive(family, halvings=2, train_steps=4)
    trainer = toy_trainer(method, family, latents=data().float(), steps=4, ema=0.5, optimizers=optimizer_block(lr=1e-2))
    for _ in range(2):
        trainer.train_step()
    average = {key: value.clone() for key, value in trainer.ema["student_2"].shadow.items()}
    assert any(not torch.equal(value, average[key]) for key, value in trainer.roles["student_2"].state_dict().items())
    seen: list[dict[str, Tensor]] = []
    halve = method.halve

    def watching(*args: Any) -> Any:
        seen.append({name: value.clone() for name, value in trainer.roles["student"].state_dict().items()})
        return halve(*args)

    watching.__name__ = "halve"
    method.halve = watching
    trainer.train_step()
    for state in (seen[0], trainer.roles["student_2"].state_dict()):
        assert state.keys() == average.keys() and all(torch.equal(value, average[key]) for key, value in state.items())
    assert any(not torch.equal(value, average[key]) for key, value in trainer.roles["student"].state_dict().items())
    assert trainer.optimizers.keys() == {"student"}
    assert method.students() == [("student", 0.0)] and method.sampler(trainer.models) is trainer.models["student"]
    trainer.train_step()
    assert trainer.roles.keys() == {"student_2", "student", "teacher"}, "a run that is over keeps what its last step had"


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_goes_on_in_either_halving_as_if_it_had_never_stopped(step: int, tmp_path: Folder) -> None:
    """Of four steps, the third hands the first student on."""
    family = Toy("toy:gaussian", width=16)

    def begun() -> Any:
        method = progressive(family, halvings=2, train_steps=4)
        return toy_trainer(method, family, latents=data().float(), steps=4, ema=0.5, optimizers=optimizer_block(lr=1e-2))

    def state(trainer: Any) -> dict[str, Tensor]:
        averages = {f"{name}/ema/{key}": value for name, average in trainer.ema.items() for key, value in average.shadow.items()}
        return {f"{name}/{key}": value for name, role in trainer.roles.trained.items() for key, value in role.state_dict().items()} | averages

    whole, again = begun(), begun()
    while whole.step < 4:
        whole.train_step()
        if whole.step == step:
            saved = checkpoint.save(tmp_path, whole, {}, keep=1)
    checkpoint.load(saved, again)
    again.run([])
    ours, theirs = state(whole), state(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert {name.split("/")[0] for name in ours} == {"student_2", "student"}


# The target


@pytest.mark.parametrize("name", WORLDS)
def test_the_target_is_the_papers(name: str) -> None:
    """Algorithm 2 by the definitions of the network's own path: x = (z'' - (s''/s) z)/(a'' - (s''/s) a), after two DDIM steps that keep eps, and
    max(SNR, 1) or SNR + 1 before the squared error of x0."""
    family = world(name)
    method = progressive(family)
    roles = toy_roles(method, family, dtype=torch.float64)
    disturb(roles, "student")
    index = (rng(64).uniform("time").double() * 4).long()
    assert index.unique().tolist() == [0, 1, 2, 3]
    times = [family.path.t_max * (1 - (index + part) / 4) for part in (0, 0.5, 1)]
    (a, s), (a_1, s_1), (a_2, s_2) = ((c[:, None] for c in family.path.coeffs(t.double())) for t in times)
    z = a * data() + s * rng(64).normal("noise", (2,))
    teacher = roles["teacher"].predictor

    def predicted(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """The exact E[x0 | x], from that on Flow at equal noise ratio."""
        t = s / (a + s)
        return x / (a + s) - t * gaussian_prediction("velocity", x / (a + s), t[:, 0], SCHEDULES["Flow"], MEAN, VARIANCE.diag())

    def ddim(x: Tensor, a: Tensor, s: Tensor, a_next: Tensor, s_next: Tensor) -> Tensor:
        x0 = predicted(x, a, s)
        return a_next * x0 + s_next * (x - a * x0) / s

    end = ddim(ddim(z, a, s, a_1, s_1), a_1, s_1, a_2, s_2)
    x0 = (end - s_2 / s * z) / (a_2 - s_2 / s * a)
    with torch.no_grad():
        error = (roles["student"].predictor(z, times[0].double(), {}) - x0).square().mean(1)
    snr = (a / s).square()[:, 0]
    models: Any = {"student": Recorded(roles["student"].predictor), "teacher": Recorded(teacher)}
    for weight, factor in (("truncated", snr.clamp(min=1)), ("snr_plus_one", snr + 1)):
        loss = progressive(family, weight=weight).halve(models, Batch(64, {}, data()), rng(64), 0)
        assert loss.value.item() == pytest.approx((factor * error).mean().item(), rel=1e-5)
    assert (snr > 1).any() and (snr < 1).any()
    loss.value.backward()
    assert models["student"].in_graph == [True] * 2 and models["teacher"].in_graph == [False] * 4
    assert all(parameter.grad is None for parameter in roles["teacher"].denoiser.parameters())


def test_on_flow_the_target_is_the_average_velocity() -> None:
    """A student with the velocity (z_t - z_t'')/(t - t'') has no loss."""
    family = world("Flow")
    method = progressive(family, grid=[1.0, 0.7, 0.2])
    teacher = toy_roles(method, family, dtype=torch.float64)["teacher"].predictor

    def student(x: Tensor, t: Tensor, cond: Any, kind: str, path: Path) -> Tensor:
        ends = torch.tensor([[1.0, 0.85, 0.7], [0.7, 0.45, 0.2], [0.2, 0.1, 0.0]], dtype=torch.float64)
        times = ends[[[1.0, 0.7, 0.2].index(round(value, 9)) for value in t.tolist()]].T
        average = (x - integrate(teacher, x, times, {})) / (t - times[2])[:, None]
        return x - t[:, None] * average

    models: Any = {"student": student, "teacher": teacher}
    assert method.halve(models, Batch(64, {}, data()), rng(64), 0).value.item() < 1e-20
    models["student"] = lambda x, t, cond, kind, path: teacher(x, t, cond, kind, path)
    assert method.halve(models, Batch(64, {}, data()), rng(64), 0).value.item() > 1e-3


def test_only_the_first_halvings_teacher_is_guided() -> None:
    family = Toy("toy:mixture")
    method = progressive(family, halvings=2, guidance=3.0, train_steps=2)
    roles = toy_roles(method, family, dtype=torch.float64)
    disturb(roles, "student", "student_2")
    cond = {"component": torch.tensor([0, 1] * 8)}
    for step, trained, teacher, calls in ((0, "student_2", "teacher", 32), (1, "student", "student_2", 16)):
        models: Any = {name: Recorded(role.predictor) for name, role in roles.items()}
        method.halve(models, Batch(16, cond, normal(16, 2)), rng(16), step)
        assert {name: [len(x) for x, _, _ in model.inputs] for name, model in models.items() if model.inputs} == {trained: [16], teacher: [calls] * 2}
        assert models[trained].in_graph == [True] and models[teacher].in_graph == [False] * 2
        components = models[teacher].inputs[0][2]["component"].tolist()
        assert components == ([2] * 16 if step == 0 else []) + cond["component"].tolist()
    assert not Progressive.student_is_guided(method.config)


# Students


@pytest.mark.parametrize("name", ["Flow", "DiscreteVP"])
def test_two_halvings_bring_two_steps_to_the_teachers_eight(name: str) -> None:
    """The paper's claim on a closed-form teacher: the student's two steps against eight of the teacher's, from the same noise."""
    family = world(name, "toy:mixture", width=32)
    method = progressive(family, steps=2, halvings=2, train_steps=600)
    latents = family.mixture.sample(4000, torch.Generator().manual_seed(0)).float()
    optimizer = optimizer_block(lr=4e-3, schedule="cosine")
    trainer = toy_trainer(method, family, latents=latents, optimizers=optimizer, steps=600, batch_size=64, ema=0.95)
    noise, cond = normal(500, 2, seed=4).float(), {"component": torch.full((500,), -1)}
    with torch.no_grad():
        fine = family.path.t_max * (1 - torch.arange(8, dtype=torch.float64) / 8)
        target = few_step(trainer.models["teacher"], noise, fine, cond, renoise="euler")

    def error() -> float:
        with torch.no_grad(), trainer.ema.applied():
            x = few_step(trainer.models["student"], noise, method.setting.grid, cond, renoise="euler")
        return (x - target).square().mean().sqrt().item()

    before = error()
    trainer.run([])
    assert error() < before / 1.5


def test_an_exact_chain_of_students_lands_where_the_first_teacher_does() -> None:
    """With students that make their teachers' two steps in one, eight steps of the teacher are one of the last."""
    family = world("Flow")
    method = progressive(family, steps=1, halvings=3)
    teacher = toy_roles(method, family, dtype=torch.float64)["teacher"].predictor

    class Halved:
        path = Flow()

        def __init__(self, before: Any, steps: Tensor) -> None:
            self.before, self.steps = before, steps

        def __call__(self, x: Tensor, t: Tensor, cond: Any, kind: str = "x0", path: Any = None) -> Tensor:
            times = self.steps[(self.steps[:, 0] - t[0]).abs().argmin()][:, None].expand(-1, len(x))
            average = (x - integrate(self.before, x, times, cond)) / (times[0] - times[2])[:, None]
            return average if kind == "velocity" else x - t[:, None] * average

    students: dict[str, Any] = {}
    for name, before in (("student_4", None), ("student_2", "student_4"), ("student", "student_2")):
        students[name] = Halved(teacher if before is None else students[before], method._steps[name])
    noise = normal(16, 2, seed=3)
    exact = walk(teacher, noise, torch.linspace(1, 0, 9, dtype=torch.float64)[:8], {}, renoise="euler")
    last = teacher(exact, torch.full((16,), 1 / 8, dtype=torch.float64), {})
    torch.testing.assert_close(few_step(students["student"], noise, method.setting.grid, {}, renoise="euler"), last, rtol=1e-9, atol=1e-9)


# Mistakes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"halvings": 0}, "recipe key distiller.halvings: Input should be greater than or equal to 1 (given: 0)"),
        ({"shares": [1, 2]}, "recipe key distiller: halvings: 1, but 2 shares"),
        ({"halvings": 2, "shares": [1, 0]}, "recipe key distiller.shares: shares must be between 1e-6 and 1e6 (given: [1, 0])"),
        ({"weight": "snr"}, "recipe key distiller.weight: Input should be 'truncated' or 'snr_plus_one' (given: 'snr')"),
    ],
)
def test_mistakes_in_the_config_name_the_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(Progressive.Config, {"name": "progressive", **config}, "distiller")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=1"], r"^recipe key train\.steps: 1 leaves a halving of 2 no student step"),
        (["student.sampler=stochastic"], r"^recipe key student\.sampler: stochastic, but progressive trains steps of the euler sampler alone"),
    ],
)
def test_what_a_recipe_says_must_fit(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(Recipe.load("digits_progressive_4step", overrides))


def test_a_student_to_start_from_is_for_one_halving() -> None:
    origin = Origin("runs/before", ("student",), {"name": "lcm"})
    facts = Facts(4, 1.0, (1.0, 0.75, 0.5, 0.25), 1.0, train_steps=10, origin=origin)
    one, two = (validate(Progressive.Config, {"name": "progressive", "halvings": count}, "distiller") for count in (1, 2))
    Progressive.check(one, facts)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^recipe key student\.init: 'runs/before', but with distiller\.halvings 2 the student starts as the one"):
        Progressive.check(two, facts)  # type: ignore[arg-type]
