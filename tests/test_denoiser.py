from __future__ import annotations

from itertools import product

import oracle
import pytest
import torch
from torch import Tensor, nn

from fastgen.conditioning import Conditioning, select
from fastgen.denoiser import Denoiser, Predictor, guided
from fastgen.families.toy import Mixture, Toy
from fastgen.guidance import linear
from fastgen.path import KINDS, Flow, Kind, Path, TrigFlow, VarianceExploding, VariancePreserving
from fastgen.surgery.heads import Heads

PATHS: list[Path] = [Flow(), TrigFlow(), VariancePreserving(), VarianceExploding()]
WEIGHTS, MEANS, VARIANCES = [0.3, 0.5, 0.2], [[-1.0, 0.0], [0.8, 0.6], [0.4, -1.0]], [[0.09, 0.04], [0.06, 0.12], [0.05, 0.05]]
CLOSED_FORM = (
    torch.tensor(WEIGHTS, dtype=torch.float64),
    torch.tensor(MEANS, dtype=torch.float64),
    torch.diag_embed(torch.tensor(VARIANCES, dtype=torch.float64)),
)
# Equal covariances: guidance then shifts the mean and nothing else.
SHARED_VARIANCE = [0.3, 0.1]
PAIR = Mixture([0.5, 0.5], [[0.9, -0.2], [0.1, 0.4]], [SHARED_VARIANCE] * 2)


def predictor(source: Mixture | str = "toy:mixture", *, path: Path | None = None, kind: Kind = "velocity", trained: bool = False) -> Predictor:
    """Over a float64 network; `trained`: its residual is switched on, so that it is no longer the exact one."""
    family = Toy(source, path=path, kind=kind)
    backbone = family.load_backbone().double()
    if trained:
        nn.init.normal_(backbone.out.weight, std=0.1, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr, arg-type]
    return Predictor(Denoiser(backbone, family), family)


def schedule_of(path: Path) -> oracle.Schedule:
    return oracle.SCHEDULES[type(path).__name__]


