"""Noise-sample pairs: the closed form's own ODE map on every path, the guided teacher's own sampler, and pair i a function of i alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pair_sets import samples_of, seeds_of
from torch import Tensor
from toy_runs import MEAN, VARIANCE

from fastgen.data.pairs import Pairs, Solver, TeacherSampler, make_pairs, noise_seeds
from fastgen.denoiser import Denoiser, Predictor
from fastgen.errors import TrainingFailed
from fastgen.families.toy import Toy
from fastgen.generator import load_teacher, noise_from_seeds
from fastgen.path import Flow, Path, TrigFlow, VarianceExploding, VariancePreserving
from fastgen.sampling import Predict

GAUSSIAN = {"": 1.0}
WEIGHTED = {"0": 0.2, "1": 0.0, "2": 0.5, "": 0.3}


def karras(count: int) -> Tensor:
    """Times for VE, whose range is wide (Karras et al. 2022, eq. 5)."""
    return (80 ** (1 / 7) + torch.arange(count) / (count - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7


def predictor(family: Toy) -> Predictor:
    return Predictor(Denoiser(family.load_backbone(), family), family)


def sampler(family: Toy, times: Tensor | int, *, predict: Predict | None = None, solver: Solver = "euler") -> TeacherSampler:
    times = family.grid(times) if isinstance(times, int) else times
    return TeacherSampler(predict or predictor(family), times.double(), family.latent.shape, solver)


def made(family: Toy, teacher: TeacherSampler, ids: range, prompts: dict[str, float] | None = None, **options: Any) -> Pairs:
    return make_pairs(teacher, family.encode_prompts, prompts or GAUSSIAN, ids, **{"seed": 3, **options})


def gaussian_map(path: Path, noise: Tensor, start: Tensor) -> Tensor:
    """Where the probability-flow ODE leads from unit noise (B, 2): it keeps (x - alpha m) / std of toy:gaussian."""
    alpha, sigma = path.coeffs(start)
    x = noise.double() * path.prior_scale(start)
    return MEAN + (VARIANCE / (alpha**2 * VARIANCE + sigma**2)).sqrt() * (x - alpha * MEAN)


@pytest.mark.parametrize("path", [Flow(), TrigFlow(), VariancePreserving(), VarianceExploding()], ids=lambda path: type(path).__name__)
def test_a_pair_is_the_ode_map_of_its_noise(path: Path) -> None:
    family = Toy("toy:gaussian", path=path, kind="x0")
    errors = {}
    runs: list[tuple[int, Solver]] = [(40, "euler"), (40, "heun"), (80, "heun")]
    for count, solver in runs:
        teacher = sampler(family, karras(count) if isinstance(path, VarianceExploding) else count, solver=solver)
        pairs = made(family, teacher, range(50))
        exact = gaussian_map(path, pairs.select(torch.arange(50))[0], teacher.times[0])
        errors[count, solver] = (samples_of(pairs) - exact).square().mean().sqrt().item()
    assert samples_of(pairs).dtype == torch.float32
    assert errors[40, "heun"] < 0.5 * errors[40, "euler"] < 0.05
    assert errors[80, "heun"] < min(0.4 * errors[40, "heun"], 0.01)  # order 2


@pytest.mark.parametrize("path", [Flow(), TrigFlow(), VariancePreserving(), VarianceExploding()], ids=lambda path: type(path).__name__)
def test_backwards_leads_from_samples_to_their_noise(path: Path) -> None:
    """The closed form's own map, the other way round; there and back again is where it began."""
    family = Toy("toy:gaussian", path=path, kind="x0")
    noise, errors = torch.randn(50, 2, generator=torch.Generator().manual_seed(1)), {}
    runs: list[tuple[int, Solver]] = [(40, "euler"), (40, "heun"), (160, "heun")]
    for count, solver in runs:
        teacher = sampler(family, karras(count) if isinstance(path, VarianceExploding) else count, solver=solver)
        found = teacher.backwards(gaussian_map(path, noise, teacher.times[0]).float(), family.encode_prompts([""] * 50))
        errors[count, solver] = (found - noise).square().mean().sqrt().item()
    assert errors[40, "heun"] < 0.5 * errors[40, "euler"] < 0.2
    assert errors[160, "heun"] < 0.01


def test_no_two_pairs_have_the_same_noise() -> None:
    # torch's CPU generator takes the lower 32 bits of a seed, so seeds that differ above them draw the same noise.
    assert torch.equal(noise_from_seeds([5], (4,)), noise_from_seeds([5 + 2**32], (4,)))
    for seed in (0, 3, 2**40):
        seeds = noise_seeds(seed, range(300_000))
        assert len({s % 2**32 for s in seeds}) == len(seeds)
        assert noise_seeds(seed, range(100, 120)) == seeds[100:120]
    assert not set(noise_seeds(0, range(10_000))) & set(noise_seeds(1, range(10_000)))


