"""Tangents that an operator drops without a word: refused where the result depends on them, and only there."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tangents import double, inputs, network, relative
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.jvp import check_tangent, tangent
from fastgen.jvp.lost import LostTangents


def with_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return double(x)


def written(x: Tensor, value: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[..., :2] = value[..., :2]
    return out


LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "detach": (lambda x: x.detach() * 2, "torch.Tensor.detach"),
    "data": (lambda x: x.data.sin(), "torch.Tensor.data.__get__"),
    "custom_op": (double, "fastgen_test.double"),
    "custom_op_without_gradients": (with_no_grad, "fastgen_test.double"),
    "custom_op_by_name": (lambda x: torch.ops.fastgen_test.double(x), "fastgen_test.double"),
    "numpy": (lambda x: torch.from_numpy(x.numpy() + 1.0), "torch.Tensor.numpy"),
    "detached_numpy": (lambda x: torch.from_numpy(x.detach().cpu().numpy()), "torch.Tensor.detach"),
    "copied_as_data": (lambda x: torch.tensor(x), "torch.tensor"),
    "new_tensor": (lambda x: x[0].new_tensor(x), "torch.Tensor.new_tensor"),
    "part": (lambda x: torch.cat([x, x[..., :1].detach()], -1)[..., 1:], "torch.Tensor.detach"),
    "straight_through": (lambda x: x + (x.round() - x).detach(), "torch.Tensor.detach"),
    "norm_statistics": (lambda x: x / x.detach().norm(), "torch.Tensor.detach"),
    "written_into": (lambda x: written(x, x.detach()), "torch.Tensor.detach"),
    "added_in_place": (lambda x: torch.zeros_like(x).add_(x.detach()), "torch.Tensor.detach"),
    "chunks": (lambda x: x.detach().chunk(2, -1)[1].repeat(1, 1, 2), "torch.Tensor.detach"),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))).detach()).flatten(-2), "torch.Tensor.detach"),
}


class Layer(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize(("function", "operator"), LOSSES.values(), ids=LOSSES)
def test_a_lost_tangent_is_refused_and_names_the_operator_and_the_layer(function: Callable[[Tensor], Tensor], operator: str) -> None:
    net, (primals, tangents) = network(), inputs()
    net.blocks[1].act = Layer(function)
    for _ in range(2):  # a pass that was refused counts for nothing
        with (
            torch.no_grad(),
            pytest.raises(UserError, match=rf"{re.escape(operator)}\S* drops .* in layer blocks\.1\.act of type Layer\. .*finite_diff"),
        ):
            tangent(net, primals, tangents)
    with pytest.raises(UserError, match=rf"{re.escape(operator)}\S* in the function drops"):
        tangent(function, primals[:1], tangents[:1])
    with pytest.raises(UserError, match=rf"{re.escape(operator)}\S* drops .* in layer blocks\.1\.act"):
        check_tangent(net, primals, tangents, net)
    with torch.no_grad():
        assert tangent(net, primals, tangents, mode="finite_difference")[1].any()


def test_with_gradients_too() -> None:
    net, (primals, tangents) = network(), inputs()
    net.blocks[0].act = Layer(lambda x: x.detach() * x)
    with pytest.raises(UserError, match=r"torch\.Tensor\.detach drops a tangent in layer blocks\.0\.act of type Layer"):
        tangent(net, primals, tangents)


LOG: list[Any] = []
CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "detached_for_a_log": lambda x: (LOG.append(x.detach().norm()), LOG.append(x.data.mean()), LOG.append(float(x[0, 0, 0])), x.sin())[-1],
    "alike": lambda x: x * torch.ones_like(x) + torch.zeros_like(x) + torch.full_like(x, 2.0) + 0 * torch.rand_like(x) + 0 * torch.randn_like(x),
    "new": lambda x: x + x.new_ones(16) + x.new_zeros(16) + x.new_full((16,), 2.0) + x.new_tensor([1.0]),
    "empty_and_written": lambda x: torch.empty_like(x).copy_(x.cos()),
    "empty_and_part_written": lambda x: written(x, x.sin()),
    "rounded": lambda x: x + x.round() + x.floor() + x.ceil() + x.trunc() + x.sign() + x.sgn() + torch.remainder(x, 2.0),
    "compared": lambda x: x * (x > 0) + (x > 0).to(x.dtype) + torch.isfinite(x).float(),
    "chosen": lambda x: torch.where(x > 0, torch.ones(16, dtype=x.dtype), torch.tensor(0.0, dtype=x.dtype)) * x + torch.where(x > 0, x, -x),
    "counted": lambda x: x + torch.histc(x, 4).mean() + x.argmax(-1, keepdim=True) + x.long() + torch.nn.functional.one_hot(x.argmax(-1), 16),
    "shaped": lambda x: x * x.shape[-1] + torch.arange(16).to(x) + torch.arange(16).type_as(x) + torch.zeros(16).view_as(x[0, 0]).expand_as(x),
    "broadcast": lambda x: sum(torch.broadcast_tensors(x, torch.ones(16, dtype=x.dtype))),  # type: ignore[dict-item]
    "sign_of_another": lambda x: x + torch.copysign(torch.ones(16, dtype=x.dtype), x),
    "sorted": lambda x: x.sort(-1)[0] + x.topk(3, -1).values.sum() + x.max(-1, keepdim=True).values,
    "normed": lambda x: torch.nn.functional.layer_norm(x, (16,)) + torch.nn.functional.group_norm(x.mT, 4).mT,
    "rotated": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(x[..., ::2] ** 2, x[..., 1::2])).flatten(
        -2
    ),
}


@pytest.mark.parametrize("function", CONSTANTS.values(), ids=CONSTANTS)
def test_derivatives_of_zero_are_no_losses(function: Callable[[Tensor], Tensor]) -> None:
    (x, _), (dx, _) = inputs()
    with torch.no_grad():
        d_out = tangent(Layer(function), (x,), (dx,))[1]
    # Finite differences agree: nothing was lost.
    step = 1e-6
    ends = [function(x + sign * step * dx) for sign in (1, -1)]
    assert relative(d_out, (ends[0] - ends[1]) / (2 * step)) <= 1e-5


def test_only_the_first_whole_pass_of_a_module_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (primals, tangents), seen = network(), inputs(), []
    original = LostTangents.look
    monkeypatch.setattr(LostTangents, "look", lambda self, func, *rest: (seen.append(list(self.running)), original(self, func, *rest)))

    def fn(x: Tensor, t: Tensor) -> Tensor:
        return 2 * net(x, t)

    with torch.no_grad():
        first = tangent(fn, primals, tangents)[1]
        assert {net, net.blocks[1].to_q} <= {module for running in seen for module in running}
        seen.clear()
        second = tangent(fn, primals, tangents)[1]
        assert seen and not any(seen)  # what surrounds the modules still is
        assert torch.equal(first, second)
        seen.clear()
        check_tangent(fn, primals, tangents, net)
        assert any(seen)
        seen.clear()
        tangent(lambda x, t: network()(net(x, t), t), primals, tangents)  # beside a module that is known, one that is not
        assert {type(running[0]) for running in seen if running} == {type(net)} and not any(net in running for running in seen)
    assert not torch.nn.modules.module._has_any_global_hook()
