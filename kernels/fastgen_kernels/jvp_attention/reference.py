"""jvp_attention in plain PyTorch: any dtype, any device, scores in memory. What the kernel is held to, and what runs on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastgen_kernels.jvp_attention.arguments import KEY_ROWS, ROWS, Arguments, check
from fastgen_kernels.jvp_attention.centring import Centred

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
        centred = Centred.of(_widened(args))
        problem = _one_key_head_per_query_head(centred.args)
        parts = [_attend_rows(problem, first, min(step, num_queries - first)) for first in range(0, num_queries, step)]
        os, tos, lses = zip(*parts, strict=True)
        o, lse = centred.restored(_joined(os), _joined(lses))
        to = _joined(tos) if args.has_tangents else None
    return o.to(args.q.dtype), None if to is None else to.to(args.q.dtype), lse


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 2)


def _widened(args: Arguments) -> Arguments:
    dtype = torch.promote_types(args.q.dtype, torch.float32)
    return replace(args, **{name: x.to(dtype) for name, x in vars(args).items() if name in ROWS and x is not None})


def _one_key_head_per_query_head(args: Arguments) -> Arguments:
    if args.groups == 1:
        return args
    return replace(args, **{name: x.repeat_interleave(args.groups, 1) for name, x in vars(args).items() if name in KEY_ROWS and x is not None})


def _attend_rows(args: Arguments, first: int, count: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(o, to, lse) of `count` queries from `first` on; q, k, v with as many heads."""
    q, tq = (None if x is None else x.narrow(2, first, count) for x in (args.q, args.tq))
    assert q is not None
    s = q @ args.k.transpose(-1, -2) * args.scale
    if args.mask is not None:
        mask = args.mask.narrow(2, first, count)
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask.to(s.dtype)
    if args.causal:
        later = torch.arange(s.shape[-1], device=s.device) > torch.arange(first, first + count, device=s.device)[:, None]
        s = s.masked_fill(later, -torch.inf)
    p, lse = _softmax(s)
    o = p @ args.v
    if not args.has_tangents:
        return o, None, lse
    with torch.no_grad():
        return o, _tangent(p, o, q, args.k, args.v, tq, args.tk, args.tv, args.scale), lse


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
