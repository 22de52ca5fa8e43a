"""Tangents in half precision: the check that compares them with fp32's, and duals whose halves would have two dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tangents import Block, by_numbers, inputs, network, normal, relative
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastgen.errors import UserError
from fastgen.jvp import AttentionCalls, check_precision, check_tangent, tangent

BF16 = torch.bfloat16


def halved(x: Tensor) -> bool:
    return x.dtype == BF16


def numbers(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return by_numbers(q), by_numbers(k), by_numbers(v)


def attending(change: Callable[..., Any]) -> nn.Module:
    """The test network with less weight on what attention says, and with arguments of it that pass through `change` in half precision alone."""
    original, net = Block.attend, network(torch.float32)

    def attend(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return original(block, *(change(q, k, v) if halved(q) else (q, k, v)))

    for block in net.blocks:
        block.attend = attend.__get__(block)  # type: ignore[assignment]
        block.to_out.weight.data.mul_(0.15)  # type: ignore[union-attr, operator]
    return net


def test_the_same_attention_calls_pass() -> None:
    net, (primals, tangents) = network(torch.float32), inputs(torch.float32)
    full = check_tangent(net, primals, tangents, net)
    assert full.calls.order == ["fused with tangents of q, k, v", "fused with tangents of q"] * 2
    assert check_precision(net, primals, tangents, full) == 0
    with torch.autocast("cpu", BF16):
        assert 1e-4 < check_precision(net, primals, tangents, full) <= 2e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (numbers, r"call 1 of 4 is constant with no tangent; in fp32 it is fused with tangents of q, k, v"),
        (lambda q, k, v: (q, by_numbers(k), by_numbers(v)), r"call 1 of 4 is fused with tangents of q; in fp32 it is fused with tangents of q, k, v"),
        (lambda q, k, v: (q, k, v) if k.shape[1] == 7 else numbers(q, k, v), "call 2 of 4 is constant"),
    ],
    ids=["all", "keys_and_values", "text"],
)
def test_attention_that_drops_tangents_in_half_precision_is_refused(change: Callable[..., Any], message: str) -> None:
    """The difference alone allows it: here it is far below .3 with every tangent of attention gone."""
    net, (primals, tangents) = attending(change), inputs(torch.float32)
    full = check_tangent(net, primals, tangents, net)
    with torch.autocast("cpu", BF16):
        assert relative(tangent(net, primals, tangents)[1].float(), full.tangent) <= 0.25
        with pytest.raises(UserError, match=rf"^recipe key train\.precision: attention keeps other tangents .*{message}.*; use fp32"):
            check_precision(net, primals, tangents, full)


def test_attention_that_is_not_pytorchs_in_half_precision_is_refused() -> None:
    def outside(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.float() @ k.float().mT).softmax(-1).to(v.dtype) @ v if halved(q) else Block.attend(block, q, k, v)

    net, (primals, tangents) = network(torch.float32), inputs(torch.float32)
    net.blocks[1].attend = outside.__get__(net.blocks[1])  # type: ignore[assignment]
    full = check_tangent(net, primals, tangents, net)
    with torch.autocast("cpu", BF16), pytest.raises(UserError, match="call 3 of 4 is not there; in fp32 it is fused"):
        check_precision(net, primals, tangents, full)


def test_an_operator_that_drops_tangents_in_half_precision_alone_is_refused() -> None:
    """Though the module has been watched before, in fp32."""
    net, (primals, tangents) = attending(lambda q, k, v: (q.detach(), k, v)), inputs(torch.float32)
    full = check_tangent(net, primals, tangents, net)
    tangent(net, primals, tangents)
    with torch.autocast("cpu", BF16), pytest.raises(UserError, match=r"torch\.Tensor\.detach drops a tangent in layer blocks\.0 of type Block"):
        check_precision(net, primals, tangents, full)


def test_a_large_difference_is_refused() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x if halved(x) else x

    net, (primals, tangents) = network(torch.float32), inputs(torch.float32)
    net.blocks[1].to_out = nn.Sequential(net.blocks[1].to_out, Doubled())  # type: ignore[assignment]
    full = check_tangent(net, primals, tangents, net)
    with torch.autocast("cpu", BF16), pytest.raises(UserError, match=r"^recipe key train\.precision: the network's tangent is off by \d+% in this"):
        check_precision(net, primals, tangents, full)


# Both halves of a dual have one dtype

SEQUENCES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer_norm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), (2, 5, 8)),
    "layer_norm_last": (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), (2, 5, 8)),
    "group_norm": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3)), (2, 4, 6, 6)),
    "batch_norm": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)), (2, 4, 6, 6)),
    "instance_norm": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 4, 3)), (2, 4, 6, 6)),
    "rms_norm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 8)), (2, 5, 8)),
    "attention": (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), Attend()), (2, 5, 8)),
}


class Attend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def seeded(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    build, shape = SEQUENCES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval(), normal(*shape, dtype=torch.float32), normal(*shape, seed=1, dtype=torch.float32)


def record_halves(net: nn.Module) -> list[tuple[torch.dtype, torch.dtype]]:
    halves: list[tuple[torch.dtype, torch.dtype]] = []

    def look(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
        dx = forward_ad.unpack_dual(out).tangent
        assert dx is not None
        halves.append((out.dtype, dx.dtype))

    for module in net.modules():
        module.register_forward_hook(look)
    return halves


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", SEQUENCES)
def test_autocast_leaves_both_halves_in_one_dtype(name: str, grad: bool) -> None:
    net, x, dx = seeded(name)
    expected, parameters = tangent(net, (x,), (dx,)), list(net.parameters())
    # Not the sum of squares, which after a LayerNorm is the same for all inputs: its gradients are rounding alone.
    weight = normal(*expected[0].shape, seed=2, dtype=torch.float32)
    plain = torch.autograd.grad((net(x) * weight).sum(), parameters)
    halves, calls = record_halves(net), AttentionCalls()
    with torch.set_grad_enabled(grad):
        with torch.autocast("cpu", BF16):
            out, d_out = tangent(net, (x,), (dx,), calls=calls)
        assert d_out.dtype == out.dtype
        assert all(a == b for a, b in halves) and len(halves) == len(list(net.modules()))
        assert relative(out.float(), expected[0]) <= 2e-2 and relative(d_out.float(), expected[1]) <= 2e-2
        if grad:
            scale = max(gradient.norm() for gradient in plain)
            for ours, theirs in zip(torch.autograd.grad((out.float() * weight).sum(), parameters), plain, strict=True):
                assert (ours - theirs).norm() <= 5e-2 * theirs.norm() + 5e-3 * scale


def test_norms_that_keep_fp32_weights_in_a_bf16_network() -> None:
    """Without autocast: diffusers' `_keep_in_fp32_modules`."""
    net, x, dx = seeded("layer_norm")
    expected = tangent(net, (x,), (dx,))
    net[0].to(BF16), net[2].to(BF16)  # type: ignore[index, operator]
    with torch.no_grad():
        out, d_out = tangent(net, (x.to(BF16),), (dx.to(BF16),))
    assert out.dtype == d_out.dtype == BF16
    assert relative(out.float(), expected[0]) <= 2e-2 and relative(d_out.float(), expected[1]) <= 2e-2
