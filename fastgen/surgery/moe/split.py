"""Which hidden neurons go to the shared expert and which to each routed one (Dense2MoE, arXiv:2510.09094).

The neurons are partitioned, not copied, so that all experts together are the dense layer, with as many parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.surgery.moe.structures import KEY, Dense

Choice = Literal["token", "expert"]


@dataclass(frozen=True)
class Experts:
    """One shared expert and `num` routed ones.

    shared, routed: how wide the shared and each routed expert are, in one unit, which is the network's width in the paper. A layer is divided
    in their proportion, whatever its own width: of a hidden size H the shared expert takes H shared / (shared + num routed).
    active: routed experts that a token uses; with choice "expert", on average, and it may be a fraction.
    The defaults are the paper's "1S12E2A", which compute with (1 + 2 · 0.25) / 4 of a layer's neurons.
    """

    num: int = 12
    shared: float = 1.0
    routed: float = 0.25
    active: float = 2
    choice: Choice = "token"


class Partition(NamedTuple):
    """Indices of hidden neurons: shared (S,), routed (num, H')."""

    shared: Tensor
    routed: Tensor


def sizes(hidden: int, experts: Experts, name: str) -> tuple[int, int]:
    """How many hidden neurons the shared and each routed expert of layer `name` have; UserError, which names it, where that does not come out
    even or what is asked makes no sense."""
    if experts.num < 1 or experts.shared <= 0 or experts.routed <= 0:
        raise UserError(f"{KEY}: {experts.num} experts of {experts.routed} beside a shared one of {experts.shared} ({name}); all are above 0")
    if not 0 <= experts.active <= experts.num or (experts.choice == "token" and experts.active != int(experts.active)):
        given = f"student.moe.active: {experts.active:g} of {experts.num} experts ({name})"
        raise UserError(f"recipe key {given}; allowed: 0 to {experts.num}, a whole number where tokens choose")
    shared, routed = Fraction(str(experts.shared)), Fraction(str(experts.routed))
    unit = hidden / (shared + experts.num * routed)
    parts = shared * unit, routed * unit
    if any(part.denominator != 1 for part in parts):
        given = f"{experts.shared} + {experts.num} x {experts.routed}"
        raise UserError(f"{KEY}: {name} has {hidden} hidden neurons, which {given} does not divide into whole experts")
    return int(parts[0]), int(parts[1])


def deal(importance: Tensor, experts: Experts, name: str) -> Partition:
    """The most important neurons, importance (H,), to the shared expert; the others to the routed ones in turn, in descending order, so that
    these start alike. Equal neurons keep their order."""
    shared, _ = sizes(len(importance), experts, name)
    order = importance.argsort(descending=True, stable=True)
    return Partition(order[:shared], order[shared:].view(-1, experts.num).T.contiguous())


def select(dense: Dense, neurons: Tensor, *, gated: bool) -> Dense:
    """The part of a layer that some of its neurons make, without its output bias, neurons (H',): an input row, or a value's and its gate's, the
    hidden biases and the output columns. Of neurons (num, H') each weight with a first dimension more."""
    neurons = neurons.to(dense.w1.device)
    rows = torch.cat([neurons, neurons + dense.w2.shape[1]], -1) if gated else neurons
    return Dense(dense.w1[rows], None if dense.b1 is None else dense.b1[rows], dense.w2[:, neurons].movedim(0, -2), None)
