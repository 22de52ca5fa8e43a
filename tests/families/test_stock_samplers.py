"""The stock schedulers of a discrete student step as the samplers here do: real diffusers classes under exact Gaussian predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from fastgen.conditioning import Conditioning
from fastgen.errors import UserError
from fastgen.families.stock_samplers import (
    beta_options,
    consistency_sampler,
    consistency_times,
    trailing_solver,
    trailing_times,
    training_steps,
)
from fastgen.path import DiscreteVP, Kind
from fastgen.path import Path as NoisingPath
from fastgen.rng import SampleRng
from fastgen.sampling import few_step

SD = DiscreteVP.scaled_linear(1000, 0.00085, 0.012)
TO_NOISE = DiscreteVP.scaled_linear(1000, 0.00085, 0.012, zero_snr=True)
PATHS = {
    "sd": SD,
    "linear": DiscreteVP.linear(700, 0.0003, 0.03),
    "cosine": DiscreteVP.cosine(70),
    "trained": DiscreteVP.of([0.01 + 0.001 * (k % 7) for k in range(90)]),
}
SIZE, SPREAD = (4, 8, 8), 0.25
SEEDS = [3, 4]


class Exact:
    """What a network of `kind` predicts for x0 ~ N(0, SPREAD) in every number, in fp64, and rounded to the sample's dtype; at alpha = 0 too."""

    def __init__(self, path: DiscreteVP, kind: Kind) -> None:
        self.path: NoisingPath = path
        self.kind: Kind = kind
        self.schedule = oracle.discrete(torch.tensor(path.betas))

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.at(t.double(), x)
        share = x.double() / (alpha**2 * SPREAD + sigma**2)
        return oracle.kind_of(self.kind, alpha * SPREAD * share, sigma * share, t.double(), self.schedule).to(x)

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "x0", path: NoisingPath | None = None) -> Tensor:
        return self.path.convert(self.network(x, t), x, t, self.kind, kind)


class Generators(SampleRng):
    """Goes on with each sample's own generator, as a stock pipeline does."""

    def __init__(self, generators: list[torch.Generator]) -> None:
        super().__init__(0, (), range(len(generators)))
        self.generators = generators

    def normal(self, name: str, shape: Any) -> Tensor:
        return torch.cat([torch.randn((1, *shape), generator=generator) for generator in self.generators])


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def drawn(scheduler: Any, exact: Exact, **timesteps: Any) -> tuple[list[int], Tensor]:
    """The scheduler's steps, and where it ends from the seeds' noise."""
    own = generators()
    scheduler.set_timesteps(**timesteps)
    x = Generators(own).normal("", SIZE) * scheduler.init_noise_sigma
    for k in scheduler.timesteps:
        t = torch.full((len(x),), (int(k) + 1) / len(scheduler.betas), dtype=torch.float64)
        prediction = exact.network(scheduler.scale_model_input(x, k), t)
        generator: dict[str, Any] = {"generator": own} if type(scheduler) is LCMScheduler else {}
        x = scheduler.step(prediction, k, x, **generator, return_dict=False)[0]
    return scheduler.timesteps.tolist(), x


def ours(exact: Exact, times: Tensor, renoise: Any) -> Tensor:
    rng = Generators(generators())
    return few_step(exact, rng.normal("", SIZE).double(), times, {}, rng, renoise=renoise).float()


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", PATHS)
def test_the_trailing_solver_is_euler(name: str, kind: Kind) -> None:
    path, exact = PATHS[name], Exact(PATHS[name], kind)
    weakest = path.coeffs(torch.ones(1))[0].item() if kind == "eps" else 1.0  # eps says little of x0 where little of it is left
    for num_steps in range(1, 9):
        times = trailing_times(path, num_steps)
        steps, picture = drawn(trailing_solver(path, kind), exact, num_inference_steps=num_steps)
        assert steps == training_steps(path, times.tolist())
        assert distance(picture, ours(exact, times, "euler")) <= max(5e-6, 1e-6 / weakest)
    assert distance(picture, ours(exact, trailing_times(path, 7), "euler")) > 1e-3, "steps must matter for this test to mean anything"


def test_its_precision_is_what_the_table_says() -> None:
    exact, euler = Exact(SD, "eps"), {}
    for num_steps in range(1, 9):
        times = trailing_times(SD, num_steps)
        _, picture = drawn(trailing_solver(SD, "eps"), exact, num_inference_steps=num_steps)
        assert distance(picture, ours(exact, times, "euler")) <= 5e-6
        _, picture = drawn(EulerDiscreteScheduler(**beta_options(SD), timestep_spacing="trailing"), exact, num_inference_steps=num_steps)
        euler[num_steps] = distance(picture, ours(exact, times, "euler"))
        _, picture = drawn(consistency_sampler(SD, "eps", num_steps), exact, num_inference_steps=num_steps)
        assert distance(picture, ours(exact, consistency_times(SD, num_steps), "stochastic")) <= 5e-6
    assert min(euler.values()) > 1e-4 and 1e-3 < max(euler.values()) < 4e-3
    for num_steps, least, most in ((4, 0, 5e-6), (6, 0.01, 1)):  # why it is not DDIM
        stock = DDIMScheduler(**beta_options(SD), clip_sample=False, timestep_spacing="trailing")
        _, picture = drawn(stock, exact, num_inference_steps=num_steps)
        assert least <= distance(picture, ours(exact, trailing_times(SD, num_steps), "euler")) <= most


