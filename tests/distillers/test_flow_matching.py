"""Flow matching: its loss against a closed form, the conditioning dropout, and a network that learns a data set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toy_runs import Recorded, optimizer_block, toy_method, toy_roles, toy_setting, toy_trainer

from fastgen.distillers.base import Batch
from fastgen.distillers.flow_matching import FlowMatching
from fastgen.families.toy import Toy
from fastgen.path import Flow, Kind, Path, VariancePreserving
from fastgen.rng import SampleRng
from fastgen.sampling import ode

VARIANCES = torch.tensor([0.49, 0.16])  # of toy:gaussian


def gaussian_latents(count: int) -> Tensor:
    return Toy("toy:gaussian").mixture.sample(count, torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("path", [Flow(), VariancePreserving()], ids=["Flow", "VariancePreserving"])
@pytest.mark.parametrize("kind", ["velocity", "x0", "eps", "v"])
def test_loss_at_the_exact_network_is_the_conditional_variance(path: Path, kind: Kind) -> None:
    """Given x_t, a x0 + b eps has variance (a sigma - b alpha)^2 s^2 / (alpha^2 s^2 + sigma^2) for data of variance s^2.

    Compared at the times drawn, so that only the noise is left to chance: 8000 samples, 1.1 % standard error, 4 % allowed.
    """
    count = 8000
    family = Toy("toy:gaussian", path=path, kind=kind)
    method = toy_method(FlowMatching, toy_setting(family), times={"name": "uniform", "lo": 0.1, "hi": 0.9}, drop=0.0)
    batch = Batch(count, {"component": torch.zeros(count, dtype=torch.int64)}, gaussian_latents(count))
    rng = SampleRng(0, (), range(count))
    models = toy_roles(FlowMatching, family).predictors()
    with torch.no_grad():
        got = method.updates(0)[0].terms[0](models, batch, rng, 0).value
    t = 0.1 + 0.8 * rng.uniform("time")
    alpha = 1 - t if isinstance(path, Flow) else torch.exp(-0.5 * (0.1 * t + 19.9 * t**2 / 2))
    sigma = t if isinstance(path, Flow) else torch.sqrt(1 - alpha**2)
    beta = 0.1 + 19.9 * t
    a_dot, s_dot = (-torch.ones(count), torch.ones(count)) if isinstance(path, Flow) else (-beta * alpha / 2, beta * alpha**2 / 2 / sigma)
    rows = {"velocity": (a_dot, s_dot), "x0": (torch.ones(count), 0 * t), "eps": (0 * t, torch.ones(count)), "v": (-sigma, alpha)}
    a, b = rows[kind]
    variance = (a * sigma - b * alpha)[:, None] ** 2 * VARIANCES / (alpha[:, None] ** 2 * VARIANCES + sigma[:, None] ** 2)
    torch.testing.assert_close(got, variance.mean(), rtol=0.04, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_a_share_of_prompts_becomes_the_negative_prompt(share: float) -> None:
    """4000 samples: four standard errors of the share are at most 0.031."""
    family = Toy("toy:mixture")
    student = Recorded(toy_roles(FlowMatching, family)["student"].predictor)
    method = toy_method(FlowMatching, toy_setting(family, negative="2"), drop=share)
    count = 4000
    components = torch.arange(count) % 2
    rng = SampleRng(0, (), range(count))
    method.updates(0)[0].terms[0]({"student": student}, Batch(count, {"component": components}, torch.zeros(count, 2)), rng, 0)
    seen = student.inputs[0][2]["component"]
    dropped = seen != components
    assert bool((seen[dropped] == 2).all())
    assert dropped.float().mean().item() == pytest.approx(share, abs=0.031 if 0 < share < 1 else 0)


def test_the_times_follow_the_config() -> None:
    """sigmoid(N(mean, std^2)) squeezed into [lo, hi], times the path's range: the median is lo + (hi - lo) sigmoid(mean)."""
    family = Toy("toy:gaussian")
    student = Recorded(toy_roles(FlowMatching, family)["student"].predictor)
    times = {"name": "logit_normal", "mean": -1.0, "std": 0.5, "lo": 0.2, "hi": 0.8}
    method = toy_method(FlowMatching, toy_setting(family), times=times)
    batch = Batch(4000, {"component": torch.zeros(4000, dtype=torch.int64)}, torch.zeros(4000, 2))
    method.updates(0)[0].terms[0]({"student": student}, batch, SampleRng(0, (), range(4000)), 0)
    t = student.inputs[0][1]
    quantiles = torch.quantile(t, torch.tensor([0.1587, 0.5, 0.8413]))  # mean and one std to each side
    torch.testing.assert_close(quantiles, 0.2 + 0.6 * torch.sigmoid(torch.tensor([-1.5, -1.0, -0.5])), rtol=0, atol=0.01)


def test_it_learns_a_data_set_from_a_wrong_start() -> None:
    """The network starts as the exact velocity of another Gaussian; its ODE samples end at the data's mean and deviation."""
    family = Toy("toy:gaussian")
    mean, std = torch.tensor([-0.6, 0.5]), torch.tensor([0.5, 0.6])
    latents = mean + std * torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    method = toy_method(FlowMatching, toy_setting(family), times={"lo": 0.0, "hi": 1.0})
    block = optimizer_block(name="adam", lr=1e-2, schedule="cosine")
    trainer = toy_trainer(method, family, latents=latents, optimizers=block, steps=400, batch_size=64, ema=0.95)
    losses: list[float] = []
    trainer.run([lambda step, metrics: losses.append(metrics["loss/denoise"])])
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    cond = {"component": torch.full((4000,), -1)}
    with trainer.ema.applied(), torch.no_grad():
        x = ode(trainer.models["student"], noise, torch.linspace(1, 0.01, 13), cond)
    assert sum(losses[-50:]) / 50 < 0.75 * sum(losses[:5]) / 5
    torch.testing.assert_close(x.mean(0), latents.mean(0), rtol=0, atol=0.06)
    torch.testing.assert_close(x.std(0), latents.std(0), rtol=0.08, atol=0)
