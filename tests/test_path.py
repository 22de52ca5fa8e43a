from __future__ import annotations

import math
from itertools import product

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen.path import KINDS, DiscreteVP, Flow, Path, TrigFlow, VarianceExploding, VariancePreserving, expand_time

PATHS: dict[str, Path] = {
    "Flow": Flow(),
    "TrigFlow": TrigFlow(),
    "VariancePreserving": VariancePreserving(),
    "VarianceExploding": VarianceExploding(),
    "DiscreteVP": DiscreteVP.of(oracle.BETAS),
    "DiscreteVP to noise": DiscreteVP.of(oracle.PURE_BETAS),
}
NAMES = list(PATHS)
PURE = [name for name in NAMES if oracle.SCHEDULES[name].pure]
SHAPES = [(3, 2), (3, 2, 4, 5), (3, 2, 3, 4, 5)]
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, 0.4], [0.8, 0.1]], dtype=torch.float64)
COVARIANCES = torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.6]]], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner_times(name: str, count: int = 3) -> Tensor:
    """(count,) float64 times away from both ends; VE spread geometrically."""
    if name == "VarianceExploding":
        return torch.logspace(-1.5, 1.7, count, dtype=torch.float64)
    return torch.linspace(0.06, 0.9, count, dtype=torch.float64) * oracle.SCHEDULES[name].end