def test_heun_and_euler_cost_what_they_say() -> None:
    family = Toy("toy:gaussian")
    calls: list[float] = []
    inner = predictor(family)

    class Counting(Predictor):
        def __call__(self, x: Tensor, t: Tensor, *rest: Any, **options: Any) -> Tensor:
            calls.append(t[0].item())
            assert not torch.is_grad_enabled()
            return inner(x, t, *rest, **options)

    predict = Counting(inner.denoiser, family)
    made(family, sampler(family, 4, predict=predict), range(2))
    assert calls == [1.0, 0.75, 0.5, 0.25]
    calls.clear()
    made(family, sampler(family, 4, predict=predict, solver="heun"), range(2))
    assert calls == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


def test_euler_pairs_are_the_teachers_own_samples_guidance_included() -> None:
    teacher = load_teacher("toy:mixture", steps=6, guidance=2.5, negative_prompt="1")
    family: Any = teacher.family
    pairs = made(family, TeacherSampler(teacher.predict, teacher.times(), family.latent.shape), range(20), WEIGHTED)
    torch.testing.assert_close(samples_of(pairs), teacher.latents(pairs.prompts, seeds_of(pairs).tolist()), rtol=0, atol=1e-6)
    predict, x = predictor(family), pairs.select(torch.arange(20))[0]
    cond, negative = family.encode_prompts(pairs.prompts), family.encode_prompts(["1"] * 20)
    with torch.no_grad():  # an Euler step of the guided velocity, written out
        for t, t_next in zip(torch.linspace(1, 1 / 6, 6), torch.linspace(5 / 6, 0, 6), strict=True):
            given, without = (predict(x, t.expand(20), c, "velocity") for c in (cond, negative))
            x = x + (t_next - t) * (without + 2.5 * (given - without))
    torch.testing.assert_close(samples_of(pairs), x, rtol=0, atol=2e-5)


def test_fewer_pairs_are_the_first_of_more_in_any_batches() -> None:
    family = Toy("toy:mixture")
    teacher = sampler(family, 3)
    many = made(family, teacher, range(37), WEIGHTED, batch=37)
    few = made(family, teacher, range(10), WEIGHTED, batch=4)
    rest = made(family, teacher, range(10, 37), WEIGHTED, batch=5)
    assert len(few) == len(many.first(10)) == 10
    assert torch.equal(torch.cat([seeds_of(few), seeds_of(rest)]), seeds_of(many))
    assert few.prompts + rest.prompts == many.prompts
    torch.testing.assert_close(torch.cat([samples_of(few), samples_of(rest)]), samples_of(many), rtol=0, atol=1e-6)
    assert torch.equal(samples_of(many.first(10)), samples_of(many)[:10])


def test_pairs_differ_among_each_other_and_between_seeds() -> None:
    family = Toy("toy:mixture")
    one, other = (made(family, sampler(family, 2), range(200), WEIGHTED, seed=seed) for seed in (3, 4))
    assert len(set(seeds_of(one).tolist()) | set(seeds_of(other).tolist())) == 400
    assert one.prompts != other.prompts
    assert len(samples_of(one).unique(dim=0)) == 200


def test_prompts_are_drawn_with_their_weights() -> None:
    family = Toy("toy:mixture")
    pairs = made(family, sampler(family, 1), range(3000), WEIGHTED, batch=3000)
    shares = {prompt: pairs.prompts.count(prompt) / 3000 for prompt in WEIGHTED}
    assert shares["1"] == 0
    assert shares == pytest.approx(WEIGHTED, abs=0.03)


def test_each_pair_is_conditioned_on_its_own_prompt() -> None:
    family = Toy("toy:mixture")
    pairs = made(family, sampler(family, 60, solver="heun"), range(150), {"0": 0.5, "2": 0.5})
    for prompt, component in (("0", 0), ("2", 2)):
        rows = torch.tensor([i for i, given in enumerate(pairs.prompts) if given == prompt])
        mixture = family.mixture
        # A component is a Gaussian: its own map, mean + std noise, from t = 1 on Flow.
        exact = mixture.means[component] + mixture.variances[component].sqrt() * pairs.select(rows)[0]
        assert (samples_of(pairs)[rows] - exact).abs().max() < 0.02


def test_a_teacher_that_breaks_is_noticed() -> None:
    family = Toy("toy:gaussian")
    backbone: Any = family.load_backbone()
    torch.nn.init.constant_(backbone.out.bias, torch.nan)
    broken = Predictor(Denoiser(backbone, family), family)
    with pytest.raises(TrainingFailed, match="samples of pairs 2 to 3 are not finite"):
        made(family, sampler(family, 1, predict=broken), range(2, 9), batch=2)


def test_the_conditioning_goes_to_the_samplers_device() -> None:
    """Encoders answer on the CPU; the teacher may be elsewhere. `meta` stands for it."""
    family, devices = Toy("toy:gaussian"), list[str]()

    class There:
        path = Flow()

        def __call__(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], *rest: Any) -> Tensor:
            devices.extend(tensor.device.type for tensor in (x, t, *cond.values()))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        make_pairs(TeacherSampler(There(), torch.ones(1, device="meta"), (2,)), family.encode_prompts, GAUSSIAN, range(2), seed=0)  # type: ignore[arg-type]
    assert devices == ["meta"] * 3
