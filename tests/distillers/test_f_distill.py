"""f-distill's factor for each sample: which ratio it sees, how it is normalised, and that it makes the divergence's own gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from matching_cases import affine_network, batch_of, double, draws, gaussian_network
from safetensors.torch import load_file
from test_dmd2 import disturb
from test_gan import disturb_heads
from torch import Tensor
from torch.distributions import Normal
from toy_runs import normal, optimizer_block, rng, toy_method, toy_roles, toy_setting, toy_trainer, weights

from fastgen import checkpoint
from fastgen.config import validate
from fastgen.distillers.base import Facts
from fastgen.distillers.divergences import Name
from fastgen.distillers.dmd2 import DMD2
from fastgen.distillers.f_distill import FDistill, FDistillConfig
from fastgen.distillers.matching import Matched
from fastgen.distillers.rollout import Sample
from fastgen.errors import UserError
from fastgen.families.toy import Mixture, Toy
from fastgen.path import Flow, VarianceExploding
from fastgen.path import Path as NoisePath
from fastgen.trainer import Trainer

NAMES = get_args(Name)
# r^2 f''(r), from the table of the paper
H: dict[str, Any] = {
    "reverse_kl": lambda r: 1.0,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "js": lambda r: r / (1 + r),
    "squared_hellinger": lambda r: r**0.5 / 4,
    "forward_kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "neyman_chi2": lambda r: 2 / r,
    "pearson_chi2": lambda r: 2 * r**2,
}


class Judge:
    """A discriminator whose logits are given by a function of (x, t)."""

    def __init__(self, logits: Any) -> None:
        self.given = logits

    def logits(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.given(x, t)


def f_distill(divergence: str, *, path: NoisePath | None = None, **keys: Any) -> Any:
    return toy_method(FDistill, toy_setting(Toy("toy:mixture", path=path), grid=[0.7]), divergence=divergence, **keys)


def factors(method: Any, logits: Tensor, t: Tensor, step: int = 0) -> list[float]:
    """The factors of samples with these logits (B, num_taps) at path times t (B,)."""
    x = torch.zeros(len(t), 2, dtype=torch.float64)
    matched, sample = Matched(x, t, t, x, t), Sample(x, x, t[0])
    return method.factors({"discriminator": Judge(lambda x, t: logits)}, batch_of(len(t)), sample, matched, step).tolist()


def by_hand(divergence: str, history: list[tuple[Tensor, Tensor]], decay: float, end: float) -> list[float]:
    """Factors of the last of several steps, sample by sample, from the whole history: means are over the steps before, of which the nth last
    weighs decay^n, and the sample itself."""
    steps = []
    for logits, t in history:
        ratios = [min(max(2.718281828459045 ** min(max(sum(row) / len(row), -10), 10), 0.1), 20) for row in logits.tolist()]
        steps.append([(r, min(int(10 * time / end), 9)) for r, time in zip(ratios, t.tolist(), strict=True)])

    def mean(seen: list[list[float]], own: float) -> float:
        weight = [decay ** (len(seen) - 1 - i) for i in range(len(seen))]
        number = sum(w * len(v) for w, v in zip(weight, seen, strict=True))
        return (sum(w * sum(values) for w, values in zip(weight, seen, strict=True)) + own) / (number + 1)

    normalised = []
    for i, present in enumerate(steps):
        past = steps[:i]
        normalised.append([H[divergence](r / mean([[q for q, other in earlier if other == place] for earlier in past], r)) for r, place in present])
    return [h / mean(normalised[:-1], h) for h in normalised[-1]]


@pytest.mark.parametrize("decay", [0.0, 0.6])
@pytest.mark.parametrize("divergence", NAMES)
def test_factors_over_three_steps_by_hand(divergence: str, decay: float) -> None:
    """Bins of a tenth of the range, on VE of its 80; logits far beyond the limits of the ratio among them, and bins that stay empty."""
    for path, end in ((Flow(), 1.0), (VarianceExploding(), 80.0)):
        method, history = f_distill(divergence, path=path, ratio_decay=decay), []
        for step in range(3):
            t = end * double(0.0, 0.05, 0.31, 0.399, 0.42, 0.99, 1.0, 0.33 + 0.2 * step)
            history.append((4 * normal(8, 2, seed=step) + step, t))
            logits = history[-1][0]
            assert factors(method, logits, t, step) == pytest.approx(by_hand(divergence, history, decay, end), rel=1e-9)


@pytest.mark.parametrize("divergence", NAMES)
def test_factors_are_1_on_average_once_the_ratios_are_known(divergence: str) -> None:
    """The same batch again and again: the second step has its means of r, the third also those of h; the first knows nothing."""
    method = f_distill(divergence, ratio_decay=0)
    logits, t = 0.5 * normal(20_000, 3, seed=1) - 0.5, torch.rand(20_000, generator=torch.Generator().manual_seed(1)).double()
    first, _, third = (factors(method, logits, t, step) for step in range(3))
    assert first == pytest.approx([1.0] * len(first))
    assert sum(third) / len(third) == pytest.approx(1, abs=2e-3)
    assert (max(third) - min(third) > 0.1) == (divergence != "reverse_kl")


def test_covering_divergences_count_what_the_student_lacks() -> None:
    """A sample that passes for real is where the teacher has more mass: it weighs more for those that cover, less for those that seek."""
    for divergence in NAMES:
        method = f_distill(divergence)
        logits, t = double([1.0], [-1.0]), double(0.5, 0.5)
        factors(method, logits, t)
        lacking, plenty = factors(method, logits, t, step=1)
        covers = divergence in ("js", "squared_hellinger", "forward_kl", "jeffreys", "pearson_chi2")
        assert (lacking > plenty + 1e-9) == covers
        assert (lacking == pytest.approx(plenty)) == (divergence == "reverse_kl")


@pytest.mark.parametrize("divergence", NAMES)
def test_the_gradient_is_that_of_the_divergence(divergence: str) -> None:
    """With the exact ratio and the exact weight: -E[h(r) alpha (s_p - s_q) dx/d(m, s)]/E[h(r)], by quadrature over x_t.

    Teacher N(.4, .5^2), student N(0, .6^2) with samples m + s z; the quadrature of the method is over 150 x 150 quantiles of (z, eps).
    """
    t, mean, deviation = 0.5, 0.4, 0.5
    quantiles = torch.special.ndtri((torch.arange(150, dtype=torch.float64) + 0.5) / 150)
    quantiles = quantiles / quantiles.square().mean().sqrt()
    z, eps = quantiles.repeat_interleave(150)[:, None], quantiles.repeat(150)[:, None]
    a, b = double([0.6]).requires_grad_(), double(0.0).requires_grad_()
    real, fake = (Normal((1 - t) * m, ((1 - t) ** 2 * s**2 + t**2) ** 0.5) for m, s in ((mean, deviation), (0.0, 0.6)))
    models: dict[str, Any] = {
        "student": affine_network(Flow(), "velocity", a, b, 1.0),
        "fake_score": gaussian_network(Flow(), "velocity", double(fake.loc.item()), double([fake.scale.item() ** 2])),
        "teacher": gaussian_network(Flow(), "velocity", double(real.loc.item()), double([real.scale.item() ** 2])),
        "discriminator": Judge(lambda x, t: real.log_prob(x) - fake.log_prob(x)),
    }
    family = Toy(Mixture([1.0], [[0.0]], [[1.0]]))
    config: dict[str, Any] = {"weight": "kl", "match_times": {"lo": t, "hi": t}, "gan": {"start": 9}, "ratio_decay": 0}
    method: Any = toy_method(FDistill, toy_setting(family, grid=[0.9]), divergence=divergence, **config)
    for step in range(3):  # the means are those of the steps before
        value = method.match(models, batch_of(len(z)), draws({"noise": z, "match_noise": eps}), step).value
    got = [gradient.item() for gradient in torch.autograd.grad(value, [b, a])]

    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    q, h = fake.log_prob(x).exp(), H[divergence]((real.log_prob(x) - fake.log_prob(x)).exp()) * torch.ones_like(x)
    pull = -q * h * (1 - t) * ((real.loc - x) / real.scale**2 - (fake.loc - x) / fake.scale**2)
    given = 0.6 * (1 - t) * (x - fake.loc) / fake.scale**2  # E[z | x_t]
    want = [(pull.sum() / (q * h).sum()).item(), ((pull * given).sum() / (q * h).sum()).item()]
    assert got == pytest.approx(want, rel=2e-2)


def test_reverse_kl_is_dmd2() -> None:
    family = Toy("toy:mixture")
    setting = toy_setting(family, grid=(0.9, 0.5))
    ours: Any = toy_method(FDistill, setting, divergence="reverse_kl")
    theirs: Any = toy_method(DMD2, setting, gan={})
    roles = toy_roles(ours, family)
    disturb(roles, "student", "fake_score")
    disturb_heads(roles)
    own = list(roles["student"].parameters().values())
    for step in range(3):
        losses = [method.match(roles.predictors(), batch_of(6), rng(6, step), step).value for method in (ours, theirs)]
        torch.testing.assert_close(*losses)  # its weights are 1, by way of logarithms
        for a, b in zip(*(torch.autograd.grad(loss, own) for loss in losses), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("divergence", NAMES)
def test_an_untrained_discriminator_leaves_dmd2(divergence: str) -> None:
    family = Toy("toy:mixture")
    setting = toy_setting(family, grid=[0.7])
    ours: Any = toy_method(FDistill, setting, divergence=divergence)
    roles = toy_roles(ours, family)
    disturb(roles, "fake_score")
    theirs: Any = toy_method(DMD2, setting, gan={})
    for step in range(4):
        if step == 2:
            disturb_heads(roles)
        losses = [method.match(roles.predictors(), batch_of(6), rng(6, step), step).value.item() for method in (ours, theirs)]
        same = step < 2 or divergence == "reverse_kl"
        assert (abs(losses[0] / losses[1] - 1) <= 1e-6) == same


@pytest.mark.parametrize("features", ["teacher", "fake_score"])
def test_each_samples_gradient_gets_its_factor_without_a_gradient_in_the_discriminator(features: Any) -> None:
    family = Toy("toy:mixture")
    setting, config = toy_setting(family, grid=[0.7]), {"gan": {"features": features, "start": 9}}
    ours: Any = toy_method(FDistill, setting, divergence="js", **config)
    theirs: Any = toy_method(DMD2, setting, **config)
    roles = toy_roles(ours, family, dtype=torch.float64)
    disturb(roles, "fake_score")
    disturb_heads(roles)
    shift = torch.zeros(6, 2, dtype=torch.float64, requires_grad=True)
    models: dict[str, Any] = dict(roles.predictors())
    student = models["student"]
    models["student"] = lambda x, t, cond: student(x, t, cond) + shift  # a sample of its own for every row
    models["student"].path = Flow()
    ours.match(models, batch_of(6), rng(6), 0)  # the second step has means of the first
    g = [torch.autograd.grad(method.match(models, batch_of(6), rng(6), 1).value, shift)[0] for method in (ours, theirs)]
    ratio = g[0] / g[1]
    torch.testing.assert_close(ratio[:, 0], ratio[:, 1])
    t = 0.02 + 0.96 * rng(6).uniform("match_time")
    with torch.no_grad():
        noised = (1 - t)[:, None] * student(rng(6).normal("noise", (2,)), torch.full((6,), 0.7), batch_of(6).cond) + t[:, None] * rng(6).normal(
            "match_noise", (2,)
        )
        logits = roles["discriminator" if features == "teacher" else "fake_score"].predictor.logits(noised, t, batch_of(6).cond)
    torch.testing.assert_close(ratio[:, 0], double(*by_hand("js", 2 * [(logits, t)], 0.9, 1.0)), rtol=1e-4, atol=1e-6)
    assert ratio[:, 0].std() > 1e-4  # fp32 rounding is 1e-7
    assert all(parameter.grad is None for role in roles.values() for parameter in role.denoiser.parameters())


def run(**options: Any) -> Trainer:
    family = Toy("toy:mixture", width=16)
    method = toy_method(FDistill, toy_setting(family, grid=[0.7]), critic_updates=2, gan={"weight": 0.1})
    latents = family.mixture.sample(40, torch.Generator().manual_seed(0)).float()
    return toy_trainer(method, family, latents=latents, **{"steps": 6, "optimizers": optimizer_block(lr=1e-2), **options})


def test_a_resumed_run_goes_on_with_the_running_means(tmp_path: Path) -> None:
    """Bit for bit; without them it would not."""
    whole = run()
    whole.run([], should_stop=lambda: whole.step == 3)
    folder = checkpoint.save(tmp_path, whole, {}, keep=1)
    saved = load_file(folder / "statistics.safetensors")
    assert saved.keys() == {"ratio", "h"}
    sums, counts, last, number, step = saved["h"].flatten().tolist()  # of two steps of 8 samples; of the third
    assert (saved["ratio"].shape, step) == ((5, 10), 2)
    assert [math.exp(n) for n in (counts, number)] == pytest.approx([8 * (1 + 0.9), 8])
    assert math.isfinite(sums) and math.isfinite(last)
    ends = []
    for forget in (False, True):
        resumed = run()
        checkpoint.load(folder, resumed)
        assert all(torch.equal(value, saved[name]) for name, value in resumed.distiller.statistics.items())
        if forget:
            for value in resumed.distiller.statistics.values():
                value.fill_(-torch.inf)
        resumed.run([])
        ends.append(weights(resumed))
    whole.run([])
    assert all(torch.equal(ends[0][key], value) for key, value in weights(whole).items())
    assert any(not torch.equal(ends[1][key], value) for key, value in weights(whole).items())


def test_micro_batches_do_not_change_the_weights() -> None:
    # Plain SGD: Adam's first steps have one size for every gradient, also for one that is rounding alone.
    sgd = optimizer_block(name="sgd", lr=0.1, betas=(0.0, 0.0))
    whole, *split = (run(micro_batch=size, optimizers=sgd) for size in (8, 4, 1))
    start = weights(whole)
    for trainer in (whole, *split):
        trainer.run([])
    for trainer in split:
        for key, value in weights(trainer).items():
            torch.testing.assert_close(value, weights(whole)[key], rtol=1e-4, atol=1e-5)
    assert max(float((value - start[key]).abs().max()) for key, value in weights(whole).items()) > 1e-2


def test_statistics_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, run(), {}, keep=1)
    other = run()
    other.distiller.statistics["ratio"] = torch.zeros(2, 5, dtype=torch.float64)
    with pytest.raises(UserError, match="statistics of the method do not match"):
        checkpoint.load(folder, other)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"gan": None},
            "recipe key distiller.gan: null, but divergence js needs the ratio that a discriminator estimates",
        ),
        (
            {"divergence": "renyi"},
            "recipe key distiller.divergence: Input should be 'reverse_kl', 'softened_reverse_kl', 'js', 'squared_hellinger', 'forward_kl', "
            "'jeffreys', 'neyman_chi2' or 'pearson_chi2' (given: 'renyi')",
        ),
        ({"ratio_decay": 1}, "recipe key distiller.ratio_decay: Input should be less than 1 (given: 1)"),
    ],
)
def test_mistakes_in_the_config_name_the_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        FDistill.check(validate(FDistillConfig, {"name": "f_distill", **keys}, "distiller"), Facts(1, 1.0, (1.0,), 1.0))
    assert str(caught.value) == message


def test_reverse_kl_does_without_a_discriminator() -> None:
    config = validate(FDistillConfig, {"name": "f_distill", "divergence": "reverse_kl", "gan": None}, "distiller")
    FDistill.check(config, Facts(1, 1.0, (1.0,), 1.0))
    assert FDistill.roles_for(config).keys() == {"student", "fake_score", "teacher"}
    assert (FDistill.needs_latents(config), FDistill.needs_latents(FDistillConfig(name="f_distill"))) == (False, True)