def assert_near(value: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Relative to the largest element expected, and at least to 1."""
    assert value.shape == expected.shape
    error = (value - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= tolerance, f"off by {error:.2e}"


def assert_within_ulps(value: Tensor, expected: Tensor, ulps: int = 4) -> None:
    """To the rounding of one or two functions, such as the arc tangent of infinity; zeros exactly."""
    torch.testing.assert_close(value, expected, rtol=ulps * torch.finfo(expected.dtype).eps, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_coeffs_and_ratio_are_the_schedules(name: str) -> None:
    t = inner_times(name, 9)
    alpha, sigma = PATHS[name].coeffs(t)
    assert_near(alpha, oracle.SCHEDULES[name].alpha(t), 1e-14)
    assert_near(sigma, oracle.SCHEDULES[name].sigma(t), 1e-14)
    assert_near(PATHS[name].ratio(t), oracle.SCHEDULES[name].sigma(t) / oracle.SCHEDULES[name].alpha(t), 1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_coeffs_at_the_ends_are_exact(name: str) -> None:
    path = PATHS[name]
    for dtype in (torch.float32, torch.float64):
        start = path.coeffs(torch.zeros(1, dtype=dtype))
        # The zeros decide what is singular, so they are exact; a sine of pi/2 is 1 to rounding.
        one = pytest.approx(1, abs=torch.finfo(dtype).eps)
        assert [c.item() for c in start] == [one, 0]
        alpha, sigma = path.coeffs(torch.tensor([path.t_max], dtype=dtype))
        if name in PURE:
            assert (alpha.item(), sigma.item()) == (0, one)
        else:
            assert alpha > 0


@pytest.mark.parametrize("src", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_convert_of_exact_mixture_predictions(name: str, src: str) -> None:
    t = inner_times(name, 6)
    schedule = oracle.SCHEDULES[name]
    x = schedule.noisy(MEANS[[0, 1, 0, 1, 0, 1]] + normal(6, 2), normal(6, 2, seed=1), t)
    given_prediction = oracle.mixture_prediction(src, x, t, schedule, WEIGHTS, MEANS, COVARIANCES)
    for dst in KINDS:
        expected = oracle.mixture_prediction(dst, x, t, schedule, WEIGHTS, MEANS, COVARIANCES)
        assert_near(PATHS[name].convert(given_prediction, x, t, src, dst), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES, ids=["2-D", "4-D", "5-D"])
@pytest.mark.parametrize("name", NAMES)
def test_convert_of_every_rank(name: str, shape: tuple[int, ...]) -> None:
    path, schedule, t = PATHS[name], oracle.SCHEDULES[name], inner_times(name)
    x0, eps = normal(*shape), normal(*shape, seed=1)
    x = schedule.noisy(x0, eps, t)
    assert_near(path.mix(x0, eps, t), x)
    for src, dst in product(KINDS, KINDS):
        prediction = oracle.kind_of(src, x0, eps, t, schedule)
        assert_near(path.predict(x0, eps, t, src), prediction)
        assert_near(path.convert(prediction, x, t, src, dst), oracle.kind_of(dst, x0, eps, t, schedule))
        solved_x0, solved_eps = path.solve(prediction, x, t, src)
        assert_near(solved_x0, x0)
        assert_near(solved_eps, eps)


@settings(max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    src=st.sampled_from(KINDS),
    dst=st.sampled_from(KINDS),
    fraction=st.floats(0.02, 0.95),
    x=st.floats(-10, 10),
    prediction=st.floats(-10, 10),
)
def test_convert_round_trip(name: str, src: str, dst: str, fraction: float, x: float, prediction: float) -> None:
    path = PATHS[name]
    t = torch.tensor([fraction * path.t_max], dtype=torch.float64)
    noisy, pred = torch.tensor([[x]], dtype=torch.float64), torch.tensor([[prediction]], dtype=torch.float64)
    there = path.convert(pred, noisy, t, src, dst)  # type: ignore[arg-type]
    # Errors are relative to the largest number on the way.
    scale = max(1.0, there.abs().item())
    assert_near(path.convert(there, noisy, t, dst, src) / scale, pred / scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_per_frame_times_equal_the_per_frame_loop(name: str) -> None:
    path = PATHS[name]
    x0, eps = normal(2, 3, 4, 3, 5), normal(2, 3, 4, 3, 5, seed=1)
    t = inner_times(name, 8).reshape(2, 4)
    x = path.mix(x0, eps, t)

    def looped(function: str, first: Tensor, second: Tensor, *kinds: str) -> Tensor:
        frames = [getattr(path, function)(first[:, :, i], second[:, :, i], t[:, i], *kinds) for i in range(4)]
        return torch.stack(frames, 2)

    assert_near(x, looped("mix", x0, eps), 1e-15)
    assert_near(x, oracle.SCHEDULES[name].noisy(x0, eps, t))
    for src, dst in product(KINDS, KINDS):
        assert_near(path.convert(eps, x, t, src, dst), looped("convert", eps, x, src, dst), 1e-14)
    moved, times = path.retime(x, t, TrigFlow())
    for i in range(4):
        frame, frame_times = path.retime(x[:, :, i], t[:, i], TrigFlow())
        assert_near(moved[:, :, i], frame, 1e-15)
        assert_near(times[:, i], frame_times, 1e-15)


def test_per_frame_times_need_five_dimensions() -> None:
    with pytest.raises(ValueError, match=r"\(B, T\) for 5-D"):
        Flow().mix(normal(2, 3, 4, 4), normal(2, 3, 4, 4), torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"\(B, T\) for 5-D"):
        expand_time(torch.rand(2, 1, 1), normal(2, 3, 4, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_inputs_come_back_in_fp32(name: str, dtype: torch.dtype) -> None:
    path = PATHS[name]
    x, pred = normal(3, 2).to(dtype), normal(3, 2, seed=1).to(dtype)
    times = (inner_times(name).float(), inner_times(name)[1].float())
    for t, (src, dst) in product(times, product(KINDS, KINDS)):
        value = path.convert(pred, x, t, src, dst)
        assert value.dtype == torch.float32
        exact = path.convert(pred.double(), x.double(), t.double(), src, dst)
        assert_near(value.double(), exact, 2e-5)
    for t in times:
        assert path.mix(x, pred, t).dtype == path.predict(x, pred, t, "eps").dtype == torch.float32
        assert path.retime(x, t, Flow())[0].dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_half_times_are_widened(name: str) -> None:
    t = inner_times(name).bfloat16()
    for values in (PATHS[name].coeffs(t), PATHS[name].velocity_coeffs(t)):
        assert [value.dtype for value in values] == [torch.float32] * 2
    assert torch.equal(PATHS[name].coeffs(t)[1], PATHS[name].coeffs(t.float())[1])
    assert PATHS[name].time(t).dtype == PATHS[name].prior_scale(t).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_velocity_coeffs_are_derivatives(name: str) -> None:
    path, t = PATHS[name], inner_times(name, 9)
    h = 1e-5 * t
    for i in range(2):
        central = (path.coeffs(t + h)[i] - path.coeffs(t - h)[i]) / (2 * h)
        assert_near(path.velocity_coeffs(t)[i], central, 1e-8)
    assert_near(path.velocity_coeffs(t)[1], oracle.derivative(oracle.SCHEDULES[name].sigma, t))


@pytest.mark.parametrize("name", NAMES)
def test_time_inverts_ratio(name: str) -> None:
    path = PATHS[name]
    t = torch.linspace(1e-3, 1, 200, dtype=torch.float64) * path.t_max
    assert_near(path.time(path.ratio(t)), t)
    ratios = torch.logspace(-5, 2, 200, dtype=torch.float64)
    assert ((path.ratio(path.time(ratios)) / ratios - 1).abs() <= 1e-10).all()
    assert path.time(torch.zeros(1, dtype=torch.float64)).item() == 0


def test_infinite_ratio_is_pure_noise() -> None:
    infinite = torch.tensor([math.inf], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        for path in (Flow(), TrigFlow()):
            end = torch.tensor([path.t_max], dtype=dtype)
            assert path.ratio(end).item() == math.inf
            assert_within_ulps(path.time(infinite.to(dtype)), end)
    for path in (VariancePreserving(), VarianceExploding()):
        assert not torch.isfinite(path.time(infinite)).any()


def test_vp_time_past_its_end_is_infinite() -> None:
    path = VariancePreserving()
    last = path.ratio(torch.ones(1, dtype=torch.float64))
    assert path.time(last).item() == pytest.approx(1, abs=1e-10)
    assert path.time(1.01 * last).item() == math.inf
    assert path.time(path.ratio(torch.ones(1))).item() == 1


@pytest.mark.parametrize(("name", "other"), [*product(NAMES, NAMES)])
def test_retime_keeps_x0_and_eps(name: str, other: str) -> None:
    t = inner_times(name, 4).clamp(max=80)
    for shape in ((4, 2), (4, 2, 3, 5)):
        x0, eps = normal(*shape), normal(*shape, seed=1)
        x, t_other = PATHS[name].retime(oracle.SCHEDULES[name].noisy(x0, eps, t), t, PATHS[other])
        assert_near(x, oracle.SCHEDULES[other].noisy(x0, eps, t_other))
        back, t_back = PATHS[other].retime(x, t_other, PATHS[name])
        assert_near(t_back, t)
        assert_near(back, oracle.SCHEDULES[name].noisy(x0, eps, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_retime_between_the_pure_noise_ends(dtype: torch.dtype) -> None:
    x = normal(2, 3).to(dtype)
    for path, other in product((Flow(), TrigFlow()), repeat=2):
        for end, expected in ((path.t_max, other.t_max), (0.0, 0.0)):
            same, t = path.retime(x, torch.full((2,), end, dtype=dtype), other)
            assert_within_ulps(same, x)
            assert_within_ulps(t, torch.full((2,), expected, dtype=dtype))


@pytest.mark.parametrize(
    ("path", "t", "other"),
    [
        (Flow(), 1.0, VariancePreserving()),
        (Flow(), 1.0, VarianceExploding()),
        (Flow(), 0.999, VariancePreserving()),
        (TrigFlow(), math.pi / 2, VariancePreserving()),
        (TrigFlow(), math.pi / 2, VarianceExploding()),
        (VarianceExploding(), 200.0, VariancePreserving()),
    ],
)
def test_retime_refuses_noise_levels_out_of_reach(path: Path, t: float, other: Path) -> None:
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match="does not reach the noise level"):
            path.retime(torch.zeros(2, 1, dtype=dtype), torch.tensor([0.1, t], dtype=dtype), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PURE)
def test_pure_noise_end(name: str, dtype: torch.dtype) -> None:
    path = PATHS[name]
    x, pred = normal(2, 3).to(dtype), normal(2, 3, seed=1).to(dtype)
    t = torch.tensor([0.5, path.t_max], dtype=dtype)  # one singular sample is enough
    for src, dst in product(("eps", "score"), ("x0", "v", "velocity")):
        with pytest.raises(ValueError, match="does not determine x0 and eps"):
            path.convert(pred, x, t, src, dst)  # type: ignore[arg-type]
    # There x is eps itself; every other kind still determines x0.
    x0, end = pred[1:], t[1:]
    eps = path.mix(x0, x[1:], end)
    assert_within_ulps(eps, x[1:])
    for src, dst in product(("x0", "v", "velocity"), KINDS):
        value = path.convert(path.predict(x0, eps, end, src), eps, end, src, dst)  # type: ignore[arg-type]
        torch.testing.assert_close(value, path.predict(x0, eps, end, dst))
    torch.testing.assert_close(path.convert(-eps, eps, end, "score", "eps"), eps)


@pytest.mark.parametrize("name", NAMES)
def test_data_end(name: str) -> None:
    path = PATHS[name]
    x, pred, t = normal(2, 3), normal(2, 3, seed=1), torch.tensor([0.5, 0.0], dtype=torch.float64)
    for dst in ("eps", "velocity", "v"):
        with pytest.raises(ValueError, match=r"does not determine|infinite at t = 0"):
            path.convert(pred, x, t, "x0", dst)  # type: ignore[arg-type]
    for src in set(KINDS) - {"score"}:
        with pytest.raises(ValueError, match=r"singular at sigma = 0|infinite at t = 0"):
            path.convert(pred, x, t, src, "score")
    with pytest.raises(ValueError, match="singular at sigma = 0"):
        path.predict(x, pred, t, "score")
    for src in ("eps", "v", "score"):
        assert_within_ulps(path.convert(pred, x, t, src, "x0")[1], x[1])  # type: ignore[arg-type]


def test_velocity_at_the_data_end() -> None:
    x, pred, t = normal(2, 3), normal(2, 3, seed=1), torch.zeros(2, dtype=torch.float64)
    for kind in ("x0", "eps", "v"):
        for call in (lambda k: (k, "velocity"), lambda k: ("velocity", k)):
            with pytest.raises(ValueError, match=r"infinite at t = 0|does not determine"):
                VariancePreserving().convert(pred, x, t, *call(kind))  # type: ignore[arg-type]
    assert_within_ulps(Flow().convert(pred, x, t, "velocity", "eps"), pred + x)
    assert_within_ulps(TrigFlow().convert(pred, x, t, "velocity", "eps"), pred)
    assert_within_ulps(VarianceExploding().convert(pred, x, t, "velocity", "eps"), pred)


@pytest.mark.parametrize("name", NAMES)
def test_score_to_eps_takes_its_limit_at_the_data_end(name: str) -> None:
    path, schedule, x = PATHS[name], oracle.SCHEDULES[name], normal(5, 2)
    zero = torch.zeros(5, dtype=torch.float64)
    score = oracle.mixture_score(x, zero, schedule, WEIGHTS, MEANS, COVARIANCES)
    assert torch.equal(path.convert(score, x, zero, "score", "eps"), torch.zeros_like(x))
    near = torch.full((5,), 1e-7, dtype=torch.float64)
    assert oracle.mixture_prediction("eps", x, near, schedule, WEIGHTS, MEANS, COVARIANCES).abs().max() < 5e-3


@pytest.mark.parametrize("name", NAMES)
def test_kinds_convert_to_themselves_everywhere(name: str) -> None:
    x, pred = normal(2, 3), normal(2, 3, seed=1)
    for t, kind in product((0.0, PATHS[name].t_max), KINDS):
        assert torch.equal(PATHS[name].convert(pred, x, torch.full((2,), t, dtype=torch.float64), kind, kind), pred)


def test_unknown_kinds_are_named() -> None:
    x = normal(1, 2)
    for kinds in (("noise", "x0"), ("x0", "noise"), ("noise", "noise")):
        with pytest.raises(ValueError, match=r"'noise'; allowed: x0, eps, v, velocity, score"):
            Flow().convert(x, x, torch.tensor([0.5]), *kinds)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_convert(name: str) -> None:
    path = PATHS[name]
    pred, x = normal(2, 2).requires_grad_(), normal(2, 2, seed=1).requires_grad_()
    t = (torch.tensor([0.2, 0.6], dtype=torch.float64) * min(path.t_max, 2)).requires_grad_()
    for src, dst in product(KINDS, KINDS):
        assert torch.autograd.gradcheck(lambda *a, kinds=(src, dst): path.convert(*a, *kinds), (pred, x, t))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_mix_and_retime(name: str) -> None:
    path = PATHS[name]
    x0, eps = normal(2, 2).requires_grad_(), normal(2, 2, seed=1).requires_grad_()
    t = torch.tensor([0.2, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(path.mix, (x0, eps, t))
    for other in PATHS.values():
        assert torch.autograd.gradcheck(lambda x, t, other=other: path.retime(x, t, other), (x0, t))


def test_prior_scale() -> None:
    t = torch.tensor([0.3, 0.9])
    for name in ("Flow", "TrigFlow", "VariancePreserving"):
        assert torch.equal(PATHS[name].prior_scale(t), torch.ones(2))
    assert torch.equal(VarianceExploding().prior_scale(t), t)


def test_paths_compare_by_value() -> None:
    assert VariancePreserving() == VariancePreserving(0.1, 20.0) != VariancePreserving(0.1, 19.0)
    assert Flow() == Flow() != TrigFlow()


# The pair behind two samples


@pytest.mark.parametrize("shape", SHAPES, ids=["2-D", "4-D", "5-D"])
@pytest.mark.parametrize("name", NAMES)
def test_two_samples_of_one_line_give_its_pair_back(name: str, shape: tuple[int, ...]) -> None:
    """At times inside the range, and to data, where x0 is the sample."""
    schedule, x0, eps, s = oracle.SCHEDULES[name], normal(*shape), normal(*shape, seed=1), inner_times(name)
    for e in (0.4 * s, torch.zeros_like(s)):
        x_s, x_e = schedule.noisy(x0, eps, s), schedule.noisy(x0, eps, e)
        found = PATHS[name].through(x_s, x_e, s, e)
        for value, expected in zip(found, (x0, eps), strict=True):
            assert_near(value, expected, 1e-9)
    assert_near(found[0], x_e, 1e-15)


@pytest.mark.parametrize("name", PURE)
def test_pure_noise_is_the_eps_of_its_pair(name: str) -> None:
    path, noise, x_e = PATHS[name], normal(1, 2), normal(1, 2, seed=1)
    end, zero = torch.tensor([path.t_max], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    x0, eps = path.through(noise, x_e, end, zero)
    assert_near(x0, x_e, 1e-15)
    assert_near(eps, noise, 1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_any_two_samples_lie_on_the_line_of_their_pair(name: str) -> None:
    """Also where nothing has made them from one, per frame, and in half precision."""
    path, schedule, s = PATHS[name], oracle.SCHEDULES[name], inner_times(name, 4)
    x_s, x_e = normal(1, 2, 4, 3, 2), normal(1, 2, 4, 3, 2, seed=1)
    x0, eps = path.through(x_s, x_e, s[None], 0.3 * s[None])
    assert_near(schedule.noisy(x0, eps, s[None]), x_s, 1e-9)
    assert_near(schedule.noisy(x0, eps, 0.3 * s[None]), x_e, 1e-9)
    half = path.through(normal(4, 2).bfloat16(), normal(4, 2, seed=1).bfloat16(), s.float(), 0.3 * s.float())
    assert [value.dtype for value in half] == [torch.float32] * 2


@pytest.mark.parametrize("other", NAMES)
def test_a_pair_is_the_same_on_every_path(other: str) -> None:
    """Two samples of Flow, carried to another path at equal noise ratio."""
    s, e = torch.tensor([0.8, 0.5], dtype=torch.float64), torch.tensor([0.3, 0.45], dtype=torch.float64)
    x_s, x_e = normal(2, 3), normal(2, 3, seed=1)
    (y_s, t_s), (y_e, t_e) = (Flow().retime(x, t, PATHS[other]) for x, t in ((x_s, s), (x_e, e)))
    for value, expected in zip(PATHS[other].through(y_s, y_e, t_s, t_e), Flow().through(x_s, x_e, s, e), strict=True):
        assert_near(value, expected, 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_one_noise_level_has_no_pair(name: str) -> None:
    t = inner_times(name)
    with pytest.raises(ValueError, match=r"one noise level of .* determines no x0 and eps"):
        PATHS[name].through(normal(3, 2), normal(3, 2), t, torch.cat([t[:2] / 2, t[2:]]))  # one singular sample is enough


# From one noise level to another


def fractions(name: str, *values: float) -> list[Tensor]:
    """(1,) float64 times at fractions of the range; on VE of its lower end, where data and noise are of one size."""
    scale = 4.0 if name == "VarianceExploding" else oracle.SCHEDULES[name].end
    return [torch.tensor([value * scale], dtype=torch.float64) for value in values]


def noisy_law(name: str, t: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x_t for data N(mean, covariance), from the definition of the path."""
    alpha, sigma = oracle.SCHEDULES[name].alpha(t), oracle.SCHEDULES[name].sigma(t)
    return alpha * mean, alpha**2 * covariance + sigma**2 * torch.eye(len(mean), dtype=mean.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_the_bridge_carries_the_law_of_one_level_to_that_of_another(name: str) -> None:
    for s, t in (fractions(name, 0.2, 0.7), fractions(name, 0.5, 0.5), fractions(name, 0.0, 0.6)):
        alpha, sigma = PATHS[name].bridge(s, t)
        (mean_s, covariance_s), (mean_t, covariance_t) = (noisy_law(name, u, MEANS[0], COVARIANCES[0]) for u in (s, t))
        assert_near(alpha * mean_s, mean_t, 1e-12)
        assert_near(alpha**2 * covariance_s + sigma**2 * torch.eye(2, dtype=torch.float64), covariance_t, 1e-12)
    assert PATHS[name].bridge(t, t)[1].item() == 0


@pytest.mark.parametrize("name", NAMES)
def test_bridges_compose(name: str) -> None:
    """s -> r -> t is s -> t: factors multiply, and the first noise is scaled on the way."""
    s, r, t = fractions(name, 0.15, 0.4, 0.8)
    (first, noise_1), (second, noise_2), (whole, noise) = (PATHS[name].bridge(*ends) for ends in ((s, r), (r, t), (s, t)))
    assert_near(first * second, whole, 1e-12)
    assert_near((second * noise_1) ** 2 + noise_2**2, noise**2, 1e-12)


def test_bridge_by_hand() -> None:
    """Flow from .5 to .7: alpha .3/.5, sigma^2 .49 - .36 .25."""
    alpha, sigma = Flow().bridge(torch.tensor([0.5]), torch.tensor([0.7]))
    assert (alpha.item(), sigma.item()) == (pytest.approx(0.6), pytest.approx(0.4**0.5))


@pytest.mark.parametrize(
    ("kind", "of_x_s", "of_eps"),
    [
        ("score", 0, -1.58114),
        ("eps", 0, 1.10680),
        ("x0", 2, -0.47434),
        ("velocity", -2, 1.58114),
        ("v", -1.4, 0.3 * 1.10680 + 0.7 * 0.47434),
    ],
)
def test_bridge_targets_by_hand(kind: str, of_x_s: float, of_eps: float) -> None:
    """Factors of x_s and eps on Flow from .5 to .7; v = alpha eps - sigma x0 = .3 eps' - .7 x0'."""
    s, t, one, none = torch.tensor([0.5]).double(), torch.tensor([0.7]).double(), torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    factors = [Flow().bridge_target(*pair, s, t, kind)[1].item() for pair in ((one, none), (none, one))]  # type: ignore[arg-type]
    assert factors == pytest.approx([of_x_s, of_eps], abs=6e-6)
    points = [Flow().bridge_target(*pair, s, t, kind)[0].item() for pair in ((one, none), (none, one))]  # type: ignore[arg-type]
    assert points == pytest.approx([0.6, 0.63246], abs=6e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_a_bridge_target_is_the_exact_prediction(name: str, kind: str) -> None:
    """T2. (x_s, eps) given x_t is Gaussian for x_s ~ N(m, S), and the target is affine in it, so its mean is the target of the means."""
    s, t = fractions(name, 0.4, 0.7)
    schedule, eye, x = oracle.SCHEDULES[name], torch.eye(2, dtype=torch.float64), normal(5, 2)
    alpha = schedule.alpha(t) / schedule.alpha(s)
    sigma = (schedule.sigma(t) ** 2 - alpha**2 * schedule.sigma(s) ** 2).sqrt()
    mean, covariance = MEANS[1], COVARIANCES[1]
    # N(m, S) stands at s, so x_t is N(alpha_t|s m, alpha_t|s^2 S + sigma_t|s^2 I)
    whitened = torch.linalg.solve(alpha**2 * covariance + sigma**2 * eye, (x - alpha * mean).T).T
    x_s, eps = mean + alpha * whitened @ covariance, sigma * whitened
    score, (alpha_t, sigma_t) = -whitened, schedule.at(t, x)
    expected = oracle.kind_of(kind, (x + sigma_t**2 * score) / alpha_t, -sigma_t * score, t, schedule)
    same, target = PATHS[name].bridge_target(x_s, eps, s.expand(5), t.expand(5), kind)  # type: ignore[arg-type]
    assert_near(same, x, 1e-12)
    assert_near(target, expected, 1e-9)


def test_the_mean_of_a_bridge_target_over_a_mixture() -> None:
    """T2 by Monte Carlo on Flow: x_s given x_t is drawn exactly, 2e5 times; the naive target eps - x_s is off by .4."""
    s, t, x = 0.5, 0.7, 0.6
    alpha, sigma = 0.6, 0.4**0.5
    weights, means, variances = torch.tensor([[0.4, 0.6], [-1.0, 0.8], [0.05, 0.1]], dtype=torch.float64)
    whole = alpha**2 * variances + sigma**2
    share = (weights.log() - 0.5 * whole.log() - 0.5 * (x - alpha * means) ** 2 / whole).softmax(0)
    index = torch.multinomial(share, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    spread = (variances * sigma**2 / whole).sqrt()
    x_s = ((means + alpha * variances / whole * (x - alpha * means))[index] + spread[index] * normal(200_000, seed=1))[:, None]
    eps = (x - alpha * x_s) / sigma

    at = torch.tensor([[x]], dtype=torch.float64)
    score = oracle.derivative(lambda y: (weights * (-0.5 * (y - alpha * means) ** 2 / whole).exp() / whole.sqrt()).sum(-1, keepdim=True).log(), at)
    x0, noise = (at + t**2 * score) / (1 - t), -t * score
    start, end = (torch.full((len(x_s),), value, dtype=torch.float64) for value in (s, t))
    for kind in KINDS:
        expected = oracle.kind_of(kind, x0, noise, torch.tensor([t], dtype=torch.float64), oracle.SCHEDULES["Flow"]).item()
        assert Flow().bridge_target(x_s, eps, start, end, kind)[1].mean().item() == pytest.approx(expected, abs=1e-2)
    assert abs((eps - x_s).mean().item() - (noise - x0).item()) > 0.3


@pytest.mark.parametrize("shape", SHAPES, ids=["2-D", "4-D", "5-D"])
@pytest.mark.parametrize("name", NAMES)
def test_a_bridge_from_data_gives_the_ordinary_target(name: str, shape: tuple[int, ...]) -> None:
    schedule, t, x0, eps = oracle.SCHEDULES[name], inner_times(name), normal(*shape), normal(*shape, seed=1)
    for kind in KINDS:
        x, target = PATHS[name].bridge_target(x0, eps, torch.zeros(3, dtype=torch.float64), t, kind)
        assert_near(x, schedule.noisy(x0, eps, t), 1e-12)
        assert_near(target, oracle.kind_of(kind, x0, eps, t, schedule), 1e-12)
