"""Inputs, truth and measurements for jvp_attention's tests. Importing this imports no Triton: a worker process decides how that runs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative Frobenius error of one head's output or tangent; bf16 with offset keys or values may have twice its bound.
BOUNDS = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 5e-3}
GRADIENT_BOUNDS = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
FACTORS: dict[str, list[Any]] = {
    "dtype": ["fp32", "fp16", "bf16"],
    "lengths": [(1, 1), (1, 77), (17, 128), (77, 17), (128, 77), (128, 1), (77, 333), (333, 17)],
    "head_size": [24, 40, 64, 72, 80, 96, 112, 128, 160, 256],
    "heads": [(1, 1), (2, 2), (2, 1), (3, 1)],
    "mask": ["none", "causal", "key_bool", "key_float", "full_bool", "full_float", "bias", "dead_rows", "causal_key_bool"],
    "tangents": ["qkv", "q", "qk", "kv", "v"],
    "layout": ["bhsd", "bshd", "packed", "own_tangent_strides"],
    "offset": [(0, 0), (0, 8), (8, 8)],
}


@dataclass(frozen=True)
class Case:
    """One problem; offset: constant added to all keys and to all values."""

    dtype: str = "fp32"
    lengths: tuple[int, int] = (77, 45)
    head_size: int = 16
    heads: tuple[int, int] = (2, 1)
    mask: str = "none"
    tangents: str = "qkv"
    layout: str = "bshd"
    offset: tuple[int, int] = (0, 0)
    batch: int = 1

    @property
    def bound(self) -> float:
        return BOUNDS[self.dtype] * (2 if self.dtype == "bf16" and any(self.offset) else 1)

    def __str__(self) -> str:
        numbers = "x".join(map(str, (*self.lengths, self.head_size)))
        heads, offset = ("over".join(map(str, pair)) for pair in (self.heads, self.offset))
        return f"{self.dtype}-{numbers}-{heads}-{self.mask}-{self.tangents}-{self.layout}-{offset}"


def pairwise(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Rows in which every two values of two factors meet at least once: greedily, the best of some random completions of an uncovered pair."""
    rng = random.Random(seed)
    names = list(factors)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}

    def covered(row: dict[str, Any]) -> set[Any]:
        return {((a, row[a]), (b, row[b])) for a, b in itertools.combinations(names, 2)} & missing

    rows = []
    while missing:
        pair = min(missing, key=str)
        tries = [{name: rng.choice(factors[name]) for name in names} | dict(pair) for _ in range(60)]
        rows.append(max(tries, key=lambda row: len(covered(row))))
        missing -= covered(rows[-1])
    return rows


CASES = [Case(**row) for row in pairwise(FACTORS)]


def tensors(case: Case, device: str = "cpu") -> dict[str, Tensor | None]:
    """q, k, v, their tangents and the mask of a case, drawn on the CPU so that every device has the same."""
    generator = torch.Generator().manual_seed(sum(case.lengths) + case.head_size)
    (num_queries, num_keys), (heads, kv_heads), size = case.lengths, case.heads, case.head_size

    def draw(heads: int, tokens: int, layout: str, offset: float = 0.0) -> Tensor:
        x = torch.randn(case.batch, heads, tokens, size, generator=generator) + offset
        x = x.to(device, DTYPES[case.dtype])
        if layout == "bhsd":
            return x
        if layout == "bshd":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        # Part of a wider row, as in a fused projection; a token's stride is odd, so rows are not aligned.
        wide = torch.full((case.batch, tokens, heads, 3 * size + 1), torch.nan, dtype=x.dtype, device=device)
        wide[..., size : 2 * size] = x.transpose(1, 2)
        return wide[..., size : 2 * size].transpose(1, 2)

    primal, tangent = {"own_tangent_strides": ("bshd", "packed")}.get(case.layout, (case.layout, case.layout))
    key, value = case.offset
    q, k, v = draw(heads, num_queries, primal), draw(kv_heads, num_keys, primal, key), draw(kv_heads, num_keys, primal, value)
    tq, tk, tv = (draw(x.shape[1], x.shape[2], tangent) if name in case.tangents else None for name, x in zip("qkv", (q, k, v), strict=True))
    mask = make_mask(case, generator)
    return {"q": q, "k": k, "v": v, "tq": tq, "tk": tk, "tv": tv, "mask": None if mask is None else mask.to(device)}


