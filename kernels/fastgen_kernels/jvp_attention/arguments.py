"""What may be passed to jvp_attention, checked once for the kernel and for the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_SIZE = 256


@dataclass(frozen=True)
class Arguments:
    """Checked arguments. q: (B, Hq, Nq, D); k, v: (B, Hkv, Nk, D); tangents like their primals or None; mask: None or a view (B, Hq, Nq, Nk)."""

    q: Tensor
    k: Tensor
    v: Tensor
    tq: Tensor | None
    tk: Tensor | None
    tv: Tensor | None
    scale: float
    causal: bool
    mask: Tensor | None

    @property
    def has_tangents(self) -> bool:
        return self.tq is not None or self.tk is not None or self.tv is not None

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def key_only_mask(self) -> bool:
        """The mask is the same for every query."""
        return self.mask is not None and (self.mask.stride(2) == 0 or self.mask.shape[2] == 1)

    def with_last_stride_one(self) -> Arguments:
        """The same with rows in one piece, as the kernels need them: copies only what was laid out otherwise (BSHD seen as BHSD is not)."""
        changes = {name: x.contiguous() for name, x in vars(self).items() if name in ROWS and x is not None and x.stride(-1) != 1}
        return replace(self, **changes) if changes else self


KEY_ROWS = ("k", "v", "tk", "tv")
ROWS = ("q", "tq", *KEY_ROWS)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    *,
    scale: float | None,
    causal: bool,
    mask: Tensor | None,
    dropout_p: float,
) -> Arguments:
    """Arguments of one call, tangents detached and the mask expanded (a view). Raises ValueError that names the wrong argument."""
    named = {"q": q, "k": k, "v": v, "tq": tq, "tk": tk, "tv": tv, "mask": mask}
    for name, tensor in named.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(f"{name} carries a forward-mode tangent, which would be lost: pass tangents as tq, tk, tv, or use fastgen.jvp.tangent")
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p must be 0: attention with dropout has no tangent here (got {dropout_p})")
    _check_primals(q, k, v)
    for name, tangent, primal in (("tq", tq, q), ("tk", tk, k), ("tv", tv, v)):
        if tangent is not None:
            _check_like(name, tangent, primal)
    tq, tk, tv = (None if tangent is None else tangent.detach() for tangent in (tq, tk, tv))
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return Arguments(q, k, v, tq, tk, tv, factor, bool(causal), None if mask is None else _expand_mask(mask, q, k))


def _check_primals(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, tokens, head size); got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64; got {_name(tensor.dtype)}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} must not be empty; got shape {tuple(tensor.shape)}")
    if q.shape[-1] > MAX_HEAD_SIZE:
        raise ValueError(f"q has head size {q.shape[-1]}; at most {MAX_HEAD_SIZE} is supported")
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(f"k must have q's batch and head size; got k {tuple(k.shape)} for q {tuple(q.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k's number of heads must divide q's; got {k.shape[1]} for {q.shape[1]}")
    _check_like("k", k, q, shape=False)
    _check_like("v", v, k, "k")


def _check_like(name: str, tensor: Tensor, other: Tensor, other_name: str | None = None, shape: bool = True) -> None:
    other_name = other_name or (name[1:] if name.startswith("t") else "q")
    if shape and tensor.shape != other.shape:
        raise ValueError(f"{name} must have {other_name}'s shape {tuple(other.shape)}; got {tuple(tensor.shape)}")
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name} must have {other_name}'s dtype {_name(other.dtype)}; got {_name(tensor.dtype)}")
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}; got {tensor.device}")


def _expand_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A view (B, Hq, Nq, Nk) of whatever broadcasts to it."""
    scores = (*q.shape[:3], k.shape[2])
    if mask.dtype != torch.bool and mask.dtype not in DTYPES:
        raise ValueError(f"mask must be bool (True = attend) or floating point (added to the scores); got {_name(mask.dtype)}")
    if mask.device != q.device:
        raise ValueError(f"mask must be on q's device {q.device}; got {mask.device}")
    if mask.requires_grad:
        raise ValueError("mask must not require a gradient: the backward pass gives it none; pass mask.detach()")
    if not 1 <= mask.dim() <= 4 or any(size not in (1, full) for size, full in zip(reversed(mask.shape), reversed(scores), strict=False)):
        raise ValueError(f"mask must have one to four dimensions that broadcast to (batch, heads, queries, keys) = {scores}; got {tuple(mask.shape)}")
    return mask.expand(scores)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
