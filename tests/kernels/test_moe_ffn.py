"""moe_ffn beside a loop over tokens: values and every gradient; skewed and empty experts, odd sizes; what else it promises."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fastgen_kernels.moe_ffn import ACTIVATIONS, describe, moe_ffn, moe_ffn_by_expert, products, reference
from moe_cases import ALIGNED, F64, ODD, ROUTINGS, Size, assert_alike, by_expert, chosen, gradients, inputs, loop, normal, relative
from torch import Tensor


@pytest.mark.parametrize("size", [ODD, ALIGNED], ids=["odd", "aligned"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "least"), [(F64, 1e-14), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
def test_value_and_every_gradient_are_those_of_a_loop(size: Size, routing: str, activation: Any, dtype: torch.dtype, least: float) -> None:
    ids, given = chosen(size, routing), inputs(size, activation, dtype)
    truth = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    out, expected = moe_ffn(ids=ids, activation=activation, **given), loop(ids=ids, activation=activation, **truth)
    assert out.dtype == dtype and relative(out, expected) < least
    assert_alike(gradients(out, given), gradients(expected, truth), least)


@pytest.mark.parametrize("fn", [moe_ffn, reference.moe_ffn], ids=["op", "reference"])
@pytest.mark.parametrize("without", [("b1",), ("b2",), ("b1", "b2")])
def test_biases_may_be_missing(fn: Callable[..., Tensor], without: tuple[str, ...]) -> None:
    ids = chosen(ODD, "random")
    given: dict[str, Any] = inputs(ODD) | dict.fromkeys(without)
    assert relative(fn(ids=ids, activation="gelu", **given), loop(ids=ids, activation="gelu", **given)) < 1e-14


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_the_loop(activation: Any) -> None:
    ids, given = chosen(ODD, "random"), inputs(ODD, activation)
    assert relative(reference.moe_ffn(ids=ids, activation=activation, **given), loop(ids=ids, activation=activation, **given)) < 1e-14


def test_in_bf16_it_is_as_near_as_rounding_allows() -> None:
    ids, given = chosen(ALIGNED, "skewed"), inputs(ALIGNED, "swiglu", torch.bfloat16)
    truth = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    out, expected = moe_ffn(ids=ids, activation="swiglu", **given), loop(ids=ids, activation="swiglu", **truth)
    assert out.dtype == torch.bfloat16 and relative(out, expected) < 0.01
    assert_alike(gradients(out, given), gradients(expected, truth), 0.02)


def test_a_gradient_that_is_one_number_everywhere() -> None:
    ids, given = chosen(ALIGNED, "random"), inputs(ALIGNED, dtype=torch.float32)
    moe_ffn(ids=ids, activation="gelu", **given).sum().backward()  # stride 0, which the grouped product itself refuses
    w1 = given["w1"].grad
    assert w1 is not None and w1.any()


def test_tokens_do_not_see_each_other() -> None:
    ids, given = chosen(ODD, "random"), inputs(ODD)
    order = torch.randperm(ODD.tokens, generator=torch.Generator().manual_seed(3))
    moved = given | {"x": given["x"][order], "gates": given["gates"][order]}
    out = moe_ffn(ids=ids, activation="gelu", **given)
    assert relative(moe_ffn(ids=ids[order], activation="gelu", **moved), out[order]) < 1e-15


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("by_expert", [False, True])
def test_two_runs_agree_bit_for_bit(by_expert: bool) -> None:
    size = Size(600, 2, 4, 64, 64, 64)  # enough for PyTorch to split its work
    given = inputs(size, dtype=torch.float32)

    def run() -> list[Tensor]:
        if by_expert:
            tokens = torch.randint(size.tokens, (size.experts, 300), generator=torch.Generator().manual_seed(0))
            out = moe_ffn_by_expert(tokens=tokens, activation="gelu", **given | {"gates": normal(*tokens.shape, dtype=torch.float32)})
            used = {name: value for name, value in given.items() if name != "gates"}
            return [out, *gradients(out, used).values()]
        out = moe_ffn(ids=chosen(size, "skewed"), activation="gelu", **given)
        return [out, *gradients(out, given).values()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("capacity", [1, 5, ALIGNED.tokens])
def test_experts_that_choose_their_tokens(capacity: int) -> None:
    tokens, given = by_expert(capacity)
    out = moe_ffn_by_expert(tokens=tokens, activation="swiglu", **given)
    expected = reference.moe_ffn_by_expert(tokens=tokens, activation="swiglu", **given)
    assert relative(out, expected) < 1e-14
    assert_alike(gradients(out, given), gradients(expected, given), 1e-13)
    left = sorted(set(range(ALIGNED.tokens)) - set(tokens.flatten().tolist()))
    assert bool(left) == (capacity < ALIGNED.tokens) and not out[left].any()


def test_the_two_choices_are_one_where_they_choose_alike() -> None:
    tokens, given = by_expert(ALIGNED.tokens)
    place = tokens.argsort(1)  # where each expert has each token
    ids = torch.arange(4).expand(ALIGNED.tokens, -1)
    by_token = given | {"gates": given["gates"].gather(1, place).T}
    expected = moe_ffn(ids=ids, activation="swiglu", **by_token)
    assert relative(moe_ffn_by_expert(tokens=tokens, activation="swiglu", **given), expected) < 1e-14


@pytest.mark.parametrize("shape", [(0, 2), (5, 0)], ids=["no tokens", "no slots"])
def test_nothing_chosen_is_nothing_added(shape: tuple[int, int]) -> None:
    size = ODD._replace(tokens=shape[0], slots=shape[1])
    out = moe_ffn(ids=torch.zeros(shape, dtype=torch.int64), activation="gelu", **inputs(size))
    assert out.shape == (shape[0], ODD.out) and not out.any()


def test_autocast_says_what_it_computes_in() -> None:
    ids, given = chosen(ALIGNED, "random"), inputs(ALIGNED, dtype=torch.float32)
    half = {name: value.detach().bfloat16() for name, value in given.items()} | {"gates": given["gates"].detach()}
    with torch.autocast("cpu", torch.bfloat16):
        out = moe_ffn(ids=ids, activation="gelu", **given)
    assert torch.equal(out, moe_ffn(ids=ids, activation="gelu", **half))
    assert all(grad.dtype == torch.float32 for grad in gradients(out, given).values())


def test_on_the_meta_device_it_has_a_shape() -> None:
    meta: dict[str, Any] = {name: value.to("meta") for name, value in inputs(ODD).items()}
    out = moe_ffn(ids=chosen(ODD, "random").to("meta"), activation="gelu", **meta)
    assert out.is_meta and out.shape == (ODD.tokens, ODD.out)


def test_the_grouped_product_is_used_where_it_fits() -> None:
    x, w = torch.zeros(4, 8), torch.zeros(3, 12, 8)
    assert products.is_grouped(x, w) and products.is_grouped(x.bfloat16(), torch.zeros(3, 16, 8).bfloat16())
    assert not products.is_grouped(x.bfloat16(), w.bfloat16())  # 12 numbers are 24 bytes
    assert not products.is_grouped(x.double(), w.double())
    assert not products.is_grouped(torch.zeros(4, 7), torch.zeros(3, 12, 7))
    assert not products.is_grouped(x[:0], w)


def test_weights_that_are_not_where_the_grouped_product_wants_them() -> None:
    ids, given = chosen(ALIGNED, "random"), inputs(ALIGNED, dtype=torch.float32)
    expected = moe_ffn(ids=ids, activation="gelu", **given)
    odd = {name: torch.empty(value.numel() + 1)[1:].view_as(value).copy_(value.detach()) for name, value in given.items()}
    turned = odd | {"w1": given["w1"].detach().transpose(1, 2).contiguous().transpose(1, 2)}
    assert odd["x"].data_ptr() % 16
    assert relative(moe_ffn(ids=ids, activation="gelu", **turned), expected) < 1e-6


def test_a_compiled_caller_breaks_its_graph_and_goes_on() -> None:
    ids, given = chosen(ALIGNED, "random"), inputs(ALIGNED, dtype=torch.float32)
    compiled = torch.compile(lambda: 2 * moe_ffn(ids=ids, activation="gelu", **given), backend="eager")
    assert torch.equal(compiled(), 2 * moe_ffn(ids=ids, activation="gelu", **given))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(13, 8)}, "x: (13, 8); w1 (5, 3, 7) with gelu needs (13, 7)"),
    ({"x": torch.zeros(13, 7, dtype=torch.int64)}, "x: (13, 7) torch.int64; it is (tokens, width), floating point"),
    ({"ids": torch.zeros(13, 2, dtype=torch.int32)}, "ids: (13, 2) torch.int32; it has two dimensions, int64"),
    ({"ids": torch.full((13, 2), 5)}, "ids: 5 to 5; allowed: 0 to 4"),
    ({"gates": torch.zeros(13, 3)}, "gates: (13, 3) torch.float32; ids is (13, 2)"),
    ({"w1": torch.zeros(3, 7)}, "w1, w2: (3, 7), (5, 9, 3); they are (experts, outputs, inputs)"),
    ({"w2": torch.zeros(5, 9, 4)}, "w2: (5, 9, 4); w1 (5, 3, 7) with gelu needs (5, 9, 3)"),
    ({"b1": torch.zeros(3)}, "b1: (3,); w1 (5, 3, 7) with gelu needs (5, 3)"),
    ({"b2": torch.zeros(5, 3)}, "b2: (5, 3); w1 (5, 3, 7) with gelu needs (5, 9)"),
    ({"activation": "relu"}, "activation: 'relu'; allowed: gelu, gelu-approximate, silu, geglu, geglu-approximate, swiglu"),
    ({"gates": torch.zeros(13, 2, device="meta")}, "gates: on meta, but x on cpu"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[f"{next(iter(changes))}-{i}" for i, (changes, _) in enumerate(BAD)])
@pytest.mark.parametrize("fn", [moe_ffn, reference.moe_ffn], ids=["op", "reference"])
def test_bad_input_is_named(fn: Callable[..., Tensor], changes: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"ids": chosen(ODD, "random"), "activation": "gelu", **inputs(ODD)}
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        fn(**right | changes)


def test_experts_that_choose_have_a_row_each() -> None:
    tokens, given = by_expert(3)
    with pytest.raises(ValueError, match=r"^tokens: \(3, 3\); it has a row for each of 4 experts"):
        moe_ffn_by_expert(tokens=tokens[:3], activation="swiglu", **given | {"gates": given["gates"][:3]})
    with pytest.raises(ValueError, match=r"^tokens: 30 to 30; allowed: 0 to 23"):
        moe_ffn_by_expert(tokens=torch.full_like(tokens, 30), activation="swiglu", **given)


def test_the_doctor_is_told_which_path_there_is() -> None:
    assert "grouped product" in describe() and torch.__version__ in describe()
