"""Attention problems: their tensors, what is true of them in float64, and their arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from fastgen_kernels.jvp_attention.reference import jvp_attention as reference
from torch import Tensor

Work = Literal["forward", "jvp", "backward", "jvp_backward"]
WIDTH = 2048  # heads times head size of all problems that are no model's
TEXT = 512  # keys of cross-attention
CHECKED = 256  # queries, and keys, whose gradients are checked
RESULTS: dict[Work, tuple[str, ...]] = {
    "forward": ("o",),
    "jvp": ("o", "to"),
    "backward": ("o", "dq", "dk", "dv"),
    "jvp_backward": ("o", "to", "dq", "dk", "dv"),
}


@dataclass(frozen=True)
class Inputs:
    """q, k, v, their tangents (None where a primal is constant) and the gradient of the output: (1, heads, tokens, head size)."""

    q: Tensor
    k: Tensor
    v: Tensor
    tq: Tensor | None
    tk: Tensor | None
    tv: Tensor | None
    do: Tensor

    @property
    def primals(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def tangents(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.tq, self.tk, self.tv


@dataclass(frozen=True)
class Problem:
    """tangents: "qkv", or "q" where keys and values are constant (cross-attention to text); causal: query i sees keys 0…i."""

    name: str
    heads: int
    num_queries: int
    num_keys: int
    head_size: int
    tangents: Literal["qkv", "q"] = "qkv"
    causal: bool = False

    def inputs(self, device: str, dtype: torch.dtype) -> Inputs:
        """Standard normal, laid out as diffusers does: tokens before heads."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(tokens: int) -> Tensor:
            return torch.randn(1, tokens, self.heads, self.head_size, generator=generator, device=device, dtype=dtype).transpose(1, 2)

        primals = [draw(n) for n in (self.num_queries, self.num_keys, self.num_keys)]
        tangents = [draw(x.shape[2]) if name in self.tangents else None for name, x in zip("qkv", primals, strict=True)]
        return Inputs(*primals, *tangents, do=draw(self.num_queries))

    def flops(self, work: Work) -> float:
        """4 N M d a head for the output, 3 times that with all tangents and twice with the queries' alone; 2.5 times more for a gradient, which
        computes the scores again; half of it where causal."""
        forward = 4 * self.heads * self.num_queries * self.num_keys * self.head_size / (2 if self.causal else 1)
        tangent = 3 if self.tangents == "qkv" else 2
        return forward * {"forward": 1, "jvp": tangent, "backward": 1 + 2.5, "jvp_backward": tangent + 2.5}[work]

    def score_bytes(self) -> int:
        """What MATH attention under forward mode holds, about: eight arrays of all scores in fp32."""
        return 8 * 4 * self.heads * self.num_queries * self.num_keys


Truth = dict[str, tuple[Tensor, Tensor]]


def truth(problem: Problem, inputs: Inputs) -> Truth:
    """What a part of each result is in float64, and its tokens: o and to for all queries, gradients for some queries and keys, of the first and
    the last head. With P = softmax(S), D = rowsum(dO o) and dS = P (dO Vᵀ − D): dV = Pᵀ dO, dQ = scale dS K, dK = scale dSᵀ Q."""
    q, k, v, tq, tk, tv, do = (None if x is None else _some_heads(x).double() for x in vars(inputs).values())
    assert q is not None and k is not None and v is not None and do is not None
    o, to, lse = reference(q, k, v, tq, tk, tv, causal=problem.causal)
    assert to is not None
    queries, keys = (_spread(n, q.device) for n in (problem.num_queries, problem.num_keys))
    every_query, every_key = (torch.arange(n, device=q.device) for n in (problem.num_queries, problem.num_keys))
    scale, delta = problem.head_size**-0.5, (do * o).sum(-1, keepdim=True)

    def gradients(i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """P and dS of queries i and keys j, (1, heads, i, j)."""
        hidden = (every_key[j] > i[:, None]) & problem.causal
        p = (scale * q[:, :, i] @ k[:, :, j].mT - lse[:, :, i, None]).exp().masked_fill_(hidden, 0.0)
        return p, p * (do[:, :, i] @ v[:, :, j].mT - delta[:, :, i])

    _, rows = gradients(queries, every_key)
    p, columns = gradients(every_query, keys)
    return {
        "o": (o, every_query),
        "to": (to, every_query),
        "dq": (scale * rows @ k, queries),
        "dk": (scale * columns.mT @ q, keys),
        "dv": (p.mT @ do, keys),
    }


def errors(found: dict[str, Tensor], true: Truth) -> dict[str, float]:
    """Relative Frobenius error of each result, the larger one of two heads, as `error_o` and so on."""
    said = {}
    for name, x in found.items():
        wanted, tokens = true[name]
        difference = _some_heads(x.detach())[:, :, tokens].double() - wanted
        said[f"error_{name}"] = (difference.flatten(2).norm(dim=-1) / wanted.flatten(2).norm(dim=-1)).max().item()
    return said


def _some_heads(x: Tensor) -> Tensor:
    return x[:, [0, -1]]


def _spread(tokens: int, device: torch.device) -> Tensor:
    """Some of them, the first and the last among these."""
    return torch.linspace(0, tokens - 1, min(tokens, CHECKED), device=device, dtype=torch.float64).round().long()


def _thousands(n: int) -> str:
    return f"{n // 1024}k"


def self_attention(head_size: int, n: int, causal: bool = False) -> Problem:
    return Problem(f"{'causal' if causal else 'self'}_{_thousands(n)}_d{head_size}", WIDTH // head_size, n, n, head_size, causal=causal)


def text_attention(head_size: int, n: int) -> Problem:
    return Problem(f"text_{_thousands(n)}_d{head_size}", WIDTH // head_size, n, TEXT, head_size, "q")
