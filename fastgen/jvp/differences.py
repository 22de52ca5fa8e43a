"""Central differences: the tangent's approximation where there is no exact one, and what the exact one is checked against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgen.tf32 import no_tf32

Network = Callable[..., Tensor]
Tangents = Sequence[Tensor | None]  # None: a constant input


def difference_step(primals: Sequence[Tensor], tangents: Tangents) -> float:
    """Step h of the central difference: the largest that moves each input by at most a twentieth of its unit.

    Networks see 1000 t, or a t in [0, 1000], in a sinusoid of frequency 1, so a time's unit is 1e-3 max(1, |t|), and inputs of at most
    two axes, (B,) or (B, T), count as times. A larger input's unit is a tenth of its RMS. In fp32 this is within 0.2 % of the exact
    tangent on twelve pipelines' networks, the best power of two; bf16 is too coarse for any h.
    """
    limits = [_unit(x) / size for x, dx in zip(primals, tangents, strict=True) if dx is not None and (size := _size(dx)) > 0]
    return 0.05 * min(limits, default=1.0)


def _size(x: Tensor) -> float:
    return float(x.double().abs().max() if x.ndim <= 2 else x.double().square().mean().sqrt())


def _unit(x: Tensor) -> float:
    return 1e-3 * max(1.0, _size(x)) if x.ndim <= 2 else 0.1 * (_size(x) or 1.0)


def moved(primals: Sequence[Tensor], tangents: Tangents, step: float) -> list[Tensor]:
    return [x if dx is None else x + step * dx for x, dx in zip(primals, tangents, strict=True)]


@torch.no_grad()
@no_tf32()
def central(fn: Network, primals: Sequence[Tensor], tangents: Tangents, step: float) -> Tensor:
    return (fn(*moved(primals, tangents, step)) - fn(*moved(primals, tangents, -step))) / (2 * step)
