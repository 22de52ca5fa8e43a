from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import diffusers_zoo
import pytest
import torch
import torch.nn.functional as F
from tangents import F64, ByNumbers, by_numbers, gradient, inputs, math_tangent, network, normal, relative
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastgen.errors import UserError
from fastgen.jvp import AttentionCalls, check_tangent, difference_step, refuse_unsupported, tangent

# The exact tangent


def test_mlp_equals_its_closed_form() -> None:
    a, b, x, dx = normal(8, 5), normal(3, 8, seed=1), normal(4, 5, seed=2), normal(4, 5, seed=3)
    out, d_out = tangent(lambda x: torch.tanh(x @ a.T) @ b.T, (x,), (dx,))
    hidden = torch.tanh(x @ a.T)
    torch.testing.assert_close(out, hidden @ b.T)
    torch.testing.assert_close(d_out, ((1 - hidden**2) * (dx @ a.T)) @ b.T)


def test_network_with_attention_equals_forward_ad_through_unfused_attention() -> None:
    net, (primals, tangents), calls = network(), inputs(), AttentionCalls()
    with torch.no_grad():
        out, d_out = tangent(net, primals, tangents, calls=calls)
    expected = math_tangent(net, primals, tangents)
    assert relative(out, expected[0]) <= 1e-12
    assert relative(d_out, expected[1]) <= 1e-12
    assert calls == AttentionCalls(fused=4)
    assert calls.total == 4


def attention_cases() -> Iterator[Any]:
    def case(name: str, q: tuple, k: tuple, moving: str = "qkv", **kwargs: Any) -> Any:
        return pytest.param(q, k, moving, kwargs, id=name)

    four, cross = (2, 4, 7, 8), (2, 4, 5, 8)
    yield case("self", four, four)
    yield case("cross", four, cross, scale=0.3)
    yield case("constant_text", four, cross, "q")
    yield case("constant_query", four, cross, "kv")
    yield case("value_only", four, cross, "v")
    yield case("causal", four, four, is_causal=True)
    yield case("grouped", four, (2, 2, 5, 8), enable_gqa=True)
    yield case("one_key_head", four, (2, 1, 5, 8), "q", enable_gqa=True)
    yield case("bool_keys", four, cross, attn_mask=torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()[:, None, None])
    yield case("float_keys", four, cross, attn_mask=(torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).to(F64) - 1)[:, None, None] * 1e4)
    yield case("bool_full", four, cross, attn_mask=normal(2, 4, 7, 5, seed=7) > -0.5)
    yield case("float_full_of_one_head", four, cross, attn_mask=normal(2, 1, 7, 5, seed=7))
    yield case("mask_of_rank_one", four, cross, attn_mask=normal(5, seed=7))
    yield case("mask_of_rank_two", four, cross, attn_mask=normal(7, 5, seed=7))
    yield case("mask_of_rank_three", four, cross, attn_mask=normal(4, 7, 5, seed=7))
    yield case("rank_two", (7, 8), (5, 8), attn_mask=normal(7, 5, seed=7) > -1)
    yield case("rank_three", (4, 7, 8), (4, 5, 8), attn_mask=normal(4, 1, 5, seed=7))
    yield case("rank_five", (2, 3, 4, 7, 8), (2, 3, 4, 5, 8), attn_mask=normal(2, 1, 1, 1, 5, seed=7))
    yield case("broadcast_batch", (3, 4, 7, 8), (1, 4, 5, 8))


@pytest.mark.parametrize(("q", "k", "moving", "kwargs"), list(attention_cases()))
def test_attention_equals_forward_ad_through_unfused_attention(q: tuple, k: tuple, moving: str, kwargs: Any) -> None:
    primals = normal(*q, seed=1), normal(*k, seed=2), normal(*k, seed=3)
    tangents = [normal(*x.shape, seed=4 + i) if name in moving else None for i, (name, x) in enumerate(zip("qkv", primals, strict=True))]
    calls = AttentionCalls()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **kwargs)

    out, d_out = tangent(attend, primals, tangents, calls=calls)
    expected = math_tangent(attend, primals, tangents)
    assert out.shape == d_out.shape == expected[0].shape
    assert relative(out, expected[0]) <= 1e-12
    assert relative(d_out, expected[1]) <= 1e-10
    assert calls == AttentionCalls(fused=1)


