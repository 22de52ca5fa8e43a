"""moe_ffn's derivatives beside finite differences: first and second, of every input, in both of PyTorch's forward modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fastgen_kernels.moe_ffn import ACTIVATIONS, moe_ffn, moe_ffn_by_expert, reference
from moe_cases import ALIGNED, F64, ODD, ROUTINGS, Size, assert_alike, by_expert, chosen, gradients, inputs, normal, relative
from torch import Tensor
from torch.autograd import forward_ad


def pushed(fn: Callable[..., Tensor], at: Sequence[Tensor], along: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """torch.func's value and tangent."""
    out: Any = torch.func.jvp(fn, tuple(at), tuple(along))
    return out


def functional(size: Size, activation: Any, routing: str = "random") -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The op as a function of x, gates, w1, b1, w2, b2, and where."""
    ids, given = chosen(size, routing), inputs(size, activation)
    return lambda x, gates, w1, b1, w2, b2: moe_ffn(x, ids, gates, w1, b1, w2, b2, activation=activation), tuple(given.values())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients_and_tangents_of_all_inputs_are_finite_differences(activation: Any, routing: str) -> None:
    fn, at = functional(Size(4, 2, 3, 3, 2, 2), activation, routing)
    assert torch.autograd.gradcheck(fn, at, check_forward_ad=True)


def test_second_derivatives_are_finite_differences_too() -> None:
    fn, at = functional(Size(3, 2, 3, 2, 2, 2), "swiglu", "skewed")
    assert torch.autograd.gradgradcheck(fn, at, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("constant", [(), (1, 2, 3, 4, 5), (0,)], ids=["none", "all but x", "x"])
@pytest.mark.parametrize("mode", ["func", "forward_ad"])
@pytest.mark.parametrize("size", [ODD, ALIGNED], ids=["odd", "aligned"])
def test_tangents_in_either_interface(size: Size, mode: str, constant: tuple[int, ...]) -> None:
    fn, at = functional(size, "geglu")
    along = [torch.zeros_like(x) if i in constant else normal(*x.shape, seed=20 + i) for i, x in enumerate(at)]
    h = 1e-6
    expected = (fn(*(x + h * dx for x, dx in zip(at, along, strict=True))) - fn(*(x - h * dx for x, dx in zip(at, along, strict=True)))) / (2 * h)
    if mode == "func":
        tangent = pushed(fn, at, along)[1]
    else:
        with forward_ad.dual_level():
            duals = [x if i in constant else forward_ad.make_dual(x, dx) for i, (x, dx) in enumerate(zip(at, along, strict=True))]
            tangent = forward_ad.unpack_dual(fn(*duals)).tangent
        assert tangent is not None
    assert relative(tangent.detach(), expected.detach()) < 1e-8


def routed(fn: Callable[..., Tensor], given: dict[str, Tensor], router: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of tokens whose choice and gates follow from them."""
    weights = {name: value for name, value in given.items() if name not in ("x", "gates")}

    def call(x: Tensor) -> Tensor:
        gates, ids = (x @ router.to(x)).softmax(-1).topk(2)
        return fn(x, ids, gates, **weights, activation="gelu")

    return call


@pytest.mark.parametrize(("dtype", "least"), [(F64, 1e-13), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_a_router_inside_the_tangent_and_the_gradient_after_it(dtype: torch.dtype, least: float) -> None:
    given, router = inputs(ALIGNED, dtype=dtype), normal(ALIGNED.width, ALIGNED.experts, seed=30)
    x, dx = given["x"], normal(*given["x"].shape, seed=31, dtype=dtype)
    out, tangent = pushed(routed(moe_ffn, given, router), (x,), (dx,))
    expected, expected_tangent = pushed(routed(reference.moe_ffn, given, router), (x,), (dx,))
    assert relative(tangent, expected_tangent) < least
    weights = {name: given[name] for name in ("x", "w1", "b1", "w2", "b2")}
    target = gradients(expected + expected_tangent.square(), weights)  # through the tangent as well
    assert_alike(gradients(out + tangent.square(), weights), target, 10 * least)


def test_tangents_of_experts_that_choose_their_tokens() -> None:
    tokens, given = by_expert(5)
    names = list(given)

    def fn(*values: Tensor) -> Tensor:
        return moe_ffn_by_expert(tokens=tokens, activation="swiglu", **dict(zip(names, values, strict=True)))

    at, along = tuple(given.values()), tuple(normal(*x.shape, seed=40 + i) for i, x in enumerate(given.values()))
    h = 1e-6
    expected = (fn(*(x + h * dx for x, dx in zip(at, along, strict=True))) - fn(*(x - h * dx for x, dx in zip(at, along, strict=True)))) / (2 * h)
    assert relative(pushed(fn, at, along)[1].detach(), expected.detach()) < 1e-8
