"""DiscreteVP against diffusers' own tables, a hand-written DDIM, and closed forms; `test_path` holds it to what every path must do."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import oracle
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor
from torch.autograd import forward_ad

from fastgen.conditioning import Conditioning
from fastgen.path import KINDS, DiscreteVP, Flow, Kind, Path, TrigFlow
from fastgen.rng import SampleRng
from fastgen.sampling import few_step, ode

TRAINED = [0.001, 0.004, 0.002, 0.03, 0.2]
SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CASES: dict[str, tuple[DiscreteVP, dict[str, Any]]] = {
    "linear": (DiscreteVP.linear(1000, 0.0001, 0.02), {}),
    "scaled_linear": (DiscreteVP.scaled_linear(1000, 0.00085, 0.012), SD),
    "900 steps": (DiscreteVP.scaled_linear(900, 0.0011, 0.013), {**SD, "beta_start": 0.0011, "beta_end": 0.013, "num_train_timesteps": 900}),
    "cosine": (DiscreteVP.cosine(1000), {"beta_schedule": "squaredcos_cap_v2"}),
    "trained": (DiscreteVP.of(TRAINED), {"trained_betas": TRAINED, "num_train_timesteps": 5}),
    "linear to noise": (DiscreteVP.linear(1000, 0.0001, 0.02, zero_snr=True), {"rescale_betas_zero_snr": True}),
    "scaled_linear to noise": (DiscreteVP.scaled_linear(1000, 0.00085, 0.012, zero_snr=True), {**SD, "rescale_betas_zero_snr": True}),
    "cosine to noise": (DiscreteVP.cosine(70, zero_snr=True),
                        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 70, "rescale_betas_zero_snr": True}),
    "trained to noise": (DiscreteVP.of(TRAINED, zero_snr=True),
                         {"trained_betas": TRAINED, "num_train_timesteps": 5, "rescale_betas_zero_snr": True}),
}  # fmt: skip
SD_PATH, NOISE_PATH = CASES["scaled_linear"][0], CASES["scaled_linear to noise"][0]
MEAN = torch.tensor([0.6, -0.4], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.25], [0.25, 0.3]], dtype=torch.float64)


def every_step(path: DiscreteVP, dtype: torch.dtype = torch.float64) -> Tensor:
    """Times (N,) of all training steps, as a division gives them."""
    return torch.arange(1, path.num_steps + 1, dtype=dtype) / path.num_steps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("name", CASES)
def test_the_table_is_the_schedulers(name: str, scheduler: Any) -> None:
    path, options = CASES[name]
    table = scheduler(**options).alphas_cumprod.double()
    assert path.num_steps == len(table)
    alpha, sigma = path.coeffs(every_step(path))
    assert (alpha**2 - table).abs().max() <= 1e-15
    assert (sigma**2 - (1 - table)).abs().max() <= 1e-15
    # Small products too: relative to themselves.
    assert ((alpha**2 - table).abs() <= 1e-14 * table).all()
    assert path.zero_snr == (table[-1].item() == 0) == options.get("rescale_betas_zero_snr", False)
    for coefficient, exact in zip(path.coeffs(every_step(path, torch.float32)), (table.sqrt(), (1 - table).sqrt()), strict=True):
        assert coefficient.dtype == torch.float32 and torch.equal(coefficient, exact.float())


@pytest.mark.parametrize("name", CASES)
def test_time_inverts_ratio_at_and_between_the_steps(name: str) -> None:
    path, _ = CASES[name]
    for t in (every_step(path), every_step(path) - 0.37 / path.num_steps, torch.logspace(-9, 0, 300, dtype=torch.float64)):
        assert (path.time(path.ratio(t)) - t).abs().max() <= 1e-12
    t = every_step(path, torch.float32)
    last = t > 1 - 2 / path.num_steps
    assert (path.time(path.ratio(t)) - t)[~last].abs().max() <= 1e-6
    assert (path.time(path.ratio(t)) - t)[last].abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["scaled_linear", "trained", "cosine to noise"])
def test_log_alpha_is_linear_between_two_steps(name: str) -> None:
    path, _ = CASES[name]
    ends = every_step(path)
    ends = torch.cat([torch.zeros(1, dtype=torch.float64), ends[:-1] if path.zero_snr else ends])
    before, after = (path.coeffs(t)[0].log() for t in (ends[:-1], ends[1:]))
    third = path.coeffs(ends[:-1] + 0.3 / path.num_steps)[0].log()
    torch.testing.assert_close(third, before + 0.3 * (after - before), rtol=1e-10, atol=1e-12)


def test_alpha_itself_is_linear_over_the_last_step_to_noise() -> None:
    ends = torch.tensor([1 - 1 / 1000, 1 - 0.75 / 1000, 1 - 0.25 / 1000, 1.0], dtype=torch.float64)
    alpha, sigma = NOISE_PATH.coeffs(ends)
    torch.testing.assert_close(alpha / alpha[0], torch.tensor([1, 0.75, 0.25, 0], dtype=torch.float64), rtol=1e-9, atol=0)
    assert (alpha[-1].item(), sigma[-1].item()) == (0, 1)
    slopes = NOISE_PATH.velocity_coeffs(ends[1:])
    torch.testing.assert_close(slopes[0], -1000 * alpha[0].expand(3), rtol=1e-12, atol=0)
    assert slopes[1][-1].item() == 0


@pytest.mark.parametrize("path", [SD_PATH, NOISE_PATH], ids=["scaled_linear", "to noise"])
def test_slopes_at_a_step_are_those_below_it(path: DiscreteVP) -> None:
    t = every_step(path)[[0, 400, 998, 999]]
    for dtype in (torch.float64, torch.float32):
        for i, h in ((0, 1e-6), (1, 1e-6)):
            below = (path.coeffs(t)[i] - path.coeffs(t - h)[i]) / h
            torch.testing.assert_close(path.velocity_coeffs(t.to(dtype))[i].double(), below, rtol=2e-3, atol=1e-5)
    assert torch.equal(path.step(t), torch.tensor([0, 400, 998, 999], dtype=torch.float64))


def test_forward_mode_is_the_derivative() -> None:
    for path in (SD_PATH, NOISE_PATH):
        t = torch.tensor([[0.0312, 0.4567], [0.87654, 0.99967]], dtype=torch.float64)
        x0, eps, speed = normal(2, 3, 2, 4, 5), normal(2, 3, 2, 4, 5, seed=1), torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
        for kind in KINDS:
            other = "x0" if kind == "v" else "v"
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(t, speed)
                x = path.mix(x0, eps, dual)
                values = (x, path.convert(eps, x, dual, kind, other), path.step(dual))
                tangents: list[Any] = [forward_ad.unpack_dual(value).tangent for value in values]
            h = 1e-7
            ahead, behind = ((path.mix(x0, eps, u), u) for u in (t + h * speed, t - h * speed))
            differences = [
                (ahead[0] - behind[0]) / (2 * h),
                (path.convert(eps, *ahead, kind, other) - path.convert(eps, *behind, kind, other)) / (2 * h),
                path.num_steps * speed,
            ]
            for tangent, difference in zip(tangents, differences, strict=True):
                assert (tangent - difference).abs().max() <= 2e-5 * difference.abs().max().clamp(min=1)


def test_forward_mode_through_other_paths() -> None:
    x = normal(2, 2)
    for path in (SD_PATH, NOISE_PATH):
        t = torch.tensor([0.3123, 0.99967], dtype=torch.float64, requires_grad=True)
        there = path.retime(x, t, TrigFlow())[1].detach().requires_grad_()
        for start, end, time in ((path, TrigFlow(), t), (TrigFlow(), path, there)):
            assert torch.autograd.gradcheck(
                lambda u, start=start, end=end: start.retime(x, u, end), (time,), eps=1e-7, atol=1e-4, rtol=1e-4, check_forward_ad=True
            )


def test_steps_are_whole_where_a_time_rounds_to_one() -> None:
    for path in (SD_PATH, CASES["900 steps"][0]):
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(path.step(every_step(path, dtype)), torch.arange(path.num_steps, dtype=torch.float64))
        assert path.step(torch.zeros(1)).item() == -1
        assert path.step(torch.tensor([1e-7])).item() > -1, "a time above 0 is noisy"
    assert SD_PATH.step(torch.tensor(0.3704, dtype=torch.float64)).item() == pytest.approx(369.4, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pure_noise_determines_no_x0_for_eps(dtype: torch.dtype) -> None:
    x, pred, t = normal(2, 3).to(dtype), normal(2, 3, seed=1).to(dtype), torch.tensor([0.4, 1.0], dtype=dtype)
    for kind in ("eps", "score"):
        with pytest.raises(ValueError, match=r"'eps' does not determine x0 and eps at a singular end of DiscreteVP\(1000 steps.*t = 0.4 to 1"):
            NOISE_PATH.convert(pred, x, t, kind, "x0")
    assert torch.equal(NOISE_PATH.convert(pred, x, t, "v", "x0")[1], -pred[1])
    assert torch.equal(NOISE_PATH.convert(pred, x, t, "x0", "eps")[1], x[1])
    assert torch.isfinite(NOISE_PATH.convert(pred, x, t, "x0", "velocity")).all()
    # Where some signal is left all kinds do.
    assert torch.isfinite(SD_PATH.convert(pred, x, t, "eps", "x0")).all()


def test_retime_to_other_paths_and_past_the_end() -> None:
    x, end = normal(2, 3), torch.ones(2, dtype=torch.float64)
    for other in (Flow(), TrigFlow()):
        same, t = NOISE_PATH.retime(x, end, other)
        torch.testing.assert_close(same, x)
        torch.testing.assert_close(t, torch.full_like(t, other.t_max))
        assert torch.equal(other.retime(x, torch.full_like(end, other.t_max), NOISE_PATH)[1], end)
        with pytest.raises(ValueError, match=r"DiscreteVP\(1000 steps, beta 0.00085 to 0.012\) does not reach the noise level"):
            other.retime(x, torch.full_like(end, other.t_max), SD_PATH)
    assert SD_PATH.time(SD_PATH.ratio(torch.ones(1))).item() == 1
    assert SD_PATH.time(torch.tensor([20.0, math.inf])).tolist() == [math.inf, math.inf]
    assert SD_PATH.time(torch.zeros(1)).item() == 0


class Exact:
    """The exact eps network of N(MEAN, COVARIANCE), asked for other kinds through the path."""

    def __init__(self, path: DiscreteVP) -> None:
        self.path: Path = path
        self.schedule = oracle.discrete(torch.tensor(path.betas))

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "x0", path: Path | None = None) -> Tensor:
        if self.schedule.pure:
            x0 = oracle.gaussian_posterior_mean(x, t, self.schedule, MEAN, COVARIANCE)
            return self.path.convert(x0, x, t, "x0", kind)
        eps = oracle.gaussian_prediction("eps", x, t, self.schedule, MEAN, COVARIANCE)
        return self.path.convert(eps, x, t, "eps", kind)


def test_euler_steps_are_ddims_and_end_at_the_exact_mean() -> None:
    steps, noise = [999, 749, 499, 249], normal(8, 2)
    times = torch.tensor([(k + 1) / 1000 for k in steps], dtype=torch.float64)
    result = few_step(Exact(SD_PATH), noise, times, {}, renoise="euler")
    bars, x = DDIMScheduler(**SD).alphas_cumprod.double(), noise
    for k, following in zip(steps, [*steps[1:], None], strict=True):
        spread = bars[k] * COVARIANCE + (1 - bars[k]) * torch.eye(2, dtype=torch.float64)
        eps = (1 - bars[k]).sqrt() * torch.linalg.solve(spread, (x - bars[k].sqrt() * MEAN).T).T
        x0 = (x - (1 - bars[k]).sqrt() * eps) / bars[k].sqrt()
        x = x0 if following is None else bars[following].sqrt() * x0 + (1 - bars[following]).sqrt() * eps
    assert (result - x).abs().max() <= 1e-12


@pytest.mark.parametrize("path", [SD_PATH, NOISE_PATH], ids=["scaled_linear", "to noise"])
def test_samplers_follow_the_exact_flow(path: DiscreteVP) -> None:
    predict, noise, times = Exact(path), normal(8, 2), every_step(path).flip(0)[::25]
    exact = oracle.gaussian_ode_map(noise, 1.0, times[-1].item(), predict.schedule, MEAN, COVARIANCE)
    assert (ode(predict, noise, times, {}) - exact).abs().max() <= 2e-3
    whole = oracle.gaussian_ode_map(noise, 1.0, 0.0, predict.schedule, MEAN, COVARIANCE)
    errors = [(few_step(predict, noise, every_step(path).flip(0)[::stride], {}, renoise="euler") - whole).abs().max().item() for stride in (40, 10)]
    assert errors[1] <= 0.05 and errors[0] / errors[1] == pytest.approx(4, rel=0.2)  # first order


def test_stochastic_steps_are_the_hand_written_ones() -> None:
    predict, noise, times = Exact(SD_PATH), normal(2, 2), torch.tensor([1.0, 0.5], dtype=torch.float64)
    rng = SampleRng(0, (), range(2))
    result = few_step(predict, noise, times, {}, rng, renoise="stochastic")
    bar = DDIMScheduler(**SD).alphas_cumprod[499].double()
    x = bar.sqrt() * predict(noise, times[:1].expand(2), {}) + (1 - bar).sqrt() * rng.normal("renoise/0", (2,)).double()
    assert (result - predict(x, times[1:].expand(2), {})).abs().max() <= 1e-12


def test_paths_are_equal_by_their_betas() -> None:
    same = DiscreteVP.scaled_linear(1000, 0.00085, 0.012)
    same.coeffs(torch.ones(1))  # what is kept for later counts for nothing
    assert same == SD_PATH != NOISE_PATH and hash(same) == hash(SD_PATH) and same != DiscreteVP.linear(1000, 0.00085, 0.012)
    for other in (copy.deepcopy(same), pickle.loads(pickle.dumps(same)), DiscreteVP(same.betas), DiscreteVP.of(same.betas)):
        assert other == same and torch.equal(other.coeffs(torch.tensor([0.4]))[0], same.coeffs(torch.tensor([0.4]))[0])
    assert repr(same) == "DiscreteVP(1000 steps, beta 0.00085 to 0.012)"


def test_a_table_made_in_inference_mode_serves_training() -> None:
    path = DiscreteVP.linear(50, 0.001, 0.2)
    with torch.inference_mode():
        path.coeffs(torch.tensor([0.3]))
    t = torch.tensor([0.31], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(path.coeffs(t)[0].sum(), t)
    torch.testing.assert_close(slope, path.velocity_coeffs(t)[0])
    ratio = path.ratio(t).detach().requires_grad_()
    (inverse,) = torch.autograd.grad(path.time(ratio).sum(), ratio)
    (forth,) = torch.autograd.grad(path.ratio(t).sum(), t)
    torch.testing.assert_close(inverse * forth, torch.ones_like(t))


@pytest.mark.parametrize("betas", [[], [0.1, 0.0], [0.1, 1.2], [1.0, 0.1], [0.1, math.nan], [-0.1, 0.1], [0.1, 1e-9], [0.999] * 20])
def test_betas_that_are_none_are_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match=r"betas must lie between 0 and 1 \(the last may be 1\)"):
        DiscreteVP(tuple(betas))
