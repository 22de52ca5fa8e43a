"""Which rows go to which expert: from tokens to rows sorted by expert and back, without atomics, so that two runs agree bit for bit.

T tokens, R rows, E experts. `take` and `add` are linear, and each is the other's transpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """token, expert: (R,) int64, sorted by expert; ends: (E,) int32, the row after each expert's last. by_token: (R,) the rows sorted by token,
    and lengths: (T,) how many each has; slots: that number where it is one for all, which spares the lengths."""

    token: Tensor
    expert: Tensor
    ends: Tensor
    by_token: Tensor
    lengths: Tensor | None
    slots: int | None


def of_tokens(ids: Tensor, num_experts: int) -> tuple[Plan, Tensor]:
    """The rows of tokens that choose their experts, ids: (T, k); and `order` (R,), which entry of ids.flatten() each row is."""
    expert, order = ids.flatten().sort(stable=True)
    by_token = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))
    return Plan(order // ids.shape[1], expert, _ends(expert, num_experts), by_token, None, ids.shape[1]), order


def of_experts(tokens: Tensor, num_tokens: int) -> Plan:
    """The rows of experts that choose their tokens, tokens: (E, C)."""
    num_experts, capacity = tokens.shape
    token = tokens.flatten()
    sorted_token, by_token = token.sort(stable=True)
    stops = _ends(sorted_token, num_tokens).long()
    lengths = torch.diff(stops, prepend=stops.new_zeros(1))
    expert = torch.arange(num_experts, device=tokens.device)
    ends = ((expert + 1) * capacity).int()
    return Plan(token, expert.repeat_interleave(capacity), ends, by_token, lengths, None)


def _ends(sorted_ids: Tensor, count: int) -> Tensor:
    return torch.searchsorted(sorted_ids, torch.arange(count, device=sorted_ids.device), right=True, out_int32=True)


def take(x: Tensor, plan: Plan) -> Tensor:
    """Each row's token: (T, D) -> (R, D)."""
    return _apply(_Take, x, *_places(plan))


def add(y: Tensor, plan: Plan) -> Tensor:
    """The sum of each token's rows, in order of its slots or experts: (R, D) -> (T, D), zeros for a token without rows."""
    return _apply(_Add, y, *_places(plan))


# What both functions take of a plan: tensors one by one, or torch.func would not see them.
Places = tuple[Tensor, Tensor, Tensor | None, int | None]


def _places(plan: Plan) -> Places:
    return plan.token, plan.by_token, plan.lengths, plan.slots


def _apply(function: Any, *args: Any) -> Tensor:
    return function.apply(*args)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, token: Tensor, by_token: Tensor, lengths: Tensor | None, slots: int | None) -> Tensor:
        return x[token]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _apply(_Add, grads[0], *ctx.saved_tensors, ctx.slots), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _apply(_Take, tangents[0], *ctx.saved_tensors, ctx.slots)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, token: Tensor, by_token: Tensor, lengths: Tensor | None, slots: int | None) -> Tensor:
        y = y[by_token]  # each row to its slot
        if slots is not None:
            return y.unflatten(0, (-1, slots)).sum(1)
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        return torch.segment_reduce(wide, "sum", lengths=lengths, axis=0, unsafe=True, initial=0).to(y.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _apply(_Take, grads[0], *ctx.saved_tensors, ctx.slots), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _apply(_Add, tangents[0], *ctx.saved_tensors, ctx.slots)


def _keep(ctx: Any, inputs: Any) -> None:
    ctx.slots = inputs[-1]
    ctx.save_for_backward(*inputs[1:-1])
    ctx.save_for_forward(*inputs[1:-1])
