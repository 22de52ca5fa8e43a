"""What tangents are compared with, and a small network with attention to compare them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

F64 = torch.float64


def normal(*size: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).norm() / b.detach().norm())


def math_tangent(fn: Callable[..., Tensor], primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
    """Forward AD through PyTorch's unfused attention."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        duals = [x if dx is None else forward_ad.make_dual(x.clone(), dx) for x, dx in zip(primals, tangents, strict=True)]
        out = forward_ad.unpack_dual(fn(*duals))
    assert out.tangent is not None
    return out.primal, out.tangent


class Block(nn.Module):
    """Self-attention and attention to a fixed text, in a residual network of tokens (B, N, 16) and times (B,)."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.gradient_checkpointing = heads, False
        self.norm, self.time = nn.LayerNorm(16), nn.Linear(16, 16)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(16, 16) for _ in range(4))
        self.text_q, self.act = nn.Linear(16, 16), nn.SiLU()
        self.register_buffer("text", normal(5, 16, seed=9, dtype=torch.float32))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)

    def residual(self, x: Tensor, t: Tensor) -> Tensor:
        phase = 10 * t[:, None] * torch.linspace(0.1, 1, 8).to(t)
        h = self.norm(x) + self.time(torch.cat([phase.sin(), phase.cos()], 1).to(x.dtype))[:, None]
        h = h + self.attend(self.to_q(h), self.to_k(h), self.to_v(h))
        text = self.get_buffer("text").to(h.dtype).expand(len(x), -1, -1)
        return self.to_out(self.act(h + self.attend(self.text_q(h), text, text)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return x + checkpoint(self.residual, x, t, use_reentrant=False)  # type: ignore[return-value, operator]
        return x + self.residual(x, t)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, t)
        return x


def network(dtype: torch.dtype = F64) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network().to(dtype).eval()


def inputs(dtype: torch.dtype = F64) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (normal(2, 7, 16, dtype=dtype), torch.tensor([0.3, 0.8], dtype=dtype)), (
        normal(2, 7, 16, seed=1, dtype=dtype),
        torch.tensor([1.0, -0.5], dtype=dtype),
    )


def gradient(net: nn.Module, out: Tensor) -> Tensor:
    """Of a random linear loss, all parameters in one vector."""
    weight = normal(*out.shape, seed=5).to(out)
    grads = torch.autograd.grad((out * weight).sum(), [p for p in net.parameters() if p.requires_grad])
    return torch.cat([grad.flatten() for grad in grads])


@torch.library.custom_op("fastgen_test::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x


class Opaque(nn.Module):
    """An operator without a forward-mode rule: its tangent is silently zero."""

    def forward(self, x: Tensor) -> Tensor:
        return double(x)


def by_numbers(x: Tensor) -> Tensor:
    """A copy by way of Python's numbers, where nothing can follow it: finite differences alone see that its tangent is gone."""
    return torch.tensor(x.detach().tolist(), dtype=x.dtype)


class ByNumbers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return by_numbers(x)
