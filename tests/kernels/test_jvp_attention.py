"""The Triton kernels against float64: under the interpreter everywhere, with -m gpu on a CUDA device too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import CASES, FACTORS, GRADIENT_BOUNDS, Case, errors, tensors

Run = Callable[..., Any]
DEFAULT = (32, 32, 4, 1)
# Every mask in fp32 and in a half type, head sizes and layouts in turn.
GRADIENTS = [
    Case(dtype, lengths, head_size=size, heads=(4, 2), mask=mask, layout=FACTORS["layout"][i % 4])
    for i, (mask, size) in enumerate(zip(FACTORS["mask"], (24, 40, 64, 72, 80, 96, 128, 160, 256), strict=True))
    for dtype, lengths in (("fp32", (77, 45)), (("fp16", "bf16")[i % 2], (33, 70)))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pairwise(case: Case, run: Run, device: str) -> None:
    found = run(errors, case, device)
    assert found["lse"] <= 1e-5
    assert max(found["o"], found["to"]) <= case.bound


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradient(case: Case, run: Run, device: str) -> None:
    found = run(errors, case, device, gradients=True)
    assert max(found[name] for name in ("dq", "dk", "dv")) <= GRADIENT_BOUNDS[case.dtype]


@pytest.mark.parametrize("config", [(16, 16, 4, 1), (64, 32, 4, 2), (32, 128, 4, 1), (128, 64, 8, 2)], ids=str)
@pytest.mark.parametrize("mask", ["causal", "dead_rows", "key_float"])
def test_tiles(config: tuple[int, int, int, int], mask: str, run: Run, device: str) -> None:
    case = Case("fp16", (200, 150), mask=mask, heads=(2, 1), head_size=32)
    found = run(errors, case, device, config)
    assert max(found["o"], found["to"]) <= case.bound


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_long(dtype: str, run: Run, device: str) -> None:
    case = Case(dtype, (999, 999), heads=(1, 1))
    found = run(errors, case, device, (128, 128, 8, 1) if device == "cpu" else None)
    assert max(found["o"], found["to"]) <= case.bound


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 72, 128])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_longer_than_the_interpreter_can(dtype: str, head_size: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for case in (Case(dtype, (4097, 4097), head_size, offset=(8, 8)), Case(dtype, (4097, 512), head_size, tangents="q")):
        found = errors(case, "cuda")
        assert max(found["o"], found["to"]) <= case.bound


@pytest.mark.parametrize("offset", [(0, 0), (0, 8), (8, 0), (8, 8), (32, 8), (8, 64)], ids=str)
def test_common_offsets_of_keys_and_values_cost_bf16_nothing(offset: tuple[int, int], run: Run, device: str) -> None:
    """Seen: 2.3e-3 throughout. Uncentred 9e-3 at (8, 8) and 3.5e-2 at (32, 8); dividing by unrounded sums 1.4e-2 at (8, 64)."""
    case = Case("bf16", (64, 256), head_size=64, offset=offset)
    assert run(errors, case, device)["to"] <= 4e-3


@pytest.mark.parametrize("offset", [(0, 0), (8, 0), (0, 8), (8, 8), (32, 8), (8, 64)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 3e-6), ("fp16", 1e-3), ("bf16", 5e-3)])
def test_common_offsets_of_keys_and_values_cost_the_gradient_nothing(
    dtype: str, bound: float, offset: tuple[int, int], run: Run, device: str
) -> None:
    """Seen: 4e-7, 3e-4 and 2.4e-3 throughout. dq was 5e-5, 11 % and 62 % off at (8, 8) with Δ from the rounded output and raw keys."""
    found = run(
        errors,
        Case(dtype, (40, 100), head_size=32, heads=(4, 2), mask="key_float" if dtype == "bf16" else "none", offset=offset),
        device,
        gradients=True,
    )
    assert max(found[name] for name in ("to", "dq", "dk", "dv")) <= bound


def _primals(case: Case, device: str, tangents: str) -> list[torch.Tensor]:
    from fastgen_kernels.jvp_attention import triton
    from fastgen_kernels.jvp_attention.arguments import check
    from fastgen_kernels.jvp_attention.configs import Config

    inputs: dict[str, Any] = {
        name: x if len(name) == 1 or name == "mask" or name[1] in tangents else None for name, x in tensors(case, device).items()
    }
    o, to, lse = triton.attend(check(**inputs, scale=None, causal=False, dropout_p=0.0), Config(*DEFAULT))
    assert (to is None) == (not tangents)
    return [o.cpu(), lse.cpu()]


@pytest.mark.parametrize("mask", ["none", "key_float", "dead_rows"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_tangents_do_not_change_the_primal(dtype: str, mask: str, run: Run, device: str) -> None:
    case = Case(dtype, (77, 45), mask=mask, head_size=40)
    alone, *others = (run(_primals, case, device, tangents) for tangents in ("", "qkv", "q", "v"))
    for other in others:
        for a, b in zip(alone, other, strict=True):  # other kernels, so equal to the rounding of their dtype
            torch.testing.assert_close(a, b, equal_nan=True)


def _twice(case: Case, device: str) -> bool:
    from fastgen_kernels.jvp_attention import triton
    from fastgen_kernels.jvp_attention.arguments import check

    results = []
    for _ in range(2):
        inputs: dict[str, Any] = tensors(case, device)
        leaves = [inputs[name].requires_grad_() for name in "qkv"]
        o, to, lse = triton.attend(check(**inputs, scale=None, causal=False, dropout_p=0.0))
        results.append([o, to, lse, *torch.autograd.grad(o.float().square().sum(), leaves)])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_runs_agree_bit_for_bit(dtype: str, run: Run, device: str) -> None:
    assert run(_twice, Case(dtype, (128, 77), heads=(4, 2)), device)


def _with_dirty_memory(case: Case, device: str) -> dict[str, float]:
    """Errors when fresh memory holds NaN: whatever is not written shows."""
    empty, empty_like = torch.empty, torch.empty_like
    dirty: Callable[[torch.Tensor], torch.Tensor] = lambda x: x.fill_(torch.nan) if x.is_floating_point() else x  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **kwargs: dirty(empty(*args, **kwargs)))
        patch.setattr(torch, "empty_like", lambda *args, **kwargs: dirty(empty_like(*args, **kwargs)))
        return errors(case, device, gradients=True)


@pytest.mark.parametrize("mask", ["none", "causal", "dead_rows"])
@pytest.mark.parametrize("lengths", [(1, 1), (33, 65), (77, 17)], ids=str)
def test_every_output_is_written(lengths: tuple[int, int], mask: str, run: Run, device: str) -> None:
    found = run(_with_dirty_memory, Case(lengths=lengths, head_size=24, mask=mask), device)
    assert max(found.values()) <= 2e-5  # false for NaN


def _results(device: str, **arguments: Any) -> list[torch.Tensor]:
    from fastgen_kernels.jvp_attention import jvp_attention

    moved: dict[str, Any] = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    return [x.detach().cpu() for x in jvp_attention(**moved) if x is not None]


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_bias_is_not_a_mask(run: Run, device: str) -> None:
    """−1e4 or finfo.min on every key shifts all scores alike; only −inf and False hide."""
    q, k = _random(1, 1, 3, 16), _random(1, 1, 40, 16)
    inputs = {"q": q, "k": k, "v": k.flip(2), "tq": q.flip(2), "tk": None, "tv": None}
    o, to, lse = run(_results, device, **inputs)
    biased_o, biased_to, biased_lse = run(_results, device, **inputs, mask=torch.full((1, 40), -1e4))
    torch.testing.assert_close(biased_o, o, atol=2e-3, rtol=0)  # fp32 scores of −1e4 have steps of 1e-3
    torch.testing.assert_close(biased_to, to, atol=2e-3, rtol=0)
    torch.testing.assert_close(biased_lse, lse - 1e4, atol=2e-3, rtol=0)
    flat_o, _, flat_lse = run(_results, device, **inputs, mask=torch.full((1, 40), torch.finfo(torch.float32).min))
    torch.testing.assert_close(flat_o, k.mean(2, keepdim=True).expand_as(q))
    assert flat_lse.isfinite().all()
    for hidden in (torch.full((3, 40), -torch.inf), torch.zeros(1, 1, 1, 40, dtype=torch.bool)):
        o, to, lse = run(_results, device, **inputs, mask=hidden)
        assert not o.any() and not to.any() and (lse == -torch.inf).all()


def test_expanded_and_turned_tensors(run: Run, device: str) -> None:
    q, k = _random(2, 2, 20, 24), _random(1, 1, 30, 24)
    views = {"q": q, "k": k.expand(2, 2, 30, 24), "v": k.mT.contiguous().mT.expand(2, 2, 30, 24), "tq": q, "tk": k.expand(2, 2, 30, 24), "tv": None}
    copies = {name: None if x is None else x.contiguous() for name, x in views.items()}
    for mask in (None, torch.rand(2, 1, 20, 1) < 0.5, torch.rand(30) < 0.5):
        for got, true in zip(run(_results, device, **views, mask=mask), run(_results, device, **copies, mask=mask), strict=True):
            torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-6)


def _layout(device: str) -> tuple[Any, ...]:
    from fastgen_kernels.jvp_attention import jvp_attention

    x = torch.randn(1, 20, 3, 16, device=device).transpose(1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("copied"))
        o, to, _ = jvp_attention(x, x, x, x, x, x)
    assert to is not None
    return o.stride(), to.stride(), x.stride()


def test_bshd_views_are_neither_copied_nor_changed_in_layout(run: Run, device: str) -> None:
    o, to, x = run(_layout, device)
    assert o == to == x


def _difference(case: Case, device: str) -> float:
    """Central difference of the primal kernel against its tangent, relative."""
    from fastgen_kernels.jvp_attention import jvp_attention

    inputs: dict[str, Any] = tensors(case, device)
    primals, tangents, mask = [inputs[n] for n in "qkv"], [inputs[f"t{n}"] for n in "qkv"], inputs["mask"]
    _, to, _ = jvp_attention(*primals, *tangents, mask=mask)
    step = 1e-2
    ends = [jvp_attention(*(x + sign * step * t for x, t in zip(primals, tangents, strict=True)), mask=mask)[0] for sign in (1, -1)]
    assert to is not None
    return (((ends[0] - ends[1]) / (2 * step) - to).norm() / to.norm()).item()


def test_tangent_equals_a_finite_difference_of_the_kernel(run: Run, device: str) -> None:
    assert run(_difference, Case(mask="full_bool"), device) <= 1e-3


def _autograd(device: str) -> list[str]:
    """What is differentiable, and the messages where nothing is."""
    from fastgen_kernels.jvp_attention import jvp_attention

    q, k, v = (torch.randn(1, 2, 20, 16, device=device, requires_grad=True) for _ in range(3))
    o, to, lse = jvp_attention(q, k, v, q, k, v)
    assert o.requires_grad and to is not None and not to.requires_grad and not lse.requires_grad
    (dv,) = torch.autograd.grad(jvp_attention(q.detach(), k.detach(), v)[0].sum(), v)
    torch.testing.assert_close(dv.sum(), torch.tensor(20.0 * 16 * 2, device=device))
    with torch.no_grad():
        assert not jvp_attention(q, k, v)[0].requires_grad
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError) as twice:
        dq.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        inside = jvp_attention(q, k, v, q, None, None)[1]
        assert inside is not None and inside.isfinite().all()
        with pytest.raises(ValueError, match="q carries a forward-mode tangent") as dual:
            jvp_attention(torch.autograd.forward_ad.make_dual(q, q), k, v)
    return [str(twice.value), str(dual.value)]


def test_autograd_sees_the_output_alone(run: Run, device: str) -> None:
    twice, dual = run(_autograd, device)
    assert "once_differentiable" in twice
    assert "fastgen.jvp.tangent" in dual


def test_two_batches(run: Run, device: str) -> None:
    for mask in ("dead_rows", "key_bool"):
        assert run(errors, replace(Case(batch=2, heads=(4, 2)), mask=mask), device, gradients=True)["to"] <= 1e-5
