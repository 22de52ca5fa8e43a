from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import oracle
import pytest
import torch
from torch import Tensor

from fastgen.conditioning import Conditioning
from fastgen.path import Flow, Kind, Path, TrigFlow, VarianceExploding, VariancePreserving
from fastgen.rng import SampleRng
from fastgen.sampling import Renoise, few_step, initial, ode, walk

PATHS: list[Path] = [Flow(), TrigFlow(), VariancePreserving(), VarianceExploding()]
MEAN = torch.tensor([0.6, -0.4], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.25], [0.25, 0.3]], dtype=torch.float64)
TIMES = torch.tensor([1.0, 0.7, 0.45, 0.2], dtype=torch.float64)


def schedule_of(path: Path) -> oracle.Schedule:
    return oracle.SCHEDULES[type(path).__name__]


def noise(count: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Exact:
    """The exact Gaussian predictor, its x0 scaled by a trainable gain; records the calls it gets."""

    path: Path
    gain: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64))
    calls: list[tuple[Tensor, Tensor, bool]] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "x0", path: Path | None = None) -> Tensor:
        self.calls.append((x.detach().clone(), t.clone(), torch.is_grad_enabled()))
        if kind == "x0":
            answer = self.gain * oracle.gaussian_posterior_mean(x, t, schedule_of(self.path), MEAN, COVARIANCE)
        else:
            answer = oracle.gaussian_prediction(kind, x, t, schedule_of(self.path), MEAN, COVARIANCE)
        self.answers.append(answer.detach().clone())
        return answer


class ExactMap(Exact):
    """The exact consistency function: x0 is where the teacher's ODE ends."""

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "x0", path: Path | None = None) -> Tensor:
        return oracle.gaussian_ode_map(x, t[0].item(), 0.0, schedule_of(self.path), MEAN, COVARIANCE)


def descending(path: Path, count: int) -> Tensor:
    """(count,) times from the noise end; VE and VP spread geometrically in the noise ratio."""
    if isinstance(path, (Flow, TrigFlow)):
        return path.t_max * (1 - torch.arange(count, dtype=torch.float64) / count)
    start = path.ratio(torch.tensor(path.t_max, dtype=torch.float64)).log10().item()
    return path.time(torch.logspace(start, -3, count, dtype=torch.float64))


def test_euler_on_flow_is_the_hand_written_step() -> None:
    predict, start = Exact(Flow()), noise()
    result = few_step(predict, start, TIMES, {}, renoise="euler")
    x = start
    for i, t in enumerate(TIMES):
        assert (predict.calls[i][0] - x).abs().max() < 1e-14
        assert torch.equal(predict.calls[i][1], t.expand(8))
        velocity = oracle.gaussian_prediction("velocity", x, t.expand(8), oracle.SCHEDULES["Flow"], MEAN, COVARIANCE)
        following = TIMES[i + 1] if i + 1 < len(TIMES) else 0.0
        x = x + (following - t) * velocity
    assert len(predict.calls) == 4
    assert (result - x).abs().max() < 1e-14


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_many_euler_steps_converge_to_the_exact_ode_map(path: Path) -> None:
    errors = []
    for count in (125, 1000):
        times = descending(path, count)
        result = few_step(Exact(path), noise(), times, {}, renoise="euler")
        start = initial(path, noise(), times)
        expected = oracle.gaussian_ode_map(start, times[0].item(), 0.0, schedule_of(path), MEAN, COVARIANCE)
        errors.append((result - expected).abs().max().item())
    assert errors[1] < 8e-3
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.2)  # first order


def test_stochastic_draws_fresh_noise_and_fixed_keeps_its_own() -> None:
    rng, start = SampleRng(0, ("test",), range(8)), noise()
    for renoise in ("stochastic", "fixed"):
        result = few_step(Exact(Flow()), start, TIMES, {}, rng, renoise=renoise)
        x = start
        for i, t in enumerate(TIMES):
            x0 = oracle.gaussian_posterior_mean(x, t.expand(8), oracle.SCHEDULES["Flow"], MEAN, COVARIANCE)
            if i + 1 < len(TIMES):
                eps = start if renoise == "fixed" else rng.normal(f"renoise/{i}", (2,)).double()
                x = (1 - TIMES[i + 1]) * x0 + TIMES[i + 1] * eps
        assert (result - x0).abs().max() < 1e-14


