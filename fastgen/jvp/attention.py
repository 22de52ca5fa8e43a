"""Attention inside an exact pass: PyTorch's fused attention has no forward-mode rule, so its calls are computed by our own kernel."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass
class AttentionCalls:
    """How the attention calls of exact passes were computed.

    fused: value and tangent in one launch; constant: no input had a tangent, so PyTorch's own attention ran; math: PyTorch's unfused
    attention, for what the kernel does not take (a mask with a tangent or gradient, head sizes above 256, empty tensors).
    order: one entry for each call, its kind and the inputs that had a tangent; not compared.
    """

    fused: int = 0
    constant: int = 0
    math: int = 0
    order: list[str] = field(default_factory=list, compare=False, repr=False)

    @property
    def total(self) -> int:
        return self.fused + self.constant + self.math

    def add(self, kind: Literal["fused", "constant", "math"], moving: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        self.order.append(f"{kind} with {f'tangents of {moving}' if moving else 'no tangent'}")


def attend(
    calls: AttentionCalls,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, (..., H, N, d) with any of its inputs dual. ValueError where PyTorch refuses the call, and for dropout."""
    if dropout_p > 0:
        raise ValueError(f"dropout_p: {dropout_p}; attention under tangent() draws no dropout, so networks stay in eval mode")
    query, key, value = _autocast(query), _autocast(key), _autocast(value)
    attn_mask = None if attn_mask is None else _autocast(attn_mask)
    primals, tangents = zip(*(forward_ad.unpack_dual(x) for x in (query, key, value)), strict=True)
    mask_moves = attn_mask is not None and (_needs_grad(attn_mask) or forward_ad.unpack_dual(attn_mask).tangent is not None)
    moving = ", ".join(name for name, dx in zip("qkv", tangents, strict=True) if dx is not None)
    plain = partial(F.scaled_dot_product_attention, query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    if not mask_moves and not moving:
        calls.add("constant", moving)
        return plain()
    shape = _output_shape(*(_kind(x) for x in (query, key, value, attn_mask)), is_causal, enable_gqa)
    if not mask_moves and query.shape[-1] == value.shape[-1] <= 256 and all(x.numel() for x in primals):
        calls.add("fused", moving)
        return _fused(primals, tangents, attn_mask, shape, scale=scale, causal=is_causal)
    calls.add("math", moving)
    warnings.warn("tangent() runs PyTorch's unfused attention, which is slow, for a learned mask or head sizes the kernel lacks", stacklevel=2)
    with sdpa_kernel(SDPBackend.MATH):
        return plain()


def _needs_grad(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _autocast(x: Tensor) -> Tensor:
    """What autocast does to an input of attention, tangent included; it would not cast for a kernel of ours."""
    casts = torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if casts else x


# Shape and dtype of an argument.
Kind = tuple[torch.Size, torch.dtype]


def _kind(x: Tensor | None) -> Kind | None:
    return None if x is None else (x.shape, x.dtype)


@lru_cache(maxsize=1024)
def _output_shape(query: Kind, key: Kind, value: Kind, mask: Kind | None, is_causal: bool, enable_gqa: bool) -> torch.Size:
    """PyTorch's own answer, from tensors without data: the output's shape, or ValueError where it refuses the call.

    Unequal heads without enable_gqa, a mask beside is_causal, of another dtype or that would enlarge the scores, lengths that do not fit, …
    """
    q, k, v, m = (None if kind is None else torch.empty(kind[0], dtype=kind[1], device="meta") for kind in (query, key, value, mask))
    attend = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=enable_gqa)  # type: ignore[arg-type]
    try:
        shape = attend(attn_mask=m, is_causal=is_causal).shape
        # Tensors without data may grow where real ones add the mask in place.
        if m is not None and shape != attend().shape:
            raise RuntimeError(f"the mask would enlarge the output to {tuple(shape)}")
    except (RuntimeError, IndexError) as error:
        given = ", ".join(
            f"{n} {tuple(x[0])} {x[1]}" for n, x in zip(("query", "key", "value", "attn_mask"), (query, key, value, mask), strict=True) if x
        )
        raise ValueError(
            f"attention: PyTorch refuses {given}, is_causal={is_causal}, enable_gqa={enable_gqa}: {str(error).splitlines()[0]}"
        ) from error
    return shape


def _fused(
    primals: Sequence[Tensor], tangents: Sequence[Tensor | None], mask: Tensor | None, shape: torch.Size, *, scale: float | None, causal: bool
) -> Tensor:
    """One launch for the output and its tangent, joined to a dual of the shape given; gradients flow through the output alone."""
    from fastgen_kernels.jvp_attention import jvp_attention

    batch, heads = shape[:-3], shape[-3] if len(shape) > 2 else 1
    # The kernel takes fewer heads for keys and values than for queries, but as many for both.
    key_heads, value_heads = (x.shape[-3] if x.ndim > 2 else 1 for x in primals[1:])
    unlike = key_heads != value_heads or heads != (primals[0].shape[-3] if primals[0].ndim > 2 else 1)

    def bhnd(x: Tensor) -> Tensor:
        x = x.reshape((1,) * (3 - x.ndim) + x.shape)
        return x.expand(*batch, *x.shape[-3:]).reshape(-1, *x.shape[-3:])

    def rows(x: Tensor) -> Tensor:
        x = bhnd(x)
        return x.repeat_interleave(heads // x.shape[1], 1) if unlike else x

    mask = None if mask is None else bhnd(mask.detach()[(0,) * (mask.ndim - len(shape))])
    q, k, v = (rows(x) for x in primals)
    tq, tk, tv = (None if dx is None else rows(dx.detach()) for dx in tangents)
    with torch.autocast(q.device.type, enabled=False):
        o, to, _ = jvp_attention(q, k, v, tq, tk, tv, scale=scale, causal=causal, mask=mask)
    assert to is not None
    return forward_ad.make_dual(o.reshape(shape), to.reshape(shape))