def test_rows_that_see_no_key_are_zero() -> None:
    q, mask = normal(1, 2, 3, 8), torch.tensor([[True, True, True], [False] * 3, [True, False, True]])
    out, d_out = tangent(lambda q: F.scaled_dot_product_attention(q, q, q, mask), (q,), (normal(1, 2, 3, 8, seed=1),))
    assert not out[:, :, 1].any() and not d_out[:, :, 1].any()
    assert d_out[:, :, [0, 2]].all()


def test_attention_of_constants_is_pytorchs_own() -> None:
    q, calls = normal(1, 2, 3, 8), AttentionCalls()
    _, d_out = tangent(lambda x: F.scaled_dot_product_attention(q, q, q) * x, (normal(8),), (normal(8, seed=1),), calls=calls)
    torch.testing.assert_close(d_out, F.scaled_dot_product_attention(q, q, q) * normal(8, seed=1))
    assert calls == AttentionCalls(constant=1)


@pytest.mark.parametrize("case", ["moving_mask", "value_size", "large_heads"])
def test_what_the_kernel_lacks_runs_unfused_and_says_so(case: str) -> None:
    size = 272 if case == "large_heads" else 8
    primals = (normal(1, 2, 3, size), normal(1, 2, 3, size, seed=1), normal(1, 2, 3, 6 if case == "value_size" else size, seed=2), normal(3, 3))
    tangents = [normal(*x.shape, seed=5) for x in primals[:3]] + [normal(3, 3, seed=6) if case == "moving_mask" else None]
    calls = AttentionCalls()
    with pytest.warns(UserWarning, match="unfused attention"):
        _, d_out = tangent(F.scaled_dot_product_attention, primals, tangents, calls=calls)
    assert relative(d_out, math_tangent(F.scaled_dot_product_attention, primals, tangents)[1]) <= 1e-12
    assert calls == AttentionCalls(math=1)


@pytest.mark.parametrize("need_weights", [False, True])
def test_pytorchs_multihead_attention(need_weights: bool) -> None:
    attention = nn.MultiheadAttention(16, 4, batch_first=True).to(F64).eval()
    x, dx = normal(2, 5, 16), normal(2, 5, 16, seed=1)

    def fn(x: Tensor) -> Tensor:
        return attention(x, x, x, need_weights=need_weights)[0]

    with torch.no_grad():
        d_out = tangent(fn, (x,), (dx,))[1]
    assert relative(d_out, tangent(fn, (x,), (dx,), mode="finite_difference")[1]) <= 1e-4


def test_constant_inputs_and_outputs_that_depend_on_nothing() -> None:
    x, dx = normal(3, 4), normal(3, 4, seed=1)
    torch.testing.assert_close(tangent(lambda x, y: x * y, (x, x), (dx, None))[1], dx * x)
    out, d_out = tangent(lambda x: torch.ones(2), (x,), (dx,))
    assert torch.equal(d_out, torch.zeros(2)) and torch.equal(out, torch.ones(2))


@pytest.mark.parametrize("dt", [torch.ones(3, dtype=F64), torch.ones((), dtype=F64).expand(3)])
def test_expanded_times_are_taken(dt: Tensor) -> None:
    t = torch.tensor(0.5, dtype=F64).expand(3)
    torch.testing.assert_close(tangent(torch.sin, (t,), (dt,))[1], t.cos())


def test_results_are_plain_and_the_inputs_untouched() -> None:
    net, (primals, tangents) = network(), inputs()
    before = [x.clone() for x in primals]
    out, d_out = tangent(net, primals, tangents)
    assert out.requires_grad and not d_out.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(primals, before, strict=True))
    with forward_ad.dual_level():
        assert all(forward_ad.unpack_dual(x).tangent is None for x in (out, d_out, *primals))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_grad_mode_the_value_carries_the_plain_gradient(checkpointing: bool) -> None:
    net, (primals, tangents) = network(), inputs()
    plain = gradient(net, net(*primals))
    for block in net.blocks:
        block.gradient_checkpointing = checkpointing  # type: ignore[assignment]
    out, d_out = tangent(net, primals, tangents)
    assert relative(gradient(net, out), plain) <= 1e-12
    assert relative(d_out, math_tangent(net, primals, tangents)[1]) <= 1e-12
    assert all(block.gradient_checkpointing is checkpointing for block in net.blocks)


