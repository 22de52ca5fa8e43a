from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from fastgen.timesteps import TimeSampling, between, grid, logit_normal, shifted, u_shaped, uniform


def cdf(density: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Numerically integrated (midpoint rule) and normalised CDF on (0, 1), interpolated at points (N,) inside."""
    edges = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    mass = torch.cat([torch.zeros(1), density((edges[1:] + edges[:-1]) / 2).cumsum(0)])
    at = torch.searchsorted(edges, points)
    return torch.lerp(mass[at - 1], mass[at], (points - edges[at - 1]) / (edges[at] - edges[at - 1])) / mass[-1]


def logit_normal_density(t: Tensor, mean: float, std: float) -> Tensor:
    z = (torch.log(t / (1 - t)) - mean) / std
    return torch.exp(-0.5 * z**2) / (t * (1 - t))


U = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)


@pytest.mark.parametrize("a", [1.0, 4.0, 7.0])
def test_u_shaped_inverts_its_cdf(a: float) -> None:
    assert (cdf(lambda t: torch.cosh(a * (t - 0.5)), u_shaped(U, a=a)) - U).abs().max() < 1e-8


def test_u_shaped_default_is_the_papers() -> None:
    assert torch.equal(u_shaped(U), u_shaped(U, a=4.0))
    assert (u_shaped(U) + u_shaped(1 - U) - 1).abs().max() < 1e-14
    outer = (cdf(lambda t: torch.cosh(4 * (t - 0.5)), torch.tensor([0.25], dtype=torch.float64))).item()
    assert outer == pytest.approx((math.sinh(2) - math.sinh(1)) / (2 * math.sinh(2)), abs=1e-8)
    assert u_shaped(torch.tensor([outer], dtype=torch.float64)).item() == pytest.approx(0.25, abs=1e-8)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.7), (1.0, 1.6)])
def test_logit_normal_inverts_its_cdf(mean: float, std: float) -> None:
    draws = logit_normal(U, mean=mean, std=std)
    assert (cdf(lambda t: logit_normal_density(t, mean, std), draws) - U).abs().max() < 1e-7


def test_logit_normal_median_and_extremes() -> None:
    assert logit_normal(torch.tensor([0.5]), mean=0.4).item() == pytest.approx(1 / (1 + math.exp(-0.4)))
    ends = logit_normal(torch.tensor([0.0, 1.0]), std=3.0)
    assert torch.isfinite(ends).all()
    assert 0 < ends[0] < 1e-6 < 1 - 1e-6 < ends[1] <= 1


def test_uniform_is_the_identity() -> None:
    assert torch.equal(uniform(U), U)


def test_shift_formula() -> None:
    t = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64)
    assert (shifted(t, 3.0) - expected).abs().max() < 1e-15
    assert torch.equal(shifted(t, 1.0), t)
    # Esser et al. 2024, eq. 23 comes from scaling the noise-to-signal ratio t/(1 - t).
    inner = t[1:-1]
    moved = shifted(inner, 2.2)
    assert (moved / (1 - moved) / (2.2 * inner / (1 - inner)) - 1).abs().max() < 1e-13


@given(a=st.floats(0.1, 10), b=st.floats(0.1, 10), t=st.floats(0, 1))
def test_shifts_compose_by_multiplication(a: float, b: float, t: float) -> None:
    at = torch.tensor([t], dtype=torch.float64)
    assert shifted(shifted(at, a), b).item() == pytest.approx(shifted(at, a * b).item(), abs=1e-13)
    assert shifted(shifted(at, a), 1 / a).item() == pytest.approx(t, abs=1e-13)


def test_grid_values() -> None:
    assert (grid(4, shift=3.0) - torch.tensor([1, 0.9, 0.75, 0.5], dtype=torch.float64)).abs().max() < 1e-15
    assert grid(4).tolist() == [1, 0.75, 0.5, 0.25]
    assert grid(1, shift=7.0).tolist() == [1]
    assert grid(3).dtype == torch.float64


@pytest.mark.parametrize("steps", [0, -2])
def test_grid_needs_a_step(steps: int) -> None:
    with pytest.raises(ValueError, match=f"at least one step, got {steps}"):
        grid(steps)


@given(
    name=st.sampled_from(["uniform", "logit_normal", "u_shaped"]),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda e: e[1] - e[0] > 1e-3),
    shift=st.floats(0.2, 12),
)
def test_time_sampling_stays_inside_and_is_monotone(name: str, ends: list[float], shift: float) -> None:
    sampling = TimeSampling(name=name, lo=ends[0], hi=ends[1], shift=shift)  # type: ignore[arg-type]
    # from the smallest to the largest number that torch.rand gives
    u = torch.cat([torch.tensor([0.0, 2**-24]), torch.linspace(0.01, 0.99, 99), torch.tensor([1 - 2**-24])])
    t = sampling.quantile(u, teacher_shift=1.0)
    assert t.dtype == torch.float32
    assert (t >= ends[0] - 1e-6).all()
    assert (t <= ends[1] + 1e-6).all()
    # the squeeze into [lo, hi] may round by one unit
    assert (t.diff() >= -1e-7).all()


def test_time_sampling_draws_then_shifts_then_squeezes() -> None:
    sampling = TimeSampling(name="logit_normal", mean=0.3, std=0.8, lo=0.1, hi=0.7, shift=2.5)
    expected = 0.1 + 0.6 * shifted(logit_normal(U, mean=0.3, std=0.8), 2.5)
    assert (sampling.quantile(U, teacher_shift=9.0) - expected).abs().max() < 1e-15
    follows = TimeSampling(name="u_shaped")
    assert (follows.quantile(U, teacher_shift=3.0) - shifted(u_shaped(U), 3.0)).abs().max() < 1e-15
    assert torch.equal(TimeSampling(shift=1.0).quantile(U, teacher_shift=3.0), U)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lo": -0.1},
        {"hi": 1.1},
        {"lo": 0.8, "hi": 0.2},
        {"std": 0.0},
        {"shift": 0.0},
        {"shift": -1.0},
        {"shift": "student"},
        {"name": "cosine"},
        {"low": 0.1},
    ],
    ids=str,
)
def test_time_sampling_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        TimeSampling.model_validate(wrong)


# Parts of a range


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_times_between_are_a_part_of_the_shifted_schedule(shift: float) -> None:
    """From the shift of 7/8 to that of 1/2 in three steps: the shifts of 7/8, 6/8, 5/8, 4/8."""
    schedule = grid(8, shift=shift)
    part = between(schedule[1].item(), schedule[4].item(), 3, shift=shift)
    assert part.dtype == torch.float64
    assert (part - schedule[1:5]).abs().max() < 1e-14
    assert (part[0], part[-1]) == (schedule[1], schedule[4])


def test_times_between_reach_their_ends_exactly() -> None:
    times = between(1.0, 0.0, 7, shift=5.0)
    assert (times[0], times[-1]) == (1, 0)
    assert (times[:-1] - grid(7, shift=5.0)).abs().max() < 1e-15
    assert between(0.93, 0.1, 1, shift=3.3).tolist() == [0.93, 0.1]


@pytest.mark.parametrize("name", ["uniform", "logit_normal", "u_shaped"])
@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.3, 0.7])
def test_above_is_the_law_given_that_the_time_is_above(name: str, shift: float, floor: float) -> None:
    """Its quantiles against those of the kept among a million draws of the whole law; below its support nothing is cut."""
    sampling = TimeSampling(name=name, lo=0.2, hi=0.9, shift=shift, mean=0.3)  # type: ignore[arg-type]
    whole = sampling.quantile((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000, teacher_shift=1.0)
    kept = whole[whole >= floor]
    quantiles = kept[((U * len(kept)).long())]
    assert (sampling.above(U, floor, teacher_shift=1.0) - quantiles).abs().max() < 2e-4
    if floor <= 0.2:
        assert torch.equal(sampling.above(U, floor, teacher_shift=1.0), sampling.quantile(U, teacher_shift=1.0))


def test_above_draws_uniformly_before_the_shift() -> None:
    """Phased DMD, section 3.4: Wan's first phase ends at .8333, the shift by 5 of 1/2, so its times are the shifts of U(1/2, 1)."""
    times = TimeSampling().above(U, 5 / 6, teacher_shift=5.0)
    assert (times - shifted(0.5 + 0.5 * U, 5.0)).abs().max() < 1e-12


def test_above_stays_above_at_both_ends_of_the_draws() -> None:
    u = torch.tensor([0.0, 2**-24, 1 - 2**-24])
    for floor in (0.02, 1 / 3, 0.8533333, 0.97):
        times = TimeSampling(lo=0.02, hi=0.98).above(u, floor, teacher_shift=3.0)
        assert times.dtype == torch.float32
        assert (times >= torch.tensor(floor)).all()
        assert (times <= 0.98).all()


@pytest.mark.parametrize("floor", [0.5, 0.7])
def test_above_refuses_a_law_that_ends_below(floor: float) -> None:
    with pytest.raises(ValueError, match=f"no time of this distribution is above {floor}"):
        TimeSampling(hi=0.5).above(U, floor, teacher_shift=1.0)


def test_up_to_squeezes_the_law() -> None:
    sampling = TimeSampling(name="logit_normal", lo=0.1, hi=0.9, shift=2.0, mean=0.5)
    whole = (sampling.quantile(U, teacher_shift=1.0) - 0.1) / 0.8
    assert (sampling.up_to(0.5).quantile(U, teacher_shift=1.0) - (0.1 + 0.4 * whole)).abs().max() < 1e-14
    assert sampling.up_to(0.95) == sampling
    assert (sampling.up_to(0.05).lo, sampling.up_to(0.05).hi) == (0.05, 0.05)
