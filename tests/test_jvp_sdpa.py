"""`F.scaled_dot_product_attention` under tangent(): what PyTorch refuses is refused, and the rest has PyTorch's values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tangents import F64, math_tangent, normal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.jvp import tangent

FOUR, CROSS = (2, 4, 7, 8), (2, 4, 5, 8)


def calls() -> Iterator[Any]:
    """(shapes of query, key and value, or tensors; keyword arguments)."""

    def case(name: str, q: Any, k: Any, v: Any = None, **kwargs: Any) -> Any:
        return pytest.param((q, k, k if v is None else v), kwargs, id=name)

    for name, q, k, v in (
        ("heads_2", FOUR, (2, 2, 5, 8), None),
        ("heads_1", FOUR, (2, 1, 5, 8), None),
        ("heads_3", FOUR, (2, 3, 5, 8), None),
        ("more_key_heads", (2, 2, 7, 8), CROSS, None),
        ("one_query_head", (2, 1, 7, 8), CROSS, None),
        ("one_head_of_keys", FOUR, (2, 1, 5, 8), CROSS),
        ("one_head_of_values", FOUR, CROSS, (2, 1, 5, 8)),
        ("two_heads_of_keys_one_of_values", FOUR, (2, 2, 5, 8), (2, 1, 5, 8)),
        ("rank_2", (7, 8), (5, 8), None),
        ("rank_3", (4, 7, 8), (2, 5, 8), None),
        ("equal_heads", FOUR, CROSS, None),
    ):
        yield case(name, q, k, v)
        yield case(f"{name}_gqa", q, k, v, enable_gqa=True)
    yield case("grouped_with_mask_of_heads", FOUR, (2, 2, 5, 8), enable_gqa=True, attn_mask=normal(4, 7, 5) > -1)
    yield case("causal", FOUR, CROSS, is_causal=True)
    yield case("causal_wide", CROSS, FOUR, is_causal=True)
    yield case("causal_with_bool_mask", FOUR, CROSS, is_causal=True, attn_mask=torch.ones(7, 5, dtype=torch.bool))
    yield case("causal_with_float_mask", FOUR, CROSS, is_causal=True, attn_mask=normal(7, 5))
    for shape in ((), (5,), (7,), (7, 5), (7, 1), (1, 5), (7, 6), (4, 7, 5), (2, 7, 5), (2, 1, 7, 5), (2, 4, 1, 1), (1, 2, 4, 7, 5), (3, 2, 4, 7, 5)):
        yield case(f"mask_{'x'.join(map(str, shape))}", FOUR, CROSS, attn_mask=normal(*shape, seed=7))
        yield case(f"bool_mask_{'x'.join(map(str, shape))}", FOUR, CROSS, attn_mask=normal(*shape, seed=7) > -1)
    for shape in ((1, 4, 7, 5), (2, 4, 7, 5), (1, 1, 4, 7, 5)):
        yield case(f"rank_3_mask_{len(shape)}_{shape[0]}", (4, 7, 8), (4, 5, 8), attn_mask=normal(*shape, seed=7))
    for shape in ((7, 5), (4, 7, 5), (1, 1, 7, 5)):
        yield case(f"rank_2_mask_{len(shape)}", (7, 8), (5, 8), attn_mask=normal(*shape, seed=7))
    yield case("rank_5_mask", (2, 3, 4, 7, 8), (2, 3, 4, 5, 8), attn_mask=normal(3, 1, 7, 5, seed=7) > -1)
    yield case("mask_enlarges_batch", (1, 4, 7, 8), (1, 4, 5, 8), attn_mask=normal(2, 4, 7, 5))
    yield case("mask_enlarges_heads", (2, 1, 7, 8), (2, 1, 5, 8), attn_mask=normal(2, 4, 7, 5))
    yield case("mask_enlarges_queries", (2, 4, 1, 8), CROSS, attn_mask=normal(7, 5))
    yield case("mask_enlarges_keys", FOUR, (2, 4, 1, 8), attn_mask=normal(7, 5))
    for mask in (torch.int64, torch.uint8, torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            q, k = normal(*FOUR, seed=1).to(dtype), normal(*CROSS, seed=2).to(dtype)
            yield case(f"mask_{mask}_on_{dtype}".replace("torch.", ""), q, k, attn_mask=normal(7, 5).to(mask))
    yield case("dtypes_of_keys", FOUR, normal(*CROSS).float())
    yield case("dtypes_of_values", FOUR, CROSS, normal(*CROSS).float())
    yield case("head_sizes_of_keys", FOUR, (2, 4, 5, 6), CROSS)
    yield case("lengths_of_values", FOUR, CROSS, (2, 4, 6, 8))
    yield case("one_value", FOUR, CROSS, (2, 4, 1, 8))
    yield case("batches", FOUR, (3, 4, 5, 8))
    yield case("one_batch_of_queries", (1, 4, 7, 8), CROSS)
    yield case("batches_of_rank_5", (2, 3, 4, 7, 8), (1, 3, 4, 5, 8), (2, 1, 4, 5, 8))
    yield case("ranks", (4, 7, 8), CROSS)
    yield case("no_keys", FOUR, (2, 4, 0, 8))
    yield case("no_queries", (2, 4, 0, 8), CROSS)
    yield case("no_batch", (0, 4, 7, 8), (0, 4, 5, 8))
    yield case("no_scale", FOUR, CROSS, scale=0.0)
    yield case("negative_scale", FOUR, CROSS, scale=-0.3)
    yield case("row_without_keys", FOUR, CROSS, attn_mask=(torch.arange(7) != 2)[:, None].expand(7, 5))
    yield case("row_of_minus_infinity", FOUR, CROSS, attn_mask=torch.zeros(7, 5, dtype=F64).index_fill(0, torch.tensor(2), -torch.inf))
    yield case("row_of_large_bias", FOUR, CROSS, attn_mask=torch.zeros(7, 5, dtype=F64).index_fill(0, torch.tensor(2), -1e4))


@pytest.mark.filterwarnings("ignore:tangent.. runs PyTorch's unfused")
@pytest.mark.parametrize(("rows", "kwargs"), list(calls()))
def test_every_call_is_pytorchs_own(rows: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """PyTorch's unfused attention is the measure: the only one with forward mode, and its CPU kernel reads past the end of short values."""
    q, k, v = (normal(*x, seed=i) if isinstance(x, tuple) else x for i, x in enumerate(rows, start=1))
    tangents = [normal(*x.shape, seed=i).to(x.dtype) for i, x in enumerate((q, k, v), start=4)]
    attend = partial(F.scaled_dot_product_attention, **kwargs)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            attend(q, k, v)
    except (RuntimeError, IndexError):
        with pytest.raises(ValueError, match=r"attention: PyTorch refuses query \("):
            tangent(attend, (q, k, v), tangents)
        return
    bound = 1e-10 if q.dtype == F64 else 2e-6 if q.dtype == torch.float32 else 2e-2
    ours, expected = tangent(attend, (q, k, v), tangents), math_tangent(attend, (q, k, v), tangents)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=bound, rtol=bound)


def test_refused_calls_are_few_and_known() -> None:
    """The table would be idle if PyTorch took everything."""
    refused = []
    for case in calls():
        q, k, v = (torch.zeros(x, dtype=F64) if isinstance(x, tuple) else x for x in case.values[0])
        try:
            with sdpa_kernel(SDPBackend.MATH):
                F.scaled_dot_product_attention(q, k, v, **case.values[1])
        except (RuntimeError, IndexError):
            refused.append(case.id)
    assert {"heads_2", "heads_3_gqa", "more_key_heads_gqa", "causal_with_bool_mask", "mask_float64_on_float32", "mask_enlarges_batch"} <= set(refused)
    assert not {"heads_2_gqa", "heads_1", "one_query_head", "causal", "mask_float32_on_bfloat16", "no_keys"} & set(refused)


def test_a_tensor_without_a_tangent_changes_nothing_about_refusals() -> None:
    q, k = normal(*FOUR), normal(2, 2, 5, 8)

    def attend(q: Tensor, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k) + x

    for tangents in ((None, normal(*FOUR)), (normal(*FOUR), None)):
        with pytest.raises((ValueError, RuntimeError)):
            tangent(attend, (q, q), tangents)