@pytest.mark.parametrize("path", [Flow(), TrigFlow(), VarianceExploding()], ids=lambda p: type(p).__name__)
def test_stochastic_with_the_exact_map_samples_the_data(path: Path) -> None:
    count = 8000
    times = TIMES * path.t_max
    samples = few_step(ExactMap(path), noise(count), times, {}, SampleRng(0, (), range(count)), renoise="stochastic")
    # VE starts from N(0, 80^2), the true marginal has mean and data variance on top: 1e-2 at most, gone after one renoising.
    standard_error = (COVARIANCE.diagonal() / count).sqrt()
    assert ((samples.mean(0) - MEAN).abs() < 4 * standard_error + 1e-4).all()
    assert (samples.T.cov() - COVARIANCE).abs().max() < 4 * 0.5 * (2 / count) ** 0.5
    fewer = few_step(ExactMap(path), noise(count), times[:1], {}, renoise="euler")
    assert (samples - fewer).abs().mean() > 0.3  # fresh noise: other samples of the same law


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_euler_with_a_single_time_is_the_predictor_on_pure_noise(path: Path) -> None:
    for time in (path.t_max, 0.7 * path.t_max):
        predict, times = Exact(path), torch.tensor([time], dtype=torch.float64)
        result = few_step(predict, noise(), times, {}, renoise="euler")
        ((x, t, _),) = predict.calls
        scale = time if isinstance(path, VarianceExploding) else 1.0
        assert torch.equal(x, noise() * scale)
        assert torch.equal(t, times.expand(8))
        assert torch.equal(result, predict.answers[0])


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("renoise", ["euler", "fixed"])
def test_a_sampler_goes_on_where_another_stopped(path: Path, renoise: Renoise) -> None:
    times = TIMES * path.t_max
    if renoise == "fixed" and path.coeffs(times[:1])[0].item() != 0:
        pytest.skip("the first evaluation's eps is not the noise that is handed on")
    whole = few_step(Exact(path), noise(), times, {}, renoise=renoise)
    assert torch.equal(few_step(Exact(path), noise(), times, {}, renoise=renoise, start=initial(path, noise(), times)), whole)
    for stop in (1, 2, 3):
        predict = Exact(path)
        start = walk(Exact(path), noise(), times[: stop + 1], {}, renoise=renoise)
        assert torch.equal(few_step(predict, noise(), times[stop:], {}, renoise=renoise, start=start), whole)
        assert torch.equal(predict.calls[0][0], start)
        assert [t[0].item() for _, t, _ in predict.calls] == times[stop:].tolist()


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_fixed_noise_is_the_first_evaluations_and_euler_on_a_straight_flow(path: Path) -> None:
    """Lee et al. 2024, section 4.3, on paths that end short of pure noise too."""
    times, x0, eps = TIMES * path.t_max, noise(seed=3), noise(seed=4)
    scale = path.prior_scale(times[:1])
    start = path.mix(x0, eps, times[:1].expand(8))

    class Straight:
        def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "x0", other: Path | None = None) -> Tensor:
            return path.predict(x0, eps, t, kind)

    Straight.path = path  # type: ignore[attr-defined]
    straight: Any = Straight()
    for i in range(2, 5):
        found = [walk(straight, start / scale, times[:i], {}, renoise=each) for each in ("euler", "fixed")]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
    predict = Exact(path)
    walked, first = walk(Exact(path), noise(), times[:3], {}, renoise="fixed"), walk(predict, noise(), times[:2], {}, renoise="euler")
    _, eps = path.solve(predict.answers[0], noise() * scale, times[:1].expand(8), "x0")
    second = Exact(path)(first, times[1].expand(8), {})
    torch.testing.assert_close(walked, path.mix(second, eps, times[2].expand(8)), rtol=0, atol=1e-9)


