"""tangent() through the denoisers of twelve diffusers pipelines, none of them modified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers_zoo
import pytest
import torch
import torch.nn.functional as F
from pipelines import PROMPTS, tiny_sd3
from tangents import double, math_tangent, relative
from torch import Tensor

from fastgen.denoiser import Denoiser, Predictor
from fastgen.errors import UserError
from fastgen.families.sd3 import SD3
from fastgen.jvp import AttentionCalls, check_precision, check_tangent, refuse_unsupported, tangent
from fastgen.path import TrigFlow

NAMES = list(diffusers_zoo.BUILDERS)


def directions(x: Tensor, t: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(x.shape, generator=generator).to(x.dtype), torch.tensor([0.9, -0.7], dtype=t.dtype) * unit


def count_attention(call: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Attention calls of a plain forward, counted at the function itself."""
    count, original = 0, F.scaled_dot_product_attention

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", counting)
        call(*inputs)
    return count


@pytest.mark.parametrize("name", NAMES)
def test_equals_forward_ad_through_unfused_attention_in_float64(name: str) -> None:
    network, call, x, t = diffusers_zoo.build(name, torch.float64)
    both = directions(x, t, float(t.max()))
    for tangents in (both, (both[0], torch.zeros_like(t)), (torch.zeros_like(x), both[1])):
        expected_out, expected = math_tangent(call, (x, t), tangents)
        calls = AttentionCalls()
        with torch.no_grad():
            out, d_out = tangent(call, (x, t), tangents, calls=calls)
        assert expected.any()
        assert relative(out, expected_out) <= 1e-10
        assert relative(d_out, expected) <= 1e-10
        assert calls.total == count_attention(call, x, t)
        assert calls.math == 0
    refuse_unsupported(network)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_best_finite_difference_in_float32(name: str) -> None:
    network, call, x, t = diffusers_zoo.build(name)
    check = check_tangent(call, (x, t), directions(x, t, float(t.max())), network)
    assert check.relative_error <= 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_keeps_every_tangent_of_attention(name: str) -> None:
    network, call, x, t = diffusers_zoo.build(name)
    primals, tangents = (x, t), directions(x, t, float(t.max()))
    full = check_tangent(call, primals, tangents, network)
    with torch.autocast("cpu", torch.bfloat16):
        if name == "qwen":  # embeds its times in bf16, so that the derivative along them is another
            with pytest.raises(UserError, match=r"train\.precision: the network's tangent is off by"):
                check_precision(call, primals, tangents, full)
        else:
            assert check_precision(call, primals, tangents, full) <= 0.15


@pytest.mark.parametrize("name", NAMES)
def test_finite_difference_mode_in_float32(name: str) -> None:
    """One rule for the step serves all of them; h = 1e-3 of the time would be 7 to 40 % off."""
    _, call, x, t = diffusers_zoo.build(name)
    primals, tangents = (x, t), directions(x, t, float(t.max()))
    expected = tangent(call, primals, tangents)[1]
    assert relative(tangent(call, primals, tangents, mode="finite_difference")[1], expected) <= 5e-3


def test_an_attention_library_outside_pytorch_is_refused_and_named() -> None:
    network, call, x, t = diffusers_zoo.build("flux")
    attention: Any = network.get_submodule("transformer_blocks.0.attn")
    inner = attention.processor
    attention.processor = lambda *args, **kwargs: tuple(double(out) for out in inner(*args, **kwargs))
    with pytest.raises(UserError, match=r"layer transformer_blocks\.0\.attn of type FluxAttention"):
        check_tangent(call, (x, t), directions(x, t, 1.0), network)


def test_autocast_through_a_denoiser() -> None:
    family = SD3(tiny_sd3())
    denoiser = Denoiser(family.load_backbone(), family)
    cond = family.encode_prompts(PROMPTS[:2])
    x, t = torch.randn(2, *family.latent.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    outs = {}
    for autocast in (None, torch.bfloat16):
        denoiser.autocast = autocast
        with torch.no_grad():
            outs[autocast] = tangent(lambda x, t: denoiser(x, t, cond).prediction, (x, t), directions(x, t, 1.0))
    for ours, expected in zip(outs[torch.bfloat16], outs[None], strict=True):
        assert 1e-5 < relative(ours, expected) <= 2e-2


def test_the_student_of_a_consistency_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """A denoiser on the trigonometric path, as sCM calls it: d/dt of the velocity along a direction in float64."""
    family = SD3(tiny_sd3())
    denoiser = Denoiser(family.load_backbone().double(), family)
    predict = Predictor(denoiser, family)
    cond = {key: value.double() for key, value in family.encode_prompts(PROMPTS[:2]).items()}
    x, dx = (torch.randn(2, *family.latent.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    t = torch.tensor([0.4, 1.1], dtype=torch.float64)
    primals, tangents = (x, t), (t.sin().mul(t.cos())[:, None, None, None] * dx, t.sin() * t.cos())

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return predict(x, t, cond, "velocity", TrigFlow())

    with torch.no_grad():
        exact = tangent(velocity, primals, tangents)
    for ours, expected in zip(exact, math_tangent(velocity, primals, tangents), strict=True):
        assert relative(ours, expected) <= 1e-10
    assert check_tangent(velocity, primals, tangents, denoiser).relative_error <= 1e-3
    # The network embeds times in fp32 whatever its weights are, which limits finite differences; for this comparison it does not.
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    check = check_tangent(velocity, primals, tangents, denoiser)
    assert check.relative_error <= 1e-6
    assert check.calls == AttentionCalls(fused=2)
