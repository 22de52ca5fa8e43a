"""Common offsets of keys and values: taken out of a problem before it is computed, and put back into its results. Derivation in README.md.

A common offset of the keys adds one number to all scores of a row, one of the keys' tangents one number to all their tangents, and one of the
values one vector to all outputs. They cancel in everything else, but in floating point only to the precision of the offset.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen_kernels.jvp_attention.arguments import Arguments


class Centred(NamedTuple):
    """args: the problem with a constant taken from the keys, the values and the keys' tangents of every head; key, value: (B, Hkv, 1, D), which."""

    args: Arguments
    key: Tensor
    value: Tensor

    @staticmethod
    def of(args: Arguments) -> Centred:
        """For fp32 and fp64: in half precision the differences would be rounded once more than the keys were."""
        weights = key_weights(args)
        key, value = centre(weights, args.k), centre(weights, args.v)
        tk = None if args.tk is None else args.tk - centre(weights, args.tk)
        return Centred(replace(args, k=args.k - key, v=args.v - value, tk=tk), key, value)

    def restored(self, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """(o, lse) of the problem as it was; gradients flow through o as they are. A row that sees no key keeps its 0 and −inf."""
        key, value = (x.repeat_interleave(self.args.groups, 1) for x in (self.key, self.value))
        shift = (self.args.q.detach() * key).sum(-1) * self.args.scale  # no matrix product: that may run in TF32
        return o + (lse > -torch.inf).unsqueeze(-1) * value, lse + shift


def key_weights(args: Arguments) -> Tensor:
    """(B or 1, Hkv or 1, 1, Nk), sums 1 or 0: how much each key counts in a centre. Any weights would do; these are the softmax of a key's
    largest bias over the queries, so that what padding holds has no part in it.
    """
    bias = torch.zeros(1, 1, 1, args.k.shape[2], dtype=torch.promote_types(args.k.dtype, torch.float32), device=args.k.device)
    if args.mask is not None:
        mask = args.mask[tuple(slice(1 if stride == 0 else None) for stride in args.mask.stride()[:3])]  # one of what was only expanded
        mask = mask.unflatten(1, (-1, args.groups)) if mask.shape[1] > 1 else mask.unsqueeze(2)
        largest = mask.amax((2, 3)).unsqueeze(2)
        bias = bias.masked_fill(~largest, -torch.inf) if mask.dtype == torch.bool else bias + largest.to(bias.dtype)
    if args.causal:
        bias = bias.masked_fill(torch.arange(bias.shape[-1], device=bias.device) >= args.q.shape[2], -torch.inf)
    return bias.softmax(-1).nan_to_num(0.0)


def centre(weights: Tensor, x: Tensor) -> Tensor:
    """(B, H, 1, D), the weighted mean of x's tokens in fp32 or wider, without a gradient.

    0 where the mean is not finite, so that a single bad key spoils no other.
    """
    weights = weights.to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = weights.to(wide).sum(-1, keepdim=True).clamp_min(torch.finfo(wide).tiny)
    return ((weights @ x.detach()).to(wide) / total).nan_to_num(0.0, 0.0, 0.0)