def test_samples_keep_the_noises_dtype() -> None:
    class Wide(Exact):
        def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "x0", path: Path | None = None) -> Tensor:
            assert x.dtype == torch.float32
            assert t.dtype == torch.float64
            return super().__call__(x.double(), t, cond, kind, path)

    for renoise in ("euler", "stochastic", "fixed"):
        rng = SampleRng(0, (), range(8))
        result = few_step(Wide(Flow()), noise().float(), TIMES, {}, rng, renoise=renoise)
        wide = few_step(Exact(Flow()), noise().float().double(), TIMES, {}, rng, renoise=renoise)
        assert result.dtype == torch.float32
        assert (result - wide).abs().max() < 1e-6


@pytest.mark.parametrize("renoise", ["euler", "stochastic", "fixed"])
@pytest.mark.parametrize("exit_at", [0, 1, 3])
def test_grad_at_carries_the_gradient_of_one_evaluation(renoise: Renoise, exit_at: int) -> None:
    rng = SampleRng(0, ("grad",), range(8))
    with torch.no_grad():
        full = Exact(Flow())
        few_step(full, noise(), TIMES, {}, rng, renoise=renoise)
    predict = Exact(Flow(), gain=torch.ones((), dtype=torch.float64, requires_grad=True))
    result = few_step(predict, noise(), TIMES, {}, rng, renoise=renoise, grad_at=exit_at)
    assert [with_grad for _, _, with_grad in predict.calls] == [False] * exit_at + [True]
    assert torch.equal(result.detach(), full.answers[exit_at])

    weight = noise(seed=5)
    (gradient,) = torch.autograd.grad((weight * result).sum(), predict.gain)
    x, t, _ = full.calls[exit_at]
    single = (weight * oracle.gaussian_posterior_mean(x, t, oracle.SCHEDULES["Flow"], MEAN, COVARIANCE)).sum()
    assert gradient.item() == pytest.approx(single.item(), rel=1e-12)


def test_without_grad_at_the_callers_mode_holds() -> None:
    predict = Exact(Flow(), gain=torch.ones((), dtype=torch.float64, requires_grad=True))
    few_step(predict, noise(), TIMES, {}, renoise="euler")
    assert [with_grad for _, _, with_grad in predict.calls] == [True] * 4
    with torch.no_grad():
        assert not few_step(predict, noise(), TIMES, {}, renoise="euler", grad_at=2).requires_grad

    def run(gain: Tensor) -> Tensor:
        return few_step(Exact(Flow(), gain=gain), noise(2), TIMES, {}, renoise="euler")

    assert torch.autograd.gradcheck(run, (predict.gain,))


def test_errors() -> None:
    with pytest.raises(ValueError, match="needs an rng"):
        few_step(Exact(Flow()), noise(), TIMES, {}, renoise="stochastic")
    for exit_at in (-1, 4):
        with pytest.raises(AssertionError, match=f"grad_at {exit_at} is none of the 4"):
            few_step(Exact(Flow()), noise(), TIMES, {}, renoise="euler", grad_at=exit_at)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_ode_order(path: Path, solver: Literal["euler", "heun"], order: int) -> None:
    high, low = (2.0, 0.2) if isinstance(path, VarianceExploding) else (0.8 * path.t_max, 0.2 * path.t_max)
    expected = oracle.gaussian_ode_map(noise(), high, low, schedule_of(path), MEAN, COVARIANCE)
    errors = []
    for count in (80, 160):
        predict = Exact(path)
        result = ode(predict, noise(), torch.linspace(high, low, count + 1, dtype=torch.float64), {}, solver=solver)
        assert len(predict.calls) == order * count
        errors.append((result - expected).abs().max())
    assert errors[1] < (2e-2 if order == 1 else 2e-4)
    assert torch.log2(errors[0] / errors[1]).item() == pytest.approx(order, abs=0.12)


def test_ode_runs_backwards_too_and_keeps_the_dtype() -> None:
    times = torch.linspace(0.9, 0.1, 60, dtype=torch.float64)
    there = ode(Exact(Flow()), noise(), times, {})
    assert (ode(Exact(Flow()), there, times.flip(0), {}) - noise()).abs().max() < 1e-3
    assert ode(Exact(Flow()), noise().float().double(), times, {}).dtype == torch.float64
    assert torch.equal(ode(Exact(Flow()), noise(), times[:1], {}), noise())
