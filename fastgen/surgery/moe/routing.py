"""Who goes where: tokens choose experts, or experts choose tokens; what was chosen; how the load is evened out.

A router's scores are softmax probabilities P in fp32 or wider; gates are `scale` * P, which is the number of experts unless experts were added or
removed since, so that a router of zeros weighs every expert by 1.
Choices are by stable sorting, lower indices first among equals; they have no derivative.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen import across


def token_choice(probabilities: Tensor, bias: Tensor, active: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """(ids, gates), each (T, active): the experts with the highest probability, (T, E), plus bias, (E,), which gates do not see."""
    ids = (probabilities + bias).argsort(dim=-1, descending=True, stable=True)[:, :active]
    return ids, token_gates(probabilities, ids, scale)


def token_gates(probabilities: Tensor, ids: Tensor, scale: float | None = None) -> Tensor:
    """(T, active) of chosen experts ids (T, active), probabilities (T, E)."""
    return (scale or probabilities.shape[-1]) * probabilities.gather(-1, ids)


def expert_choice(probabilities: Tensor, active: float | Sequence[float], scale: float | None = None) -> tuple[Tensor, Tensor]:
    """(tokens, gates), each (E, C): in each sample of probabilities (B, N, E) every expert takes the ceil(N active / E) tokens that give it the
    highest probability (Zhou et al. 2022, arXiv:2202.09368, within samples). tokens index B * N. active: one number, or one for each sample."""
    batch, num_tokens, num_experts = probabilities.shape
    each = [float(active)] * batch if isinstance(active, int | float) else list(active)
    if len(each) != batch:
        raise ValueError(f"active: {len(each)} numbers for {batch} samples")
    order = probabilities.argsort(dim=1, descending=True, stable=True)
    taken = [order[b, : capacity(num_tokens, k, num_experts)] + b * num_tokens for b, k in enumerate(each)]
    tokens = torch.cat(taken).T
    return tokens, expert_gates(probabilities, tokens, scale)


def expert_gates(probabilities: Tensor, tokens: Tensor, scale: float | None = None) -> Tensor:
    """(E, C) of chosen tokens (E, C), probabilities (B, N, E)."""
    experts = torch.arange(len(tokens), device=tokens.device)[:, None]
    return (scale or len(tokens)) * probabilities.flatten(0, 1)[tokens, experts]


def capacity(num_tokens: int, active: float, num_experts: int) -> int:
    """How many of a sample's tokens each expert takes, so that a token has `active` experts on average."""
    return min(num_tokens, math.ceil(round(num_tokens * active / num_experts, 6)))


class Routing(NamedTuple):
    """What one pass through a layer chose. probabilities: (T, E), with their graph; counts: (E,) fp32, tokens that went to each expert;
    dropped: the share of tokens that no routed expert took, 0-d, 0 where tokens choose. chosen: (T, E) bool, of each token, samples first; None of
    blocks."""

    layer: str
    probabilities: Tensor
    counts: Tensor
    dropped: Tensor
    chosen: Tensor | None = None

    @property
    def load(self) -> Tensor:
        """Each expert's share of all choices, (E,); 1/E is even."""
        return self.counts / self.counts.sum().clamp(min=1)

    @property
    def entropy(self) -> Tensor:
        """Of a token's probabilities, in nats, the mean over tokens: ln E where the router has no opinion."""
        p = self.probabilities.detach()
        return -torch.xlogy(p, p).sum(-1).mean()


def of_token_choice(layer: str, probabilities: Tensor, ids: Tensor) -> Routing:
    chosen = torch.zeros(probabilities.shape, dtype=torch.bool, device=ids.device).scatter(1, ids, True)
    counts = chosen.sum(0).float()
    return Routing(layer, probabilities, counts, counts.new_tensor(0.0 if ids.shape[1] else 1.0), chosen)


def of_expert_choice(layer: str, probabilities: Tensor, tokens: Tensor) -> Routing:
    chosen = torch.zeros(probabilities.shape, dtype=torch.bool, device=tokens.device).scatter(0, tokens.T, True)
    counts = torch.full((len(tokens),), float(tokens.shape[1]), device=tokens.device)
    return Routing(layer, probabilities, counts, 1 - chosen.any(1).float().mean(), chosen)


@torch.no_grad()
def by_time(routings: Iterable[Routing], fraction: Tensor, parts: int = 4) -> dict[str, Tensor]:
    """What routers do in each part of the noise range, `busiest_t0` (nearest data) and so on: the largest load of any expert over an even one,
    entropy over that of a router without opinion, and the share of tokens without a routed expert, `entropy_t0`, `dropped_t0`; NaN where
    no sample is in that part. fraction: (B,) in [0, 1], of the passes' samples."""
    part = (fraction * parts).long().clamp(max=parts - 1)
    kept = [routing for routing in routings if routing.chosen is not None]
    if not kept:
        return {}
    inside = torch.stack([part == i for i in range(parts)]).to(kept[0].probabilities.dtype)  # (parts, B)
    sums = [inside @ _of_samples(routing, len(part)) for routing in kept]  # (parts, E + 3)
    sums = across.batch_total(torch.cat(sums, 1)).split([each.shape[1] for each in sums], 1)
    found: dict[str, list[Tensor]] = {"busiest": [], "entropy": [], "dropped": []}
    for each in sums:
        load, entropy, dropped, samples = each.split([each.shape[1] - 3, 1, 1, 1], 1)
        found["busiest"].append(load.shape[1] * load.amax(1) / load.sum(1))
        found["entropy"].append((entropy / samples)[:, 0])
        found["dropped"].append((dropped / samples)[:, 0])
    joined = {"busiest": torch.amax, "entropy": torch.mean, "dropped": torch.mean}
    return {f"{name}_t{i}": value for name, some in found.items() for i, value in enumerate(joined[name](torch.stack(some), 0).unbind())}


def _of_samples(routing: Routing, count: int) -> Tensor:
    """(B, E + 3) of `count` samples: tokens that went to each expert, entropy, the share of tokens without one, and 1."""
    assert routing.chosen is not None
    p = routing.probabilities.detach()
    load = routing.chosen.view(count, -1, p.shape[-1]).sum(1).to(p.dtype)
    entropy = -torch.xlogy(p, p).sum(-1).view(count, -1).mean(1) / math.log(max(2, p.shape[-1]))
    dropped = (~routing.chosen.any(1)).to(p.dtype).view(count, -1).mean(1)
    return torch.cat([load, torch.stack([entropy, dropped, torch.ones_like(dropped)], 1)], 1)


def balance_loss(routings: Iterable[Routing]) -> Tensor:
    """E sum_i f_i P_i, the mean over layers and passes, fp32 or wider: f_i is expert i's load, a constant, P_i its mean probability. 1 where even, at
    most E. (Fedus et al. 2021, arXiv:2101.03961, eq. 4; Dense2MoE weighs its balance loss by 1e-2.) ValueError where nothing was routed."""
    losses = [len(routing.load) * (routing.load * routing.probabilities.mean(0)).sum() for routing in routings]
    if not losses:
        raise ValueError("routings: none; they are recorded inside `recording`")
    value = torch.stack(losses).mean()
    return value.to(torch.promote_types(value.dtype, torch.float32))


def counts(routings: Iterable[Routing]) -> dict[str, Tensor]:
    """Each layer's counts (E,), over all passes: what processes add up before `even_out`."""
    total: dict[str, Tensor] = {}
    for routing in routings:
        total[routing.layer] = routing.counts + total.get(routing.layer, torch.zeros_like(routing.counts))
    return total
