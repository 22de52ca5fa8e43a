"""jvp_attention in plain PyTorch: any dtype, any device, scores in memory. What the kernel is held to, and what runs on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen_kernels.jvp_attention.arguments import Arguments, check

# Scores held at a time, in elements, while no graph is recorded: 256 MB in fp32 for each of three arrays.
CHUNK = 2**26


def jvp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Attention and its tangent; arguments, results and errors are those of `fastgen_kernels.jvp_attention.jvp_attention`.

    With P = softmax(S), S = scale·QKᵀ + mask and tS = scale·(tQ·Kᵀ + Q·tKᵀ): o = PV and to = (P⊙tS)V − rowsum(P⊙tS)⊙o + P·tV.
    float64 is computed in float64, everything else in float32; o is differentiable by autograd, to and lse are constants.
    """
    return attend(check(q, k, v, tq, tk, tv, scale=scale, causal=causal, mask=mask, dropout_p=dropout_p))


def attend(args: Arguments) -> tuple[Tensor, Tensor | None, Tensor]:
    """(o, to, lse) of checked arguments, a block of queries at a time."""
    num_queries = args.q.shape[2]
    num_scores = args.q.shape[:3].numel() * args.k.shape[2]
    step = max(1, num_queries * CHUNK // num_scores)
    with torch.autocast(args.q.device.type, enabled=False):
        centred = _Centred.of(args)
        parts = [_attend_rows(centred, first, min(step, num_queries - first)) for first in range(0, num_queries, step)]
    o, to, lse = parts[0] if len(parts) == 1 else tuple(None if x[0] is None else torch.cat(x, 2) for x in zip(*parts, strict=True))
    return o.to(args.q.dtype), None if to is None else to.to(args.q.dtype), lse


class _Centred(NamedTuple):
    """A problem in the dtype of its computation, a key/value head for each query head, and every key, value and key's tangent minus a constant.

    A common offset of the keys adds one number to all scores of a row, one of the keys' tangents to all their tangents, and one of the
    values one vector to all outputs. They cancel, but only to the precision of the offset (README.md): so they are taken out before, and
    put back in lse and o.
    """

    args: Arguments
    key: Tensor  # (B, Hq, 1, D), what was taken from the keys
    value: Tensor

    @staticmethod
    def of(args: Arguments) -> _Centred:
        dtype = torch.promote_types(args.q.dtype, torch.float32)
        q, tq = (None if x is None else x.to(dtype) for x in (args.q, args.tq))
        k, v, tk, tv = (None if x is None else _per_query_head(x, args.groups).to(dtype) for x in (args.k, args.v, args.tk, args.tv))
        assert q is not None and k is not None and v is not None
        weights = _key_weights(args, dtype)
        key, value = _centre(weights, k), _centre(weights, v)
        tk = None if tk is None else tk - _centre(weights, tk)
        return _Centred(replace(args, q=q, k=k - key, v=v - value, tq=tq, tk=tk, tv=tv), key, value)


def _key_weights(args: Arguments, dtype: torch.dtype) -> Tensor:
    """(B or 1, Hq or 1, 1, Nk), which keys a centre is the mean of: the softmax of their largest bias, so that padding has no part in it."""
    bias = torch.zeros(1, 1, 1, args.k.shape[2], dtype=dtype, device=args.k.device)
    if args.mask is not None:
        mask = args.mask[tuple(slice(1 if stride == 0 else None) for stride in args.mask.stride()[:3])]  # one of what was only expanded
        bias = _masked(bias, mask.amax(2, keepdim=True))
    if args.causal:
        bias = bias.masked_fill(torch.arange(bias.shape[-1], device=bias.device) >= args.q.shape[2], -torch.inf)
    return _softmax(bias)[0]


def _centre(weights: Tensor, x: Tensor) -> Tensor:
    """(B, H, 1, D), a constant: any would do, so where a mean is not finite it is 0, and a single bad key spoils no other."""
    return (weights @ x.detach()).nan_to_num(0.0, 0.0, 0.0)


def _attend_rows(centred: _Centred, first: int, count: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(o, to, lse) of `count` queries from `first` on."""
    args = centred.args
    q, k, v = args.q.narrow(2, first, count), args.k, args.v
    s = q @ k.transpose(-1, -2) * args.scale
    if args.mask is not None:
        s = _masked(s, args.mask.narrow(2, first, count))
    if args.causal:
        later = torch.arange(s.shape[-1], device=s.device) > torch.arange(first, first + count, device=s.device)[:, None]
        s = s.masked_fill(later, -torch.inf)
    p, lse = _softmax(s)
    o = p @ v
    to = None
    if args.has_tangents:
        tq = None if args.tq is None else args.tq.narrow(2, first, count)
        with torch.no_grad():
            to = _tangent(p, o, q, k, v, tq, args.tk, args.tv, args.scale)
    sees = (lse > -torch.inf).unsqueeze(-1)
    lse = lse + (q.detach() @ centred.key.transpose(-1, -2)).squeeze(-1) * args.scale
    return o + sees * centred.value, to, lse


def _masked(s: Tensor, mask: Tensor) -> Tensor:
    return s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask.to(s.dtype)


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (B, H, n, Nk) and their constant log-normaliser (B, H, n); a row that is −inf throughout has probabilities 0 and lse −inf."""
    m = s.detach().amax(-1, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0.0)
    p = (s - m).exp()
    l = p.sum(-1, keepdim=True)
    return p / l.masked_fill(l == 0, 1.0), (m + l.detach().log()).squeeze(-1)


def _tangent(p: Tensor, o: Tensor, q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, scale: float) -> Tensor:
    """The derivative of o, (B, H, n, D)."""
    to = torch.zeros_like(o) if tv is None else p @ tv
    ts = sum(a @ b.transpose(-1, -2) for a, b in ((tq, k), (q, tk)) if a is not None and b is not None)
    if not isinstance(ts, Tensor):
        return to
    h = p * ts.mul_(scale)
    return to + h @ v - h.sum(-1, keepdim=True) * o


def _per_query_head(x: Tensor, groups: int) -> Tensor:
    """(B, Hkv, N, D) → (B, Hq, N, D)."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
