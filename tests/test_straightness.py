"""How straight a flow is: closed forms of Gaussians and mixtures, on every path, exact fields and wrong ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path as File
from typing import Any, cast

import pytest
import torch
from pipelines import PROMPTS
from pipelines import sd3_folder as sd3_folder
from torch import Tensor

from fastgen import cli, load_teacher
from fastgen.conditioning import Conditioning
from fastgen.denoiser import Denoiser, Predictor
from fastgen.errors import NotFinite, UserError
from fastgen.families.toy import Mixture, Toy
from fastgen.fingerprints import SEAL
from fastgen.generator import ImageGenerator
from fastgen.path import DiscreteVP, Flow, Kind, Path, TrigFlow, VarianceExploding, VariancePreserving
from fastgen.sampling import Predict
from fastgen.straightness import CURVED, STRAIGHT, Measured, Straightness, flow_times, follow, straightness, summary, verdict

SD = DiscreteVP.scaled_linear(1000, 0.00085, 0.012)
MEAN = 0.7


def exact(means: list[list[float]], deviations: list[list[float]], path: Path | None = None, kind: Kind = "velocity") -> Predictor:
    """The field of a mixture with equal weights, fp64."""
    mixture = Mixture([1 / len(means)] * len(means), means, [[s**2 for s in row] for row in deviations])
    family = Toy(mixture, path=path or Flow(), kind=kind)
    return Predictor(Denoiser(family.load_backbone().double(), family), family)


class Linear:
    """x -> slope(t) x, on Flow alone."""

    path = Flow()

    def __init__(self, slope: Callable[[Tensor], Tensor]) -> None:
        self.slope = slope

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "x0", path: Path | None = None) -> Tensor:
        assert kind == "velocity" and path == Flow()
        return x @ self.slope(t[0]).T


def design(dim: int) -> tuple[Tensor, Tensor]:
    """Two noises (B, dim) whose moments up to the second are exactly those of independent unit noise."""
    rows = torch.tensor(list(product((-1.0, 1.0), repeat=2 * dim)), dtype=torch.float64)
    return rows[:, :dim], rows[:, dim:]


def means(predict: Predict, dim: int = 1, steps: int = 512) -> dict[str, float]:
    """Expectations of what `follow` measures, a dimension."""
    noise, other = design(dim)
    measured = follow(predict, noise, flow_times(predict.path, steps), {}, other)
    names = ("curvature", "displacement", "one_step", "crossing", "independent")
    found = {name: getattr(measured, name).mean().item() / dim for name in names}
    return found | {"residual": found["crossing"] + found["curvature"] - found["independent"] + found["displacement"]}


def integral(f: Callable[[Tensor], Tensor], end: float = 1.0) -> float:
    """int_0^end f, midpoints."""
    count = 20000
    return (f((torch.arange(count, dtype=torch.float64) + 0.5) / count * end).mean() * end).item()


@pytest.mark.parametrize("s", [0.3, 1.0, 2.5])
def test_curvature_and_crossing_of_a_gaussian_are_two_s(s: float) -> None:
    # Z_t = (1 - t) m + rho z with rho^2 = (1 - t)^2 s^2 + t^2, so S = int rho'^2 - (1 - s)^2 and V = int s^2 / rho^2 = pi s / 2.
    found = means(exact([[MEAN]], [[s]]))
    assert found["displacement"] == pytest.approx((1 - s) ** 2 + MEAN**2, rel=1e-4)
    assert found["curvature"] == pytest.approx(s * (2 - math.pi / 2), rel=1e-3)
    assert found["crossing"] == pytest.approx(s * math.pi / 2, rel=1e-3)
    assert found["curvature"] + found["crossing"] == pytest.approx(2 * s, rel=1e-3)  # .6, 2 and 5
    assert found["residual"] == pytest.approx(0, abs=1e-3)
    assert found["one_step"] == pytest.approx(s**2, rel=1e-4)  # one step draws the mean


def test_the_error_of_steps_falls_with_their_square() -> None:
    errors = [abs(means(exact([[MEAN]], [[0.6]]), steps=steps)["curvature"] - 0.6 * (2 - math.pi / 2)) for steps in (20, 40, 80)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15) and errors[1] / errors[2] == pytest.approx(4, rel=0.1)


ON_PATHS = [
    (Flow(), "velocity"), (Flow(), "x0"), (TrigFlow(), "v"), (VariancePreserving(), "eps"), (VarianceExploding(), "x0"), (SD, "eps"), (SD, "v"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "kind"), ON_PATHS)
def test_every_path_and_kind_gives_the_curvature_of_its_own_start(path: Path, kind: Kind) -> None:
    s = 0.6
    alpha, sigma = (value.item() for value in path.coeffs(torch.tensor(path.t_max, dtype=torch.float64)))
    end, scale = sigma / (alpha + sigma), (path.t_max if path == VarianceExploding() else 1.0) / (alpha + sigma)
    # From scale z at flow time `end`: Z_t = (1 - t) m + rho w, w = (scale z - (1 - end) m)/rho_end.
    rho = lambda t: ((1 - t) ** 2 * s**2 + t**2) ** 0.5  # noqa: E731
    speed = lambda t: (t - (1 - t) * s**2) / rho(t)  # noqa: E731
    spread = (scale**2 + (1 - end) ** 2 * MEAN**2) / rho(end) ** 2
    expected = spread * (integral(lambda t: speed(t) ** 2, end) / end - ((rho(end) - s) / end) ** 2)
    found = means(exact([[MEAN]], [[s]], path, kind))
    # SD's network serves flow times from .028 up, below which there is one step.
    assert found["curvature"] == pytest.approx(expected, rel=1e-2 if path == SD else 3e-3)
    if end == 1:
        assert found["curvature"] == pytest.approx(s * (2 - math.pi / 2), rel=1e-3)


def test_the_number_is_the_same_on_flow_and_trigflow_and_near_it_where_a_path_ends_early() -> None:
    flow, trig, vp, ve = (means(exact([[MEAN]], [[0.6]], path, kind)) for path, kind in [(Flow(), "velocity"), (TrigFlow(), "x0"), *ON_PATHS[3:5]])
    for name, value in flow.items():
        assert trig[name] == pytest.approx(value, abs=1e-9), name
        # noise-to-signal ratios of 152 and 80 at the end
        assert vp[name] == pytest.approx(value, abs=0.02) and ve[name] == pytest.approx(value, abs=0.02), name


def test_times_reach_from_the_noise_end_to_data_and_never_below_what_the_network_serves() -> None:
    times = flow_times(Flow(), 4)
    assert times.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    times = flow_times(SD, 500)
    assert times[0].item() == pytest.approx(0.936, abs=5e-4) and times[-1] == 0 and len(times) == 501
    assert (times[:-1] > times[1:]).all()
    first = torch.tensor([1 / 1000], dtype=torch.float64)
    assert times[-2].item() == pytest.approx((SD.ratio(first) / (1 + SD.ratio(first))).item(), rel=1e-5)


def test_the_line_of_a_path_that_ends_early_goes_through_the_samplers_own_start() -> None:
    noise, _ = design(1)
    measured = follow(exact([[MEAN]], [[0.6]], SD, "eps"), noise, flow_times(SD, 64), {})
    alpha, sigma = SD.coeffs(torch.ones(1, dtype=torch.float64))
    through = (noise - alpha * measured.drawn) / sigma
    torch.testing.assert_close(measured.displacement, (through - measured.drawn).square().sum(1))


def test_a_straight_flow_has_no_curvature_and_one_step_is_its_end() -> None:
    # Of z -> A z along lines: v = (1 - A) ((1 - t) A + t)^-1 x.
    end, eye = torch.tensor([[1.5, 0.4], [0.4, 0.3]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    found = means(Linear(lambda t: (eye - end) @ torch.linalg.inv((1 - t) * end + t * eye)), dim=2, steps=32)
    assert found["displacement"] == pytest.approx((eye - end).square().sum().item() / 2, rel=1e-9)
    assert 0 <= found["curvature"] < 1e-20 and found["one_step"] < 1e-20


def of_spread(spread: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], float, float]:
    """Measured of z -> spread(t) z; the fit error int (a - a*)^2 rho^2 and the residual int (rho^2 - spread^2) spread''/spread, where
    rho is the spread of independent pairs, a* its exact field."""
    s = spread(torch.zeros((), dtype=torch.float64))

    def derivatives(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            t = t.detach().clone().requires_grad_()
            value = spread(t)
            slope = torch.autograd.grad(value.sum(), t, create_graph=True)[0]
            bend = torch.autograd.grad(slope.sum() + 0 * t.sum() ** 2, t)[0]
        return value.detach(), slope.detach(), bend

    def fit(t: Tensor) -> Tensor:
        value, slope, _ = derivatives(t)
        square = (1 - t) ** 2 * s**2 + t**2
        return (slope / value - (t - (1 - t) * s**2) / square) ** 2 * square

    def residual(t: Tensor) -> Tensor:
        value, _, bend = derivatives(t)
        return ((1 - t) ** 2 * s**2 + t**2 - value**2) * bend / value

    def slope(t: Tensor) -> Tensor:
        value, change, _ = derivatives(t)
        return (change / value).reshape(1, 1)

    return means(Linear(slope)), integral(fit), integral(residual)


def test_the_residual_tells_that_a_field_is_wrong_but_is_not_how_wrong() -> None:
    s = 0.3
    best = lambda t: ((1 - t) ** 2 * s**2 + t**2) ** 0.5  # noqa: E731
    line = lambda t: s + (1 - s) * t  # noqa: E731
    found, fit, residual = of_spread(lambda t: s + (1 - s) * t**2)
    assert found["residual"] == pytest.approx(residual, abs=1e-3) and residual > 0.01 and fit > 0.01
    found, fit, residual = of_spread(lambda t: (best(t) + line(t)) / 2)
    assert found["residual"] == pytest.approx(residual, abs=1e-3) and residual < -0.01 and fit > 0.01
    found, fit, residual = of_spread(lambda t: line(t) + 0 * t**3)  # straight: exact for the pairs that it makes itself
    assert found["residual"] == pytest.approx(0, abs=1e-3) and residual == pytest.approx(0, abs=1e-9) and fit > 0.1


def test_of_a_field_that_keeps_the_laws_the_residual_is_twice_the_fit_error() -> None:
    s, turn = 0.6, 0.8
    eye, around = torch.eye(2, dtype=torch.float64), torch.tensor([[0.0, -turn], [turn, 0.0]], dtype=torch.float64)
    square = lambda t: (1 - t) ** 2 * s**2 + t**2  # noqa: E731
    found = means(Linear(lambda t: (t - (1 - t) * s**2) / square(t) * eye + around), dim=2)
    fit = turn**2 * integral(square)  # a dimension
    assert found["residual"] == pytest.approx(2 * fit, rel=2e-3)
    assert found["crossing"] == pytest.approx(s * math.pi / 2 + fit, rel=2e-3)


def test_two_modes_in_two_dimensions() -> None:
    """About .59 a dimension, as a trained toy gave (.593); E||v*||^2 and the monotone map from densities on a line, without following any."""
    mode, s = 2.0, 0.3
    x = torch.linspace(-7, 7, 4001, dtype=torch.float64)
    normal = lambda x, mean, spread: torch.exp(-0.5 * ((x - mean) / spread) ** 2) / spread / math.sqrt(2 * math.pi)  # noqa: E731

    def speed(t: Tensor) -> Tensor:
        spread = ((1 - t) ** 2 * s**2 + t**2) ** 0.5
        parts = [normal(x, (1 - t) * mean, spread) / 2 for mean in (-mode, mode)]
        x0 = sum(part * (mean + (1 - t) * s**2 / spread**2 * (x - (1 - t) * mean)) for part, mean in zip(parts, (-mode, mode), strict=True))
        density = parts[0] + parts[1]
        return torch.trapezoid((x - x0 / density) ** 2 / t**2 * density, x)

    energy = torch.stack([speed(t) for t in (torch.arange(800, dtype=torch.float64) + 0.5) / 800]).mean().item()
    cdf = (torch.special.ndtr((x + mode) / s) + torch.special.ndtr((x - mode) / s)) / 2
    z = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    right = torch.searchsorted(cdf, torch.special.ndtr(z)).clamp(1, len(x) - 1)
    share = (torch.special.ndtr(z) - cdf[right - 1]) / (cdf[right] - cdf[right - 1])
    moved = (z - (x[right - 1] + share * (x[right] - x[right - 1]))).square().mean().item()
    curvature = (energy - moved + s * (2 - math.pi / 2)) / 2
    assert curvature == pytest.approx(0.59, abs=0.005)

    noise = torch.stack([z, z[torch.randperm(4000, generator=torch.Generator().manual_seed(0))]], 1)
    measured = follow(exact([[-mode, 0.0], [mode, 0.0]], [[s, s]] * 2), noise, flow_times(Flow(), 128), {})
    assert measured.curvature.mean().item() / 2 == pytest.approx(curvature, rel=0.005)
    assert measured.displacement.mean().item() / 2 == pytest.approx((moved + (1 - s) ** 2) / 2, rel=0.005)
    assert measured.one_step.mean().item() / 2 == pytest.approx((mode**2 + 2 * s**2) / 2, rel=0.01)


def generator_of(mixture: str = "toy:mixture", **options: Any) -> ImageGenerator:
    return load_teacher(mixture, **options)


def test_a_sample_is_the_same_in_any_batch() -> None:
    options: Any = {"samples": 20, "steps": 6}
    one, many = (straightness(generator_of(), {"": 1.0}, batch=batch, **options) for batch in (20, 7))
    assert vars(one) == pytest.approx(vars(many), rel=1e-5)
    assert straightness(generator_of(), {"": 1.0}, seed=1, **options).straightness != one.straightness


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_standard_errors_are_the_spread_over_seeds(guidance: float) -> None:
    generator, prompts = generator_of(guidance=guidance), {"": 1.0} if guidance == 1 else dict.fromkeys("012", 1 / 3)
    found = [straightness(generator, prompts, samples=100, steps=6, seed=seed, batch=100) for seed in range(60)]
    for name in ("straightness", "crossing", "residual") if guidance == 1 else ("straightness", "one_step"):
        values, errors = (torch.tensor([getattr(each, key) for each in found]) for key in (name, f"{name}_error"))
        assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.35), name


def test_an_exact_field_leaves_no_residual_and_one_step_draws_the_mean() -> None:
    found = straightness(generator_of("toy:ring"), {"": 1.0}, samples=2000, steps=64, batch=500)
    assert found.residual is not None and found.residual_error is not None
    assert abs(found.residual) < 3 * found.residual_error
    assert found.one_step == pytest.approx(1, abs=0.01)


class Counting:
    def __init__(self, predict: Predict) -> None:
        self.predict, self.path, self.calls = predict, predict.path, 0

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        self.calls += 1
        return self.predict(*arguments, **options)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_of_a_pipeline_with_its_guidance(sd3_folder: File, guidance: float) -> None:
    generator = load_teacher(sd3_folder, guidance=guidance, max_sequence_length=16)
    generator.predict = counting = Counting(generator.predict)
    found = straightness(generator, {prompt: 1 / len(PROMPTS) for prompt in PROMPTS}, samples=3, steps=5, batch=3)
    assert found.evaluations == counting.calls == (14 if guidance == 1 else 9)
    assert (found.crossing is None) == (found.residual is None) == (guidance != 1)
    assert found.guidance == guidance and found.noise_end == 1


def test_one_step_is_what_the_sampler_draws_in_one(sd3_folder: File) -> None:
    generator = load_teacher(sd3_folder, guidance=4.0, max_sequence_length=16)
    drawn = generator.latents(PROMPTS, [0, 1, 2], steps=1)
    noise = torch.cat([torch.randn((1, *generator.family.latent.shape), generator=torch.Generator().manual_seed(i)) for i in range(3)])
    measured = follow(generator.predict, noise, flow_times(generator.predict.path, 5), generator.conditioning(PROMPTS))
    torch.testing.assert_close(measured.one_step.float(), (drawn - measured.drawn).flatten(1).square().sum(1), rtol=1e-3, atol=1e-5)


def test_what_is_not_finite_is_said() -> None:
    generator = generator_of()
    generator.predict = Linear(lambda t: torch.full((2, 2), math.nan))
    with pytest.raises(NotFinite, match="trajectories of teacher 'toy:mixture' are not finite"):
        straightness(generator, {"": 1.0}, samples=2, steps=2)


@pytest.mark.parametrize(("name", "value"), [("samples", 1), ("steps", 1), ("steps", 0), ("batch", 0)])
def test_too_few_are_refused(name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"--{name}: {value}; allowed:"):
        straightness(generator_of(), {"": 1.0}, **cast(Any, {name: value}))


def found_with(value: float) -> Straightness:
    one = torch.ones(2, dtype=torch.float64)
    measured = Measured(torch.tensor([[1.0], [-1.0]]), value * one, one, 0.5 * one, None, None)
    return summary(measured, noise_end=1.0, guidance=2.0, steps=3)


def test_the_sentence_changes_at_its_thresholds() -> None:
    told = [verdict(found_with(value)) for value in (0, STRAIGHT * 0.99, STRAIGHT, CURVED * 0.99, CURVED, 5)]
    assert [sentence.partition(":")[0] for sentence in told] == ["almost straight"] * 2 + ["slightly curved"] * 2 + ["curved"] * 2
    assert all("off by 25% of the samples' variance" in sentence for sentence in told[2:])


def test_samples_that_are_all_one_have_no_variance_to_compare_with() -> None:
    one = torch.ones(2, dtype=torch.float64)
    found = summary(Measured(torch.zeros(2, 3), 0 * one, one, one, None, None), noise_end=1.0, guidance=2.0, steps=2)
    assert found.one_step == math.inf and found.straightness == 0


def test_the_command_says_it_for_people_and_for_programs(capfd: pytest.CaptureFixture[str]) -> None:
    asked = ["straightness", "toy:mixture", "--samples", "30", "--steps", "8", "--seed", "3", "--batch", "7"]
    assert cli.main([*asked, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    expected = straightness(generator_of(), {"": 1.0}, samples=30, steps=8, seed=3)
    assert told.pop("model") == "toy:mixture" and told.pop("verdict") == verdict(expected)
    assert told == pytest.approx(vars(expected), rel=1e-5)
    assert cli.main(asked) == 0
    out, err = capfd.readouterr()
    assert f"straightness  {expected.straightness:8.4f}" in out and "residual" in out and out.splitlines()[-1] == verdict(expected)
    assert "following the flow: 30 of 30" in err


def test_the_command_with_guidance_and_prompts(tmp_path: File, capfd: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "components.txt"
    prompts.write_text("0\n1\n2\n", encoding="utf-8")
    asked = ["straightness", "toy:mixture", "--guidance", "2", "--prompts", str(prompts), "--samples", "20", "--steps", "4"]
    assert cli.main([*asked, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    expected = straightness(generator_of(guidance=2.0), dict.fromkeys("012", 1 / 3), samples=20, steps=4)
    assert told["straightness"] == pytest.approx(expected.straightness, rel=1e-5) and told["crossing"] is None
    assert cli.main(asked) == 0
    assert "left out: with guidance" in capfd.readouterr().out


def test_the_command_of_a_student_uses_its_own_call(capfd: pytest.CaptureFixture[str]) -> None:
    folder = File(cli.__file__).parent / "assets" / "digits"
    asked = ["--samples", "4", "--steps", "3", "--prompts", "fastgen:digits", "--json"]
    assert cli.main(["straightness", str(folder), *asked]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["guidance"] == 1.5 and "made by flow_matching" in err
    assert cli.main(["straightness", "fastgen:digits", *asked]) == 0
    assert json.loads(capfd.readouterr().out)["straightness"] == pytest.approx(json.loads(out)["straightness"], rel=1e-5)


REFUSED = {
    "toy:rin": "TEACHER: no closed-form teacher 'toy:rin'; did you mean 'ring'?",
    "fastgen:digit": "TEACHER: no bundled teacher 'digit'; did you mean 'digits'?",
    "nowhere --prompts fastgen:digits": "TEACHER: no folder 'nowhere'",
    "nowhere": "TEACHER: no folder 'nowhere'",
    "ASSETS/digits": "--prompts: missing",
    "toy:ring --prompts none.txt": "--prompts: no file",
    "toy:ring --prompts fastgen:digits": "a closed-form teacher's prompt is",
    "toy:ring --guidance 2": "--prompts: missing: a file with a component's number a line",
    "toy:ring --guidance 0.5": "--guidance: 0.5 is not a number from 1",
    "toy:ring --guidance nan": "--guidance: nan is not a number from 1",
    "toy:ring --steps 0": "'--steps'",
    "toy:ring --samples 1": "'--samples'",
    "toy:ring --device tpu": "--device",
    "toy:ring --teacher x": "--teacher: says where an adapter's teacher is",
    "ASSETS/digits --prompts fastgen:digits --guidance 2": "--guidance: does not apply to an exported student",
}


@pytest.mark.parametrize("asked", REFUSED)
def test_the_command_refuses(asked: str, capfd: pytest.CaptureFixture[str], tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = asked.replace("ASSETS", str(File(cli.__file__).parent / "assets")).split()
    assert cli.main(["straightness", *words]) == 2
    out, err = capfd.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("error: ") and REFUSED[asked] in last


def test_the_command_refuses_a_student_of_its_own_times_alone(tmp_path: File, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((File(cli.__file__).parent / "assets" / "digits" / "fastgen.json").read_text(encoding="utf-8"))
    text = json.dumps(manifest | {SEAL: None, "own_steps_only": True})
    (tmp_path / "fastgen.json").write_text(text, encoding="utf-8")
    assert cli.main(["straightness", str(tmp_path), "--prompts", "fastgen:digits"]) == 2
    assert "serves its own 25 steps alone, so it has no flow to follow" in capfd.readouterr().err