def make_mask(case: Case, generator: torch.Generator) -> Tensor | None:
    """Each kind that diffusers or SDPA passes; every query of all but `dead_rows` and tiny problems sees some key."""
    batch, heads, (num_queries, num_keys) = case.batch, case.heads[0], case.lengths
    if case.mask in ("key_bool", "causal_key_bool"):
        return torch.rand(batch, 1, 1, num_keys, generator=generator) < 0.6
    if case.mask == "key_float":
        bias = torch.randn(batch, heads, 1, num_keys, generator=generator)
        return bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.3, -torch.inf)
    if case.mask == "full_bool":
        return torch.rand(num_queries, num_keys, generator=generator) < 0.6
    if case.mask == "full_float":
        return torch.randn(batch, 1, num_queries, num_keys, generator=generator).to(DTYPES[case.dtype])
    if case.mask == "bias":
        bias = -1e4 * (torch.rand(batch, 1, 1, num_keys, generator=generator) < 0.5).float()
        return bias.index_fill(3, torch.tensor(0), 0.0).to(DTYPES[case.dtype])
    if case.mask == "dead_rows":
        mask = torch.rand(batch, heads, num_queries, num_keys, generator=generator) < 0.6
        return mask.index_fill(2, torch.arange(0, num_queries, 3), False)
    return None


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """(o, lse) by the definition, for func.jvp; 0 and −inf where a query sees no key."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    bias = torch.zeros(s.shape, dtype=s.dtype, device=s.device)
    if mask is not None:
        bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
    if causal:
        bias = bias.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -torch.inf)
    dead = (bias == -torch.inf).all(-1, keepdim=True)
    s = s + bias.masked_fill(dead, 0.0)
    return (s.softmax(-1) @ v).masked_fill(dead, 0.0), s.logsumexp(-1).masked_fill(dead[..., 0], -torch.inf)


def truth(inputs: Mapping[str, Tensor | None], causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(o, to, lse) in float64 by torch.func.jvp."""
    q, k, v = (inputs[name].double() for name in "qkv")  # pyright: ignore[reportOptionalMemberAccess]
    tangents = tuple(torch.zeros_like(x) if t is None else t.double() for x, t in zip((q, k, v), map(inputs.get, ("tq", "tk", "tv")), strict=True))
    results, derivatives = torch.func.jvp(lambda q, k, v: naive(q, k, v, inputs["mask"], causal), (q, k, v), tangents)[:2]
    return results[0], derivatives[0], results[1]


def per_head(got: Tensor, true: Tensor, floor: Tensor | float) -> float:
    """Largest relative Frobenius error of a head; where the truth is (nearly) 0, relative to `floor` (per head) instead."""
    error = (got.double() - true).flatten(2).norm(dim=-1)
    return (error / true.flatten(2).norm(dim=-1).clamp_min(floor)).max().item()


def errors(case: Case, device: str = "cpu", config: tuple[int, int, int, int] | None = None, gradients: bool = False) -> dict[str, float]:
    """Errors of one case through the Triton kernel (o, to, lse and, if asked for, dq, dk, dv)."""
    from fastgen_kernels.jvp_attention import triton
    from fastgen_kernels.jvp_attention.arguments import check
    from fastgen_kernels.jvp_attention.configs import Config

    inputs, causal = tensors(case, device), case.mask.startswith("causal")
    leaves = {name: x.requires_grad_() if gradients and name in ("q", "k", "v") else x for name, x in inputs.items()}  # pyright: ignore[reportOptionalMemberAccess]
    args = check(**leaves, scale=None, causal=causal, dropout_p=0.0)  # pyright: ignore[reportArgumentType]
    o, to, lse = triton.attend(args, None if config is None else Config(*config))
    true_o, true_to, true_lse = truth({name: None if x is None else x.detach() for name, x in inputs.items()}, causal)
    assert to is not None and o.isfinite().all() and to.isfinite().all() and not to.requires_grad and not lse.requires_grad
    assert torch.equal(lse == -torch.inf, true_lse == -torch.inf)
    # Where the truth is 0 an error may be a thousandth of the bound, measured by the output.
    floor = 1e-3 * true_o.flatten(2).norm(dim=-1) + 1e-3
    seen = true_lse != -torch.inf
    found = {"o": per_head(o.detach(), true_o, floor), "to": per_head(to, true_to, floor)}
    found["lse"] = ((lse - true_lse).abs() / true_lse.abs().clamp_min(1.0))[seen].max().item() if seen.any() else 0.0
    return found | (_gradient_errors(o, inputs, causal) if gradients else {})


def _gradient_errors(o: Tensor, inputs: Mapping[str, Tensor | None], causal: bool) -> dict[str, float]:
    """dq, dk, dv of the kernel against autograd of the reference in float64."""
    from fastgen_kernels.jvp_attention.reference import jvp_attention as reference

    primals = [inputs[name] for name in "qkv"]
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(5)).to(o)
    got = torch.autograd.grad(o, primals, do)  # pyright: ignore[reportArgumentType, reportCallIssue]
    wide = [x.detach().double().requires_grad_() for x in primals if x is not None]
    true_o, _, _ = reference(*wide, causal=causal, mask=inputs["mask"])
    true = torch.autograd.grad(true_o, wide, do.double())
    return {f"d{name}": per_head(a, b, 1e-2 * do.double().norm()) for name, a, b in zip("qkv", got, true, strict=True)}