def samples(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(path: Path, count: int = 6) -> Tensor:
    if isinstance(path, VarianceExploding):
        return torch.logspace(-1, 1.5, count, dtype=torch.float64)
    return torch.linspace(0.1, 0.85, count, dtype=torch.float64) * path.t_max


def noised(path: Path, t: Tensor) -> Tensor:
    return schedule_of(path).noisy(samples(len(t)), samples(len(t), seed=1), t)


def relative_error(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    return ((value - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("own", KINDS)
def test_every_kind_of_the_exact_network(own: Kind, path: Path) -> None:
    predict, t = predictor(path=path, kind=own), times(path)
    assert (predict.path, predict.kind) == (path, own)
    x = noised(path, t)
    for kind in KINDS:
        expected = oracle.mixture_prediction(kind, x, t, schedule_of(path), *CLOSED_FORM)
        assert relative_error(predict(x, t, {}, kind), expected) <= 1e-10
    raw = predict.denoiser(x, t, {}).prediction
    assert relative_error(raw, oracle.mixture_prediction(own, x, t, schedule_of(path), *CLOSED_FORM)) <= 1e-10


def test_conditioning_picks_a_component() -> None:
    predict, t = predictor(), times(Flow())
    x = noised(Flow(), t)
    cond = predict.family.encode_prompts(["0", "1", "2", "2", "1", "0"])
    weights, means, covariances = CLOSED_FORM
    for i, component in enumerate([0, 1, 2, 2, 1, 0]):
        row = slice(i, i + 1)
        expected = oracle.gaussian_posterior_mean(x[row], t[row], oracle.SCHEDULES["Flow"], means[component], covariances[component])
        assert relative_error(predict(x, t, cond)[row], expected) <= 1e-10
    mixed = predict(x, t, predict.family.encode_prompts([""] * 6))
    assert relative_error(mixed, oracle.mixture_posterior_mean(x, t, oracle.SCHEDULES["Flow"], weights, means, covariances)) <= 1e-10


@pytest.mark.parametrize(("own", "asked"), [*product(PATHS, PATHS)], ids=lambda p: type(p).__name__)
def test_predictions_on_another_path(own: Path, asked: Path) -> None:
    t = times(asked)
    x = noised(asked, t)
    for network_kind in KINDS:
        predict = predictor(path=own, kind=network_kind)
        for kind in KINDS:
            expected = oracle.mixture_prediction(kind, x, t, schedule_of(asked), *CLOSED_FORM)
            assert relative_error(predict(x, t, {}, kind, asked), expected) <= 1e-10


@pytest.mark.parametrize("kind", ["eps", "x0"])
@pytest.mark.parametrize("own", [VarianceExploding(), VariancePreserving()], ids=["EDM", "VP"])
def test_posterior_means_of_edm_and_vp_teachers_on_the_rectified_flow(own: Path, kind: Kind) -> None:
    """What reflow asks of such a teacher, and RF++ begins with: E[x0 | x_t] and the velocity E[eps - x0 | x_t] of the Flow, from the network of
    another path at the same ratio of noise to signal."""
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    x, predict = noised(Flow(), t), predictor(path=own, kind=kind)
    asked: tuple[Kind, Kind] = ("x0", "velocity")
    for what in asked:
        expected = oracle.mixture_prediction(what, x, t, oracle.SCHEDULES["Flow"], *CLOSED_FORM)
        assert relative_error(predict(x, t, {}, what, Flow()), expected) <= 1e-12


def test_another_path_at_pure_noise() -> None:
    x, end = samples(3), torch.full((3,), TrigFlow().t_max, dtype=torch.float64)
    flow = predictor()(x, torch.ones(3, dtype=torch.float64), {})
    assert torch.equal(predictor()(x, end, {}, "x0", TrigFlow()), flow)
    weights, means, _ = CLOSED_FORM
    assert relative_error(flow, (weights @ means).expand(3, 2)) <= 1e-12
    with pytest.raises(ValueError, match="does not reach the noise level"):
        predictor(path=VariancePreserving())(x, end, {}, "x0", TrigFlow())


def test_gradients_of_predictions() -> None:
    path = TrigFlow()
    t = torch.tensor([0.4, 1.1], dtype=torch.float64)
    predict = predictor(trained=True)
    for kind, other in product(KINDS, (None, path)):
        at = t if other else t / 2
        x = noised(other or Flow(), at).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, at=at, call=(kind, other): predict(x, at, {}, *call), (x,))
    # The gradient in the parameters: the Jacobian of x0 = x - t u is -t.
    x, at = noised(Flow(), t / 2), t / 2
    bias = predict.denoiser.backbone.out.bias  # type: ignore[attr-defined]
    (gradient,) = torch.autograd.grad(predict(x, at, {})[:, 0].sum(), bias)
    assert gradient.tolist() == pytest.approx([-at.sum().item(), 0])


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_formula(kind: Kind) -> None:
    predict, t = predictor(trained=True), times(Flow())
    x = noised(Flow(), t)
    cond = predict.family.encode_prompts(list("012012"))
    negative = predict.family.encode_prompts([""])
    conditional = predict(x, t, cond, kind)
    unconditional = predict(x, t, {"component": torch.full((6,), -1)}, kind)
    for scale in (0.0, 1.5, 7.0):
        value = guided(predict, scale, negative)(x, t, cond, kind)
        assert relative_error(value, unconditional + scale * (conditional - unconditional)) <= 1e-14
    assert relative_error(guided(predict, 0.0, negative)(x, t, cond, kind), unconditional) <= 1e-14
    custom = guided(predict, 3.0, negative, lambda c, n, w: c * n + w)
    assert relative_error(custom(x, t, cond, kind), conditional * unconditional + 3) <= 1e-14


def test_scale_one_is_the_predictor_itself() -> None:
    predict = predictor()
    assert guided(predict, 1.0, {}) is predict
    assert guided(predict, 1, {}) is predict
    assert guided(predict, 1.01, {}) is not predict
    assert guided(predict, 2.0, {}).path is predict.path
    assert linear(torch.tensor(2.0), torch.tensor(1.0), 1.0).item() == 2


def test_guiding_commutes_with_conversion() -> None:
    predict = predictor(trained=True)
    cond, negative = predict.family.encode_prompts(list("012012")), predict.family.encode_prompts([""])
    strong = guided(predict, 4.0, negative)
    for path in PATHS:
        t = times(path)
        x = noised(path, t)
        velocity = strong(x, t, cond, "velocity", path)
        for kind in KINDS:
            assert relative_error(strong(x, t, cond, kind, path), path.convert(velocity, x, t, "velocity", kind)) <= 1e-10


def test_guidance_does_not_depend_on_the_batchs_order() -> None:
    predict, t = predictor(trained=True), times(Flow())
    x, cond = noised(Flow(), t), predictor().family.encode_prompts(list("012012"))
    strong = guided(predict, 4.0, predict.family.encode_prompts(["1"]))
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    whole = strong(x, t, cond)
    assert relative_error(strong(x[order], t[order], select(cond, order)), whole[order]) <= 1e-14
    assert relative_error(strong(x[2:3], t[2:3], select(cond, torch.tensor([2]))), whole[2:3]) <= 1e-14


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
def test_guided_score_of_equal_covariances_is_the_shifted_gaussians(scale: float, path: Path) -> None:
    predict, t = predictor(PAIR, path=path), times(path)
    x = noised(path, t)
    strong = guided(predict, scale, predict.family.encode_prompts(["1"]))
    shifted_mean = PAIR.means[1] + scale * (PAIR.means[0] - PAIR.means[1])
    covariance = torch.diag(torch.tensor(SHARED_VARIANCE, dtype=torch.float64))
    score = strong(x, t, predict.family.encode_prompts(["0"] * 6), "score")
    assert relative_error(score, oracle.gaussian_score(x, t, schedule_of(path), shifted_mean, covariance)) <= 1e-10


def test_taps_return_the_blocks_outputs() -> None:
    predict, t = predictor(trained=True), times(Flow())
    x, denoiser = noised(Flow(), times(Flow())), predict.denoiser
    first, second, third = denoiser.backbone.layers  # type: ignore[attr-defined]
    phase = t[:, None] * torch.pi / 2
    hidden = [first(torch.cat([x, phase, phase.sin(), phase.cos()], 1))]
    for layer in (second, third):
        hidden.append(layer(nn.functional.silu(hidden[-1])))
    plain = denoiser(x, t, {})
    for taps in ((), (1,), (0, 2), (2, 0, 1)):
        output = denoiser(x, t, {}, taps)
        assert torch.equal(output.prediction, plain.prediction)
        assert len(output.features) == len(taps)
        for tap, feature in zip(taps, output.features, strict=True):
            assert torch.equal(feature, hidden[tap])
    (gradient,) = torch.autograd.grad(denoiser(x, t, {}, (0,)).features[0].sum(), first.bias)
    assert torch.equal(gradient, torch.full_like(gradient, 6))


class Recorder(Toy):
    """Notes what the network is called with."""

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.seen = (x, t, cond)
        return super().call(backbone, x, t, cond)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_times_stay_wide(wide: torch.dtype, weights: torch.dtype, autocast: torch.dtype | None) -> None:
    family = Recorder("toy:mixture")
    denoiser = Denoiser(family.load_backbone().to(weights), family, autocast=autocast)
    t = torch.tensor([0.123456789, 0.987654321], dtype=wide)
    cond = {"text": torch.ones(2, 3), "component": torch.tensor([0, 1])}
    prediction = denoiser(samples(2), t, cond).prediction
    x, seen_t, seen = family.seen
    assert seen_t.dtype == wide
    assert torch.equal(seen_t, t)
    assert x.dtype == seen["text"].dtype == weights
    assert seen["component"].dtype == torch.int64
    assert prediction.dtype == torch.float32


def test_autocast_runs_the_layers_in_half_precision() -> None:
    family = Toy("toy:mixture")
    denoiser = Denoiser(family.load_backbone(), family, autocast=torch.bfloat16)
    x, t = samples(4).float(), torch.full((4,), 0.5)
    assert denoiser(x, t, {}, (1,)).features[0].dtype == torch.bfloat16
    exact = oracle.mixture_prediction("velocity", x.double(), t.double(), oracle.SCHEDULES["Flow"], *CLOSED_FORM)
    assert relative_error(denoiser(x, t, {}).prediction.double(), exact) < 1e-5  # the residual is still zero


def test_hooks_are_gone_after_an_error() -> None:
    class Broken(Toy):
        def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            raise RuntimeError("inside")

    family = Broken("toy:mixture")
    denoiser = Denoiser(family.load_backbone(), family)
    with pytest.raises(RuntimeError, match="inside"):
        denoiser(samples(2), torch.full((2,), 0.5), {}, (0, 1))
    assert not any(block._forward_hooks for block in family.blocks(denoiser.backbone))


# Discriminator heads


def judge(taps: tuple[int, ...] = (2, 0), *, autocast: torch.dtype | None = None) -> Predictor:
    """The mixture's network in fp32 with heads that are no longer zero."""
    family = Toy("toy:mixture")
    heads = Heads(taps, [64] * len(taps), seed=0)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return Predictor(Denoiser(family.load_backbone(), family, autocast=autocast, heads=heads), family)


def test_logits_are_the_heads_on_the_tapped_blocks() -> None:
    predict, x, t = judge(), samples(5).float(), torch.linspace(0.1, 0.9, 5)
    denoiser: Denoiser = predict.denoiser  # type: ignore[assignment]
    third, first = denoiser(x, t, {}, (2, 0)).features
    assert denoiser.heads is not None
    assert torch.equal(predict.logits(x, t, {}), denoiser.heads([third, first]))
    assert predict.logits(x, t, {}).abs().min() > 1e-4
    judged = denoiser(x, t, {}, (1,), judge=True)
    assert torch.equal(judged.prediction, denoiser(x, t, {}).prediction)
    assert torch.equal(judged.features[0], denoiser(x, t, {}, (1,)).features[0])
    assert len(judged.features) == 1
    assert denoiser(x, t, {}).logits is None


def test_logits_have_gradients_in_the_samples() -> None:
    predict = judge()
    predict.denoiser.double()  # type: ignore[attr-defined]
    x, t = samples(3).requires_grad_(), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: predict.logits(x, t, {}), (x,))


def test_logits_are_fp32_under_autocast() -> None:
    logits = judge(autocast=torch.bfloat16).logits(samples(4).float(), torch.full((4,), 0.5), {})
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, judge().logits(samples(4).float(), torch.full((4,), 0.5), {}), rtol=0.05, atol=0.02)
