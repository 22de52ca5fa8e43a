"""Phased DMD: which expert trains when and on what, that its samples stand at the phase's end, and how experts are handed over."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matching_cases import batch_of, double
from safetensors.torch import load_file
from test_dmd2 import disturb
from torch import Tensor
from toy_runs import Recorded, normal, optimizer_block, rng, toy_method, toy_roles, toy_setting, toy_trainer

from fastgen import checkpoint
from fastgen.config import Recipe, validate
from fastgen.distillers.base import Facts
from fastgen.distillers.dmd2 import DMD2
from fastgen.distillers.phased_dmd import PhasedDMD, PhasedDMDConfig
from fastgen.errors import UserError
from fastgen.families.toy import Toy
from fastgen.path import Flow, VarianceExploding
from fastgen.plan import plan
from fastgen.roles import Roles
from fastgen.run import train
from fastgen.sampling import Experts, few_step
from fastgen.trainer import Trainer

GRID = (1.0, 0.9375, 5 / 6, 0.625)  # four steps under shift 5, where two phases meet at 5/6
TWO = [{"start": 1, "end": 0.833}, {"start": 0.833, "end": 0}]
FOUR = [{"start": a, "end": b} for a, b in ((1, 0.9375), (0.9375, 0.8333), (0.8333, 0.625), (0.625, 0))]


def phased(
    phases: list[dict[str, Any]] = TWO, *, steps: int = 6, path: Any = None, grid: tuple[float, ...] = GRID, shift: float = 5.0, **keys: Any
) -> Any:
    family = Toy("toy:mixture", path=path)
    setting = replace(toy_setting(family, grid=grid), train_steps=steps, shift=shift, decode=lambda latents: latents)
    return toy_method(PhasedDMD, setting, phases=phases, **keys)


def recorded(roles: Roles) -> dict[str, Any]:
    return {name: Recorded(predictor) for name, predictor in roles.predictors().items()}


# The plan


@pytest.mark.parametrize(
    ("phases", "steps", "first", "want"),
    [
        (TWO, 6, 1, [1, 1, 1, 2, 2, 2]),
        ([TWO[0] | {"share": 3}, TWO[1]], 8, 1, [1, 1, 1, 1, 1, 1, 2, 2]),
        ([phase | {"share": 1e6} for phase in TWO], 4, 1, [1, 1, 2, 2]),
        ([phase | {"share": 1e-6} for phase in TWO], 4, 1, [1, 1, 2, 2]),
        (FOUR, 10, 1, [1, 1, 2, 2, 2, 3, 3, 3, 4, 4]),
        (FOUR, 6, 3, [3, 3, 3, 4, 4, 4]),
        ([{"start": 1, "end": 0}], 3, 1, [1, 1, 1]),
    ],
)
def test_phases_share_the_runs_steps(phases: list[dict[str, Any]], steps: int, first: int, want: list[int]) -> None:
    method = phased(phases, steps=steps, first_phase=first)
    assert [method.phase_at(step) for step in range(steps)] == want
    for k in range(1, len(phases) + 1):
        own = [step for step, phase in enumerate(want) if phase == k]
        for base in ("student", "fake_score"):
            role = base if k == 1 else f"{base}_{k}"
            assert method.span(role) == ((own[0], len(own)) if own else None)
            for step in own:
                assert (method.student_at if base == "student" else method.fake_at)(step) == role
                assert method.first_step(step) == own[0]
    assert method.span("discriminator") is None


def test_how_far_each_expert_has_come() -> None:
    whole, later = phased(FOUR, steps=10), phased(FOUR, steps=6, first_phase=3)
    names = [name for name, _ in whole.students()]
    assert [whole.period(name) for name in names] == ["phase 1", "phase 2", "phase 3", "phase 4"]
    assert [[whole.trained(name, step) for name in names] for step in (0, 1, 4, 10)] == [
        [(0, 2), (0, 3), (0, 3), (0, 2)],
        [(1, 2), (0, 3), (0, 3), (0, 2)],
        [(2, 2), (2, 3), (0, 3), (0, 2)],
        [(2, 2), (3, 3), (3, 3), (2, 2)],
    ]
    assert [later.trained(name, 4) for name in names] == [(0, 0), (0, 0), (3, 3), (1, 3)], "the first two were trained before this run"


def test_there_is_an_expert_and_a_fake_score_for_each_phase() -> None:
    method = phased(FOUR, gan={})
    roles = toy_roles(method, Toy("toy:mixture"))
    students, fakes = ["student", "student_2", "student_3", "student_4"], ["fake_score", "fake_score_2", "fake_score_3", "fake_score_4"]
    assert roles.keys() == {*students, *fakes, "discriminator", "teacher"}
    assert {name for name, role in roles.items() if role.spec.averaged} == set(students)
    assert method.students() == [(name, pytest.approx(end)) for name, end in zip(students, [*GRID[1:], 0.0], strict=True)]
    heads = toy_roles(phased(TWO, gan={"features": "fake_score"}), Toy("toy:mixture"))
    assert {name for name, role in heads.items() if role.denoiser.heads is not None} == {"fake_score", "fake_score_2"}


@pytest.mark.parametrize(("count", "features"), [(2, "teacher"), (3, "fake_score")])
def test_updates_name_the_phases_own_roles(count: int, features: str) -> None:
    method = phased(steps=6, critic_updates=count, gan={"features": features}, ida=0.1)
    for step in range(6):
        student, fake = ("student", "fake_score") if step < 3 else ("student_2", "fake_score_2")
        updates = method.updates(step)
        judge = ("discriminator",) if features == "teacher" else ()
        assert [update.trains for update in updates] == [(fake, *judge)] * count + [(student,)]
        # the fake score follows the student after each of its updates, hence not at a phase's first step, where there was none
        assert [update.blends for update in updates[1:]] == [()] * count
        blends = [(blend.target, blend.source, blend.weight) for blend in updates[0].blends]
        assert blends == ([] if step in (0, 3) else [(fake, student, 0.1)])
        assert [update.settles for update in updates] == [("student",) if step == 3 else ()] + [()] * count


# Rollouts


@pytest.mark.parametrize(
    ("phases", "want"),
    [(TWO, [{0, 1}, {2, 3}]), (FOUR, [{0}, {1}, {2}, {3}]), ([FOUR[0], {"start": 0.9375, "end": 0}], [{0}, {1, 2, 3}])],
)
def test_a_phase_exits_at_its_own_steps_after_the_experts_before_it(phases: list[dict[str, Any]], want: list[set[int]]) -> None:
    """Earlier experts, and earlier steps of its own, run without a graph; later experts do not run."""
    method, family = phased(phases, steps=8 * len(phases)), Toy("toy:mixture")
    roles = toy_roles(method, family)
    owner = [k for i in range(4) for k, exits in enumerate(want, 1) if i in exits]
    exits: list[set[int]] = [set() for _ in phases]
    for step in range(8 * len(phases)):
        models = recorded(roles)
        method.match(models, batch_of(3), rng(3, step), step)
        calls = [(t.unique().item(), k, graph) for k in range(1, len(phases) + 1) for (_, t, _), graph in _calls(models, k)]
        calls.sort(reverse=True)
        assert [time for time, *_ in calls] == pytest.approx(list(GRID[: len(calls)]))
        assert [k for _, k, _ in calls] == owner[: len(calls)]
        assert [graph for *_, graph in calls] == [False] * (len(calls) - 1) + [True]
        exits[method.phase_at(step) - 1].add(len(calls) - 1)
    assert exits == want


def _calls(models: dict[str, Any], phase: int) -> Any:
    model = models["student" if phase == 1 else f"student_{phase}"]
    return zip(model.inputs, model.in_graph, strict=True)


def test_samples_stand_at_the_phases_end_by_the_euler_formula() -> None:
    """x_s = x + (s - t_j) u on Flow after Euler steps x + (t' - t) u before it; x0 = x - t_j u is the exit's own prediction."""
    method, family = phased(), Toy("toy:mixture")
    roles = toy_roles(method, family, dtype=torch.float64)
    disturb(roles, "student", "student_2")
    seen = set()
    for step in range(6):
        for scope in range(4):
            sample = method._sample(roles.predictors(), batch_of(4), rng(4, 10 * step + scope), step, train=True)
            exit_at = GRID.index(sample.t.item())
            x = rng(4, 10 * step + scope).normal("noise", (2,)).double()
            for i in range(exit_at + 1):
                network = roles["student" if i < 2 else "student_2"].denoiser
                u = network(x, torch.full((4,), GRID[i]).double(), batch_of(4).cond).prediction
                last, end = x, GRID[i + 1] if i < exit_at else (5 / 6 if step < 3 else 0.0)
                x = x + (end - GRID[i]) * u
            torch.testing.assert_close(sample.x.double(), x, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(sample.x0.double(), last - GRID[exit_at] * u, rtol=1e-5, atol=1e-6)
            seen.add(exit_at)
    assert seen == {0, 1, 2, 3}


def test_samples_stand_at_the_phases_end_on_ve_too() -> None:
    """alpha = 1, sigma = 80 t: x_s = x + (sigma_s - sigma) eps from the noise times sigma."""
    method = phased([{"start": 1, "end": 0.5}, {"start": 0.5, "end": 0}], path=VarianceExploding(), grid=(1.0, 0.5))
    roles = toy_roles(method, Toy("toy:mixture", path=VarianceExploding()), dtype=torch.float64)
    sample = method._sample(roles.predictors(), batch_of(4), rng(4), 0, train=True)
    x = 80 * rng(4).normal("noise", (2,)).double()
    eps = roles["student"].predictor(x, torch.full((4,), 80.0).double(), batch_of(4).cond, "eps")
    torch.testing.assert_close(sample.x.double(), x - 40 * eps, rtol=1e-5, atol=1e-4)


def test_the_gradient_in_the_sample_reaches_the_exit_by_its_share_of_the_step() -> None:
    """dx_s/du = s - t_j on Flow, for one sample of the exit's velocity."""
    method, family = phased(), Toy("toy:mixture")
    roles = toy_roles(method, family, dtype=torch.float64)
    for scope in range(6):
        sample = method._sample(roles.predictors(), batch_of(4), rng(4, scope), 0, train=True)
        bias: Any = roles["student"].denoiser.backbone.out
        (gradient,) = torch.autograd.grad(sample.x[:, 0].sum(), bias.bias)
        assert gradient.tolist() == pytest.approx([4 * (5 / 6 - sample.t.item()), 0], abs=1e-5)


@pytest.mark.parametrize("end", [5 / 6, 0.2])
def test_the_critics_loss_is_the_papers(end: float) -> None:
    """Phased DMD, section 3.3: clamp(1/sigma^2, 0, 10) |sigma u - ((a_s^2 s_t + a_t s_s^2)/a_s^2 eps - sigma/a_s x_s)|^2, sigma = sigma_t|s;
    from .2 on to .9 the clamp is at work for some levels and not for others."""
    method = phased([{"start": 1, "end": end}, {"start": end, "end": 0}], grid=(1.0, end), critic_times={"lo": 0.2, "hi": 0.95}, shift=1.0)
    roles = toy_roles(method, Toy("toy:mixture"), dtype=torch.float64)
    disturb(roles, "student", "fake_score")
    draws, count = rng(40), 40
    loss = method.critic(roles.predictors(), batch_of(count), draws, 0)
    noise, eps = draws.normal("noise", (2,)).double(), draws.normal("critic_noise", (2,)).double()
    floor = (end + 0.02 - 0.2) / 0.75
    t = (0.2 + 0.75 * (floor + (1 - floor) * draws.uniform("critic_time").double()))[:, None]
    with torch.no_grad():
        x_s = noise + (end - 1) * roles["student"].denoiser(noise, torch.ones(count).double(), batch_of(count).cond).prediction
        alpha_s, alpha_t = 1 - end, 1 - t
        sigma = (t**2 - (alpha_t / alpha_s) ** 2 * end**2).sqrt()
        u = roles["fake_score"].denoiser(alpha_t / alpha_s * x_s + sigma * eps, t[:, 0], batch_of(count).cond).prediction
        error = sigma * u - ((alpha_s**2 * t + alpha_t * end**2) / alpha_s**2 * eps - sigma / alpha_s * x_s)
        weight = (1 / sigma**2).clamp(0, 10)
    assert bool((weight == 10).any()) == (end == 0.2)
    torch.testing.assert_close(loss.value.double(), (weight * error**2).mean(), rtol=1e-4, atol=1e-6)


def test_one_phase_is_dmd2() -> None:
    ours, family = phased([{"start": 1, "end": 0}]), Toy("toy:mixture")
    theirs: Any = toy_method(DMD2, ours.setting)
    roles = toy_roles(theirs, family)
    disturb(roles, "student", "fake_score")
    for term in ("critic", "match"):
        for step in range(4):
            a, b = (getattr(method, term)(roles.predictors(), batch_of(5), rng(5, step), step).value.item() for method in (ours, theirs))
            assert a == pytest.approx(b, rel=1e-5)  # the same formulas, by way of a bridge from s = 0


def test_the_last_phase_matches_data() -> None:
    """Phase 2 of 2 is DMD2 on its own exits, with two networks along the grid."""
    method, family = phased(), Toy("toy:mixture")
    roles = toy_roles(method, family)
    disturb(roles, "student", "student_2", "fake_score_2")
    plain: Any = toy_method(DMD2, method.setting)
    for step in range(3, 6):
        for scope in range(4):
            sample = method._sample(roles.predictors(), batch_of(5), rng(5, scope), step, train=False)
            assert torch.equal(sample.x, sample.x0)
            t, s = method._times(method.config.match_times, rng(5, scope).uniform("match_time"), step)
            assert torch.equal(t, plain._times(method.config.match_times, rng(5, scope).uniform("match_time"), step)[0])
            assert not s.any()


# Noise levels

U = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000


def shift5(u: Tensor) -> Tensor:
    return 5 * u / (1 + 4 * u)


@pytest.mark.parametrize("name", ["match_times", "critic_times"])
def test_levels_are_uniform_before_the_shift_above_the_phases_end(name: str) -> None:
    """The law of phase 1 is that of all the levels, U(0, 1) shifted and squeezed into [lo, hi], given that they lie above s + margin."""
    method = phased(margin=0.03)
    sampling = getattr(method.config, name)
    t, s = method._times(sampling, U, 0)
    assert s.unique().tolist() == [5 / 6]
    assert t.min() >= 5 / 6 + 0.03
    assert t.max() <= sampling.hi
    whole = sampling.lo + (sampling.hi - sampling.lo) * shift5((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000)
    kept = whole[whole >= 5 / 6 + 0.03]
    assert (t - kept[(U * len(kept)).long()]).abs().max() < 1e-4
    t, s = method._times(sampling, U, 5)
    assert not s.any()
    assert (t - (sampling.lo + (sampling.hi - sampling.lo) * shift5(U))).abs().max() < 1e-12


@pytest.mark.parametrize("term", ["critic", "match", "discriminate"])
@pytest.mark.parametrize("phases", [TWO, FOUR], ids=["two", "four"])
def test_no_network_judges_below_a_phases_end(phases: list[dict[str, Any]], term: str) -> None:
    """Teacher, fake score and discriminator see levels in [s + margin, 1] only, nested from phase to phase."""
    method, family = phased(phases, steps=8 * len(phases), gan={}, margin=0.02), Toy("toy:mixture")
    roles = toy_roles(method, family)
    latents, lowest = normal(20, 2).float(), [1.0] * len(phases)
    for step in range(8 * len(phases)):
        models, k = recorded(roles), method.phase_at(step)
        getattr(method, term)(models, batch_of(20, -1, latents), rng(20, step), step)
        for name, model in models.items():
            for _, t, _ in model.inputs if not name.startswith("student") else ():
                assert bool((t >= method.segment(step).end + (0.02 if k < len(phases) else 0) - 1e-6).all())
                assert bool((t <= 1).all())
                lowest[k - 1] = min(lowest[k - 1], t.min().item())
    assert lowest == sorted(lowest, reverse=True)
    for (end, above), low in zip(zip([p["end"] for p in phases[:-1]], [1.0, *GRID], strict=False), lowest, strict=False):
        assert end < low < above


def test_guidance_apart_stays_between_the_phases_end_and_the_exit() -> None:
    method = phased(decoupled={}, margin=0.02)
    for exit_at in GRID[:2]:
        t, _ = method._times(method.config.decoupled.times, U, 0, double(exit_at)[0])
        assert t.min() >= 5 / 6 + 0.02
        assert t.max() <= min(0.98, exit_at)
    t, _ = method._times(method.config.decoupled.times, U, 5, double(0.625)[0])
    assert 0.02 <= t.min() < 0.03
    assert t.max() <= 0.625


# Handing over


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Every trained parameter, every average and every statistic."""
    named = {f"{name}/{key}": value for name, role in trainer.roles.trained.items() for key, value in role.state_dict().items()}
    named |= {f"ema/{name}/{key}": value for name, average in trainer.ema.items() for key, value in average.state_dict().items()}
    named |= {f"statistics/{key}": value for key, value in trainer.distiller.statistics.items()}
    return {key: value.clone() for key, value in named.items()}


def part(named: dict[str, Tensor], prefix: str) -> Tensor:
    return torch.cat([value.flatten().double() for key, value in sorted(named.items()) if key.startswith(prefix) and not key.endswith("updates")])


def trainer_of(method: Any, *, steps: int = 6, **options: Any) -> Trainer:
    family = Toy("toy:mixture", width=16)
    return toy_trainer(method, family, optimizers=optimizer_block(lr=1e-2, schedule="linear"), steps=steps, **options)


def test_an_expert_becomes_its_average_and_stays() -> None:
    trainer = trainer_of(phased(critic_updates=2))
    teacher = part(state(trainer), "student/")
    for step in range(3):
        trainer.train_step()
        now = state(trainer)
        assert [int(now[f"ema/{name}/updates"]) for name in ("student", "student_2")] == [step + 1, 0]
        assert torch.equal(part(now, "student_2/"), teacher) and torch.equal(part(now, "fake_score_2/"), teacher)
    before = now
    assert not torch.equal(part(before, "student/"), part(before, "ema/student/"))
    for step in range(3):
        trainer.train_step()
        now = state(trainer)
        assert torch.equal(part(now, "student/"), part(before, "ema/student/"))
        assert torch.equal(part(now, "ema/student/"), part(before, "ema/student/"))
        assert not [key for key in now if key.startswith("fake_score/")]  # left with its phase
        assert [int(now[f"ema/{name}/updates"]) for name in ("student", "student_2")] == [3, step + 1]
    assert not torch.equal(part(now, "student_2/"), teacher) and not torch.equal(part(now, "fake_score_2/"), teacher)


def test_learning_rates_start_anew_in_every_phase() -> None:
    trainer, rates = trainer_of(phased([TWO[0] | {"share": 2}, TWO[1]], critic_updates=1)), []
    trainer.run([lambda step, metrics: rates.append({key: value for key, value in metrics.items() if key.startswith("lr/")})])
    first = [{"lr/student": 0.01 * share, "lr/fake_score": 0.01 * share} for share in (1, 0.75, 0.5, 0.25)]
    second = [{"lr/student_2": 0.01 * share, "lr/fake_score_2": 0.01 * share} for share in (1, 0.5)]
    assert rates == [pytest.approx(row) for row in first + second]


def test_a_run_resumed_within_a_later_phase_ends_as_the_whole_one(tmp_path: Path) -> None:
    """Bit for bit, with running means of a reward, fake scores that follow, and a discriminator; also at the hand-over itself."""
    keys = {"critic_updates": 2, "reward": {"name": "matching_cases:first_coordinate"}, "gan": {}, "ida": 0.05}
    latents = normal(30, 2).float()
    whole = trainer_of(phased(**keys), latents=latents)
    folders = []
    whole.run([lambda step, metrics: folders.append(checkpoint.save(tmp_path, whole, {}, keep=9)) and None])
    for step in (2, 3, 4, 5):
        resumed = trainer_of(phased(**keys), latents=latents)
        checkpoint.load(folders[step - 1], resumed)
        resumed.run([])
        want, got = state(whole), state(resumed)
        assert want.keys() == got.keys() and "statistics/reward" in want
        assert not [key for key in want if not torch.equal(want[key], got[key])]


def test_experts_serve_their_own_times() -> None:
    class Named:
        path = Flow()

        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, x: Tensor, t: Tensor, cond: Any, kind: Any = "x0", path: Any = None) -> Any:
            return self.name

    experts: Any = Experts([Named("high"), Named("middle"), Named("low")], [5 / 6, 0.5, 0.0])
    x = torch.zeros(2, 1)
    for t, want in ((1.0, "high"), (0.9, "high"), (5 / 6, "middle"), (0.7, "middle"), (0.5, "low"), (0.2, "low"), (0.0, "low")):
        for dtype in (torch.float32, torch.float64):
            assert experts(x, torch.full((2,), t, dtype=dtype), {}) == want
    # times of another path are taken over: sigma = 2 is t = 2/3 on Flow
    assert experts(x, torch.full((2,), 2.0), {}, "x0", VarianceExploding()) == "middle"
    with pytest.raises(AssertionError, match="one expert serves one time"):
        experts(x, torch.tensor([0.9, 0.6]), {})


def test_the_student_is_sampled_with_all_its_experts() -> None:
    method, family = phased(), Toy("toy:mixture")
    roles = toy_roles(method, family)
    disturb(roles, "student", "student_2")
    models, noise = recorded(roles), normal(3, 2).float()
    few_step(method.sampler(models), noise, method.setting.grid, batch_of(3).cond, renoise="euler")
    times = {name: [t.unique().item() for _, t, _ in models[name].inputs] for name in ("student", "student_2")}
    assert times == {"student": pytest.approx(list(GRID[:2])), "student_2": pytest.approx(list(GRID[2:]))}


# Experts of another run


TRAIN = {"steps": 4, "batch_size": 4, "ema": 0.5, "checkpoint_every": 1, "keep": 9, "sample_every": 0, "device": "cpu"}


def recipe(folder: Path, **distiller: Any) -> Any:
    (folder / "prompts.txt").write_text("0\n")
    data = {
        "teacher": {"pretrained": "toy:gaussian"},
        "student": {"steps": 4, "grid": [1.0, 0.75, 0.5, 0.25]},
        "distiller": {"name": "phased_dmd", "critic_updates": 1, "phases": [{"start": 1, "end": 0.5}, {"start": 0.5, "end": 0}], **distiller},
        "data": {"prompts": str(folder / "prompts.txt")},
        "optimizer": {"student": {"lr": 1e-2}, "fake_score": {"lr": 1e-2}},
        "train": TRAIN,
    }
    return data


def planned(data: dict[str, Any], **student: Any) -> Any:
    data["student"] |= student
    return validate(Recipe, data)


def test_a_later_phase_needs_the_experts_before_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        plan(planned(recipe(tmp_path, first_phase=2)), only="train")
    assert str(caught.value) == (
        "recipe key distiller.first_phase: 2 starts after an expert that has not been trained (student); "
        "give student.init the folder of a run that trained it to its phase's end"
    )


def test_a_later_phase_goes_on_from_a_folder_with_the_experts_before_it(tmp_path: Path) -> None:
    """The averaged first expert of that run is this run's from its first step on."""
    first = train(planned(recipe(tmp_path)), tmp_path / "first", only="train")
    second = train(planned(recipe(tmp_path, first_phase=2), init=str(first)), tmp_path / "second", only="train")
    average = load_file(checkpoint.latest(first) / "ema_student.safetensors")
    for saved in checkpoint.checkpoints(second / "checkpoints"):
        own = load_file(saved / "role_student.safetensors")
        assert own.keys() == average.keys() - {"updates"}
        assert all(torch.equal(value, average[name]) for name, value in own.items())
    assert int(load_file(checkpoint.latest(second) / "ema_student_2.safetensors")["updates"]) == 4


def test_an_unfinished_expert_does_not_count(tmp_path: Path) -> None:
    trainer, trained = trainer_of(phased([*FOUR[:2], {"start": FOUR[1]["end"], "end": 0}])), []
    for _ in range(7):
        checkpoint.save(tmp_path / "checkpoints", trainer, {}, keep=1)
        trained.append(checkpoint.trained_students(tmp_path)[0])
        if trainer.step < 6:
            trainer.train_step()
    assert trained == [(), (), ("student",), ("student",), ("student", "student_2"), ("student", "student_2"), ("student", "student_2", "student_3")]


def test_phases_one_run_each(tmp_path: Path) -> None:
    """Three runs of one phase each end with the three experts; the run in between passes its own first one on."""
    three = [{"start": 1, "end": 0.75}, {"start": 0.75, "end": 0.5}, {"start": 0.5, "end": 0}]
    runs = [train(planned(recipe(tmp_path, phases=three) | {"train": TRAIN | {"steps": 6}}), tmp_path / "0", only="train")]
    for k in (2, 3):
        data = recipe(tmp_path, phases=three, first_phase=k) | {"train": TRAIN | {"steps": 8, "seed": k}}
        runs.append(train(planned(data, init=str(runs[-1])), tmp_path / str(k), only="train"))

    def saved(run: int, step: int, name: str) -> dict[str, Tensor]:
        state = load_file(runs[run] / "checkpoints" / f"step_{step:06d}" / f"{name}.safetensors")
        state.pop("updates", None)
        return state

    first, second = saved(0, 6, "ema_student"), saved(1, 8, "ema_student_2")
    for step in (1, 8):
        assert all(torch.equal(value, first[name]) for name, value in saved(2, step, "role_student").items())
        assert all(torch.equal(value, second[name]) for name, value in saved(2, step, "role_student_2").items())
    # what the first run made of the second phase is not gone on with: its fake score was not either
    assert any(not torch.equal(value, saved(0, 6, "ema_student_2")[name]) for name, value in saved(1, 1, "role_student_2").items())


@pytest.mark.parametrize(
    ("distiller", "blocks", "message"),
    [
        (
            {"phases": [{"start": 1, "end": 0.75}, {"start": 0.75, "end": 0}]},
            {},
            "recipe key distiller.phases: student of '{}' was trained to end at 0.5, here its phase ends at 0.75",
        ),
        ({}, {"teacher": {"guidance": 3.0}}, "recipe key student.init: the experts of '{}' were trained with teacher.guidance 1.0, here 3.0"),
        (
            {},
            {"student": {"grid": [1.0, 0.8, 0.5, 0.25]}},
            "recipe key student.init: the experts of '{}' were trained with student.grid [1.0, 0.75, 0.5, 0.25], here [1.0, 0.8, 0.5, 0.25]",
        ),
    ],
)
def test_experts_of_another_recipe_are_refused(tmp_path: Path, distiller: Any, blocks: Any, message: str) -> None:
    first = train(planned(recipe(tmp_path)), tmp_path / "first", only="train")
    data = recipe(tmp_path, **{"first_phase": 2, **distiller})
    for name, keys in blocks.items():
        data[name] |= keys
    with pytest.raises(UserError) as caught:
        plan(planned(data, init=str(first)), only="train")
    assert str(caught.value) == message.format(first)


def test_boundaries_that_name_the_same_time_are_the_same(tmp_path: Path) -> None:
    first = train(planned(recipe(tmp_path)), tmp_path / "first", only="train")
    rounded = [{"start": 1, "end": 0.501}, {"start": 0.501, "end": 0}]
    plan(planned(recipe(tmp_path, first_phase=2, phases=rounded), init=str(first)), only="train")


def test_a_run_that_has_begun_no_longer_needs_the_one_it_began_from(tmp_path: Path) -> None:
    first = train(planned(recipe(tmp_path)), tmp_path / "first", only="train")
    data = planned(recipe(tmp_path, first_phase=2), init=str(first))
    whole = train(data, tmp_path / "whole", only="train")
    shutil.copytree(whole, tmp_path / "cut")
    for late in checkpoint.checkpoints(tmp_path / "cut" / "checkpoints")[2:]:
        shutil.rmtree(late)
    shutil.rmtree(first)
    resumed = train(data, tmp_path / "cut", only="train", resume=True)
    for name in ("role_student", "role_student_2", "ema_student_2"):
        ends = [load_file(checkpoint.latest(run) / f"{name}.safetensors") for run in (whole, resumed)]
        assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    with pytest.raises(UserError, match=r"recipe key student\.init: .* is neither teacher nor the folder of a run"):
        train(data, tmp_path / "new", only="train")


def test_a_finished_sampler_is_no_expert(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    data["distiller"] = {"name": "dmd2", "critic_updates": 1}
    first = train(planned(data), tmp_path / "first", only="train")
    with pytest.raises(UserError, match=r"distiller\.phases: student of .* was trained to end at 0\.0, here its phase ends at 0\.5"):
        plan(planned(recipe(tmp_path, first_phase=2), init=str(first)), only="train")


def test_another_students_folder_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(phased())
    trainer.run([])
    checkpoint.save(tmp_path / "checkpoints", trainer, {}, keep=1)
    roles = toy_roles(phased(), Toy("toy:mixture", width=32))
    with pytest.raises(UserError, match=r"recipe key student\.init: .* holds another student than this recipe's: weights of role 'student'"):
        checkpoint.load_students(tmp_path, roles, ["student"])


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("nowhere", "recipe key student.init: '{}' is neither teacher nor the folder of a run"),
        ("empty", "recipe key student.init: '{}' holds no checkpoint"),
    ],
)
def test_folders_without_a_run_are_refused(tmp_path: Path, init: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        plan(planned(recipe(tmp_path), init=str(tmp_path / init)), only="train")
    assert str(caught.value) == message.format(tmp_path / init)


# Mistakes


def facts(steps: int = 6, grid: tuple[float, ...] = GRID) -> Facts:
    return Facts(len(grid), 1.0, grid, 1.0, steps)


KEY = "recipe key distiller.phases: "


@pytest.mark.parametrize(
    ("keys", "given", "message"),
    [
        ({"phases": [{"start": 0.9, "end": 0}]}, facts(), KEY + "they run from 0.9 to 0.0; together they must tile [0, 1], from 1 down to 0"),
        ({"phases": TWO[:1]}, facts(), KEY + "they run from 1.0 to 0.833; together they must tile [0, 1], from 1 down to 0"),
        ({"phases": TWO[::-1]}, facts(), KEY + "they run from 0.833 to 0.833; together they must tile [0, 1], from 1 down to 0"),
        (
            {"phases": [TWO[0], {"start": 0.625, "end": 0}]},
            facts(),
            KEY + "one ends at 0.833 and the next starts at 0.625; together they must tile [0, 1] without gap or overlap",
        ),
        (
            {"phases": [{"start": 1, "end": 0.7}, {"start": 0.7, "end": 0}]},
            facts(),
            KEY + "boundary 0.7 is none of the student's times [0.9375, 0.8333, 0.625], at which a phase can end",
        ),
        (
            {"phases": [{"start": 1, "end": 0.625}, {"start": 0.625, "end": 0.8333}, {"start": 0.8333, "end": 0}]},
            facts(),
            KEY + "start 0.625 must be above end 0.8333",
        ),
        (
            {"phases": [{"start": 1, "end": 0.834}, {"start": 0.834, "end": 0.832}, {"start": 0.832, "end": 0}]},
            facts(),
            KEY + "the one from 0.834 to 0.832 has none of the student's times [1.0, 0.9375, 0.8333, 0.625]",
        ),
        (
            {"phases": TWO, "gan": {"start": 3}},
            facts(),
            "recipe key distiller.gan.start: 3 leaves none of the 3 student steps in which matching goes on",
        ),
        (
            {"phases": TWO, "first_phase": 2, "anchor": {}},
            facts(),
            "recipe key distiller.anchor: it anchors the first phase, but first_phase is 2; remove it",
        ),
        ({"phases": TWO, "first_phase": 3}, facts(), "recipe key distiller.first_phase: 3, but there are 2 phases"),
        ({"phases": FOUR}, facts(3), "recipe key train.steps: 3 leaves phase 3 no student step"),
        (
            {"phases": TWO, "match_times": {"hi": 0.84}},
            facts(),
            "recipe key distiller.margin: no noise level between 0.833 + 0.02 and 0.84 is left to match at",
        ),
        (
            {"phases": TWO, "gan": {"times": {"hi": 0.5}}},
            facts(),
            "recipe key distiller.margin: no noise level between 0.833 + 0.02 and 0.5 is left to match at",
        ),
        (
            {"phases": FOUR, "anchor": {}},
            facts(),
            "recipe key distiller.anchor: the first phase has one step, which the anchor would take; it needs two",
        ),
        (
            {"phases": TWO, "renoise": "stochastic"},
            facts(),
            "recipe key distiller.renoise: stochastic, but a phase ends at a noise level, which only euler steps reach",
        ),
        (
            {"phases": TWO, "rollout": {"times": "sampled"}},
            facts(),
            "recipe key distiller.rollout.times: sampled, but phases divide the student's own grid; use grid",
        ),
    ],
)  # fmt: skip
def test_mistakes(keys: dict[str, Any], given: Facts, message: str) -> None:
    with pytest.raises(UserError) as caught:
        PhasedDMD.check(validate(PhasedDMDConfig, {"name": "phased_dmd", **keys}, "distiller"), given)
    assert str(caught.value) == message


def test_recipes_may_round_the_boundary() -> None:
    for end in (0.8333, 0.833, 0.8325):
        phases = [{"start": 1, "end": end}, {"start": end, "end": 0}]
        PhasedDMD.check(validate(PhasedDMDConfig, {"name": "phased_dmd", "phases": phases}, "distiller"), facts())
        assert phased(phases).students() == [("student", 5 / 6), ("student_2", 0.0)]