@pytest.mark.parametrize("grid", [[0.4], [0.951, 0.701, 0.334], [1.0, 0.5]])
def test_explicit_timesteps(grid: list[float]) -> None:
    for kind in ("eps", "v", "x0"):
        exact, times = Exact(SD, kind), torch.tensor(grid, dtype=torch.float64)
        steps = training_steps(SD, grid)
        found, picture = drawn(trailing_solver(SD, kind), exact, timesteps=steps)
        assert found == steps and distance(picture, ours(exact, times, "euler")) <= 5e-6
        found, picture = drawn(consistency_sampler(SD, kind, len(grid)), exact, timesteps=steps)
        assert found == steps and distance(picture, ours(exact, times, "stochastic")) <= 5e-6


@pytest.mark.parametrize("kind", ["v", "x0"])
def test_from_pure_noise(kind: Kind) -> None:
    exact = Exact(TO_NOISE, kind)
    assert TO_NOISE.coeffs(torch.ones(1))[0].item() == 0
    for num_steps in range(1, 9):
        times = trailing_times(TO_NOISE, num_steps)
        steps, picture = drawn(trailing_solver(TO_NOISE, kind), exact, num_inference_steps=num_steps)
        assert steps == training_steps(TO_NOISE, times.tolist())
        assert distance(picture, ours(exact, times, "euler")) <= 5e-6
        _, picture = drawn(consistency_sampler(TO_NOISE, kind, num_steps), exact, num_inference_steps=num_steps)
        assert distance(picture, ours(exact, consistency_times(TO_NOISE, num_steps), "stochastic")) <= 5e-6
    plain = DPMSolverMultistepScheduler.from_config(trailing_solver(SD, kind).config, rescale_betas_zero_snr=True)
    _, picture = drawn(plain, exact, num_inference_steps=1)
    if kind == "v":  # why it is not diffusers' own flag: alpha is 2^-12 there
        assert distance(picture, ours(exact, trailing_times(TO_NOISE, 1), "euler")) > 1e-4


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", PATHS)
def test_the_consistency_sampler_is_stochastic_with_each_samples_own_generator(name: str, kind: Kind) -> None:
    path, exact = PATHS[name], Exact(PATHS[name], kind)
    weakest = path.coeffs(torch.ones(1))[0].item() if kind == "eps" else 1.0
    for num_steps in range(1, 9):
        times = consistency_times(path, num_steps)
        steps, picture = drawn(consistency_sampler(path, kind, num_steps), exact, num_inference_steps=num_steps)
        assert steps == training_steps(path, times.tolist())
        assert distance(picture, ours(exact, times, "stochastic")) <= max(5e-6, 1e-6 / weakest)


def test_times_by_hand() -> None:
    assert training_steps(SD, trailing_times(SD, 4).tolist()) == training_steps(SD, consistency_times(SD, 4).tolist()) == [999, 749, 499, 249]
    assert training_steps(SD, trailing_times(SD, 3).tolist()) == [999, 666, 332]
    assert training_steps(SD, consistency_times(SD, 3).tolist()) == [998, 665, 332]
    assert trailing_times(SD, 2).tolist() == [1.0, 0.5]


def test_times_are_even_to_half_a_training_step() -> None:
    for path in (*PATHS.values(), TO_NOISE):
        for num_steps in range(1, 51):
            times = trailing_times(path, num_steps)
            even = 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
            assert times[0].item() == 1 and distance(times, even) <= (0.5 + 1e-9) / path.num_steps
            lower = path.num_steps // num_steps * torch.arange(num_steps, 0, -1, dtype=torch.float64) / path.num_steps
            assert distance(consistency_times(path, num_steps), lower) <= 1e-15


@pytest.mark.parametrize("path", [*PATHS.values(), TO_NOISE], ids=[*PATHS, "to noise"])
def test_a_saved_scheduler_has_the_paths_betas_to_the_bit(path: DiscreteVP, tmp_path: Path) -> None:
    for i, scheduler in enumerate((trailing_solver(path, "v"), consistency_sampler(path, "v", 4))):
        scheduler.save_pretrained(tmp_path / str(i))
        loaded = type(scheduler).from_pretrained(tmp_path / str(i))
        betas = loaded.betas.tolist()
        assert betas[:-1] == list(path.betas[:-1]) and betas[-1] == (1 - 2**-24 if path.zero_snr and i == 0 else path.betas[-1])
    config = json.loads((tmp_path / "0" / "scheduler_config.json").read_text())
    named = {"sd": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
    found = next((name for name, other in PATHS.items() if other == path), "")
    assert (config["trained_betas"] is None, config["beta_schedule"]) == (found in named, named.get(found, "linear"))
    assert config["prediction_type"] == "v_prediction"


def test_what_no_stock_scheduler_steps_at_is_refused() -> None:
    with pytest.raises(UserError, match=r"student.grid: 0.4005 is the time of none of the teacher's 1000 training steps.*near it: 0.4, 0.401$"):
        training_steps(SD, [0.7, 0.4005])
    for time in (0.0, 1.1, -0.5):
        with pytest.raises(UserError, match=r"student.grid"):
            training_steps(SD, [time])
    for call in (trailing_times, consistency_times, lambda path, n: consistency_sampler(path, "eps", n)):
        with pytest.raises(UserError, match=r"student.steps: (0|1001) is not from 1 to the teacher's 1000 training steps"):
            call(SD, 0)
        with pytest.raises(UserError, match=r"student.steps: 1001"):
            call(SD, 1001)
    with pytest.raises(UserError, match=r"student.steps: 61 of 1000 training steps are 62 to diffusers"):
        trailing_times(SD, 61)