def test_checkpointing_is_inert_without_gradients() -> None:
    net, (primals, tangents) = network(), inputs()
    expected = math_tangent(net, primals, tangents)[1]
    for block in net.blocks:
        block.gradient_checkpointing = True  # type: ignore[assignment]
    with torch.no_grad():
        assert relative(tangent(net, primals, tangents)[1], expected) <= 1e-12


def test_diffusers_checkpointing_is_off_inside_and_on_again_after() -> None:
    net, call, x, t = diffusers_zoo.build("sd3", F64)
    net.requires_grad_(True)
    plain = gradient(net, call(x, t))
    net.enable_gradient_checkpointing()  # type: ignore[operator]
    out, _ = tangent(call, (x, t), (normal(*x.shape).to(x), torch.ones_like(t)))
    assert relative(gradient(net, out), plain) <= 1e-12
    assert net.is_gradient_checkpointing  # type: ignore[truthy-function]


def test_torchs_checkpoint_wrapper_is_refused_with_gradients() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net, (primals, tangents) = network(), inputs()
    net.blocks[0] = checkpoint_wrapper(net.blocks[0])
    with pytest.raises(RuntimeError, match="CheckpointWrapper: use diffusers'"):
        tangent(net, primals, tangents)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_gives_attention_one_dtype(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net, (primals, tangents) = network(torch.float32), inputs(torch.float32)
    expected = tangent(net, primals, tangents)
    seen: list[set[torch.dtype]] = []
    import fastgen_kernels.jvp_attention as kernel

    original = kernel.jvp_attention

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append({x.dtype for x in args if x is not None})
        return original(*args, **kwargs)

    monkeypatch.setattr(kernel, "jvp_attention", record)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        out, d_out = tangent(net, primals, tangents)
    assert seen == [{torch.bfloat16}] * 4
    assert relative(out.float(), expected[0]) <= 1e-2
    assert relative(d_out.float(), expected[1]) <= 2e-2


# Wrapped networks


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network(in_place: bool) -> None:
    """What Dynamo compiles loses tangents without an error (here 46 % off), so that the exact pass must run uncompiled."""
    torch._dynamo.reset()
    net, (primals, tangents) = network(), inputs()
    expected, plain = math_tangent(net, primals, tangents), gradient(net, net(*primals))
    compiled = net if in_place else torch.compile(net, backend="aot_eager")
    if in_place:
        net.compile(backend="aot_eager")
    compiled(*primals)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using `torch.compile")  # about global hooks
            out, d_out = tangent(compiled, primals, tangents)
            assert relative(tangent(compiled, primals, tangents, mode="finite_difference")[1], expected[1]) <= 1e-6
        assert relative(out, expected[0]) <= 1e-12
        assert relative(d_out, expected[1]) <= 1e-12
        assert not grad or relative(gradient(net, out), plain) <= 1e-12


def test_an_adapter() -> None:
    from fastgen.surgery import lora

    net, (primals, tangents), calls = network(), inputs(), AttentionCalls()
    bare = tangent(net, primals, tangents)
    net.requires_grad_(False)
    lora.add_adapter(net, "student", rank=2, alpha=3.0, targets=["to_q", "to_v"])
    net.to(F64)
    for name, parameter in lora.parameters(net, "student").items():
        parameter.data = normal(*parameter.shape, seed=len(name))
        parameter.requires_grad_(True)
    lora.activate(net, "student")
    out, d_out = tangent(net, primals, tangents, calls=calls)
    expected = math_tangent(net, primals, tangents)
    assert relative(d_out, expected[1]) <= 1e-12 < relative(d_out, bare[1])
    assert relative(gradient(net, out), gradient(net, net(*primals))) <= 1e-12
    assert calls == AttentionCalls(fused=4)
    assert check_tangent(net, primals, tangents, net).relative_error <= 1e-7
    lora.activate(net, None)
    assert relative(tangent(net, primals, tangents)[1], bare[1]) <= 1e-12


# Misuse


def test_misuse_is_refused() -> None:
    x = normal(3, 4)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        tangent(torch.sin, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="Nested forward mode"):
        tangent(torch.sin, (x,), (x,))
    with pytest.raises(RuntimeError, match="Nested forward mode"):
        torch.func.jvp(lambda x: tangent(torch.sin, (x,), (x,))[0], (x,), (x,))
    with pytest.raises(ValueError, match="1 for 2 primals"):
        tangent(torch.add, (x, x), (x,))
    with pytest.raises(ValueError, match=r"tangents\[0\]: \(4,\)"):
        tangent(torch.sin, (x,), (x[0],))
    with pytest.raises(ValueError, match=r"primals\[1\]: a time in torch.bfloat16"):
        tangent(torch.add, (x, x[0].bfloat16()), (x, None))
    with pytest.raises(ValueError, match="dropout_p"):
        tangent(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), (x[None],), (x[None],))
    with pytest.raises(ValueError, match="allowed: exact, finite_difference"):
        tangent(torch.sin, (x,), (x,), mode="central")  # type: ignore[arg-type]


# Finite differences


@pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-6), (torch.float32, 2e-3)])
def test_finite_differences_equal_the_exact_tangent(dtype: torch.dtype, bound: float) -> None:
    net, (primals, tangents) = network(dtype), inputs(dtype)
    out, d_out = tangent(net, primals, tangents, mode="finite_difference")
    assert torch.equal(out, net(*primals))
    assert not d_out.requires_grad
    assert relative(d_out, tangent(net, primals, tangents)[1]) <= bound


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_the_step_follows_the_size_of_the_tangents(size: float) -> None:
    (x, t), (dx, dt) = inputs()
    assert difference_step((x, t), (size * dx, size * dt)) == pytest.approx(difference_step((x, t), (dx, dt)) / size)


def test_the_step_moves_the_network_time_by_a_twentieth() -> None:
    t = torch.tensor([0.2, 0.9])
    assert 1000 * difference_step((t,), (torch.ones(2),)) == pytest.approx(0.05)
    assert difference_step((1000 * t,), (torch.ones(2),)) == pytest.approx(0.05 * 0.9)  # a network that takes 1000 t itself
    assert difference_step((torch.ones(2, 3, 4),), (torch.full((2, 3, 4), 5.0),)) == pytest.approx(0.05 * 0.1 / 5)


def test_nothing_moves_nothing() -> None:
    x = normal(2, 3)
    for tangents in ((None,), (torch.zeros_like(x),)):
        assert not tangent(torch.sin, (x,), tangents, mode="finite_difference")[1].any()


# The check at the start of a run


class Ruleless(nn.Module):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

    def forward(self, x: Tensor) -> Tensor:
        return self.Function.apply(x)  # type: ignore[return-value]


class Inline(nn.Module):
    """Calls the operator itself, between two layers that are right."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.SiLU(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(by_numbers(self.first(x)))


def test_a_right_tangent_passes_the_check() -> None:
    for dtype, bound in ((F64, 1e-8), (torch.float32, 1e-3)):
        net, (primals, tangents) = network(dtype), inputs(dtype)
        check = check_tangent(net, primals, tangents, net)
        assert check.relative_error <= bound
        assert check.calls == AttentionCalls(fused=4)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_zero_derivative_passes_the_check() -> None:
    x, dx = normal(2, 3), normal(2, 3, seed=1)
    assert check_tangent(lambda x: torch.ones(3) + 0 * x[0], (x,), (dx,)).relative_error == 0
    assert check_tangent(lambda x: 0 * x, (x,), (dx,)).relative_error == 0
    for dtype in (F64, torch.float32):  # zero but for rounding
        assert check_tangent(lambda x: x.softmax(-1).sum(-1), (x.to(dtype),), (dx.to(dtype),)).relative_error <= 1e-2


@pytest.mark.parametrize(("culprit", "kind"), [(ByNumbers, "ByNumbers"), (Inline, "Inline")])
def test_a_wrong_tangent_is_refused_and_names_the_layer(culprit: type[nn.Module], kind: str) -> None:
    net, (primals, tangents) = network(), inputs()
    net.blocks[1].act = culprit()
    with pytest.raises(UserError, match=rf"relative error .*e.* layer blocks\.1\.act of type {kind}"):
        check_tangent(net, primals, tangents, net)
    with pytest.raises(UserError, match="disagrees with finite differences: relative error"):
        check_tangent(net, primals, tangents)


def test_a_zero_tangent_is_refused() -> None:
    net, (primals, tangents) = nn.Sequential(nn.Linear(16, 16), ByNumbers()).to(F64), inputs()
    with pytest.raises(UserError, match=r"is zero, finite differences are not: relative error 1\.0e\+00 .* layer 1 of type ByNumbers"):
        check_tangent(net, primals[:1], tangents[:1], net)


def test_an_operator_that_says_it_has_no_rule_is_refused_and_named() -> None:
    net, (primals, tangents) = network(), inputs()
    net.blocks[1].act = Ruleless()
    with pytest.raises(UserError, match=r"layer blocks\.1\.act of type Ruleless: .*jvp"):
        check_tangent(net, primals, tangents, net)


def test_the_check_leaves_no_hooks_behind_after_an_error() -> None:
    net, (primals, tangents) = network(), inputs()
    net.blocks[1].act = ByNumbers()
    with pytest.raises(UserError):
        check_tangent(net, primals, tangents, net)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_dropout_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)).train()
    with pytest.raises(UserError, match="'1' draws dropout"):
        refuse_unsupported(net)
    refuse_unsupported(net.eval())
    dit = diffusers_zoo.build("dit").network
    refuse_unsupported(dit)
    with pytest.raises(UserError, match="class_embedder' draws dropout"):
        refuse_unsupported(dit.train())


def test_attention_outside_pytorch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    net = diffusers_zoo.build("sd3").network
    flux = diffusers_zoo.build("flux").network
    refuse_unsupported(flux)
    for backend in ("native", "_native_math"):
        flux.set_attention_backend(backend)  # type: ignore[operator]
        refuse_unsupported(flux)
    processor = flux.transformer_blocks[0].attn.processor  # type: ignore[union-attr, index]
    processor._attention_backend = AttentionBackendName.FLEX  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"backend 'flex', set on 'transformer_blocks\.0\.attn'.*set_attention_backend\('native'\)"):
        refuse_unsupported(flux)
    processor._attention_backend, processor._parallel_config = None, object()  # type: ignore[union-attr]
    with pytest.raises(UserError, match="context parallel"):
        refuse_unsupported(flux)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.FLASH)
    with pytest.raises(UserError, match=r"backend 'flash', active.*unset DIFFUSERS_ATTN_BACKEND"):
        refuse_unsupported(net)


def test_xformers_is_refused() -> None:
    from diffusers.models.attention_processor import XFormersAttnProcessor

    net = diffusers_zoo.build("sd15").network
    net.down_blocks[1].attentions[0].transformer_blocks[0].attn1.processor = XFormersAttnProcessor()  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match=r"runs XFormersAttnProcessor; call module\.disable_xformers"):
        refuse_unsupported(net)


def test_finite_differences_do_without_tf32() -> None:
    """CUDA's convolutions take it by default, and a difference of two roundings is noise."""
    seen: list[bool] = []
    before = torch.backends.cudnn.allow_tf32

    def fn(x: Tensor) -> Tensor:
        seen.append(bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32))
        return x.sin()

    x, dx = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    torch.backends.cudnn.allow_tf32 = True
    try:
        check_tangent(fn, (x,), (dx,))
        checked = list(seen)
        seen.clear()
        tangent(fn, (x,), (dx,), mode="finite_difference")
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert checked
    assert not any(checked)
    assert seen == [True, False, False]  # the value itself is the network's own
