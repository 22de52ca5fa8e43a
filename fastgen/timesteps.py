"""Training-time distributions as quantile functions on (0, 1), and inference grids.

A distribution maps u ~ U(0, 1) to a fraction of the path's time range, so that one uniform number per sample, drawn from that
sample's own stream, fixes its time on any number of processes. 1 = noise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from fastgen.unused import UsedWith


def uniform(u: Tensor) -> Tensor:
    """U(0, 1)."""
    return u


def logit_normal(u: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigmoid(N(mean, std^2)) (Esser et al. 2024, eq. 19)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(1e-7, 1 - 1e-7)))


def u_shaped(u: Tensor, *, a: float = 4.0) -> Tensor:
    """Density proportional to cosh(a (t - 1/2)): both ends weighted up (Lee et al. 2024; the printed density is not U-shaped)."""
    return 0.5 + torch.asinh((2 * u - 1) * torch.sinh(torch.tensor(a / 2, dtype=u.dtype))) / a


def shifted(t: Tensor, shift: float) -> Tensor:
    """Resolution shift t' = s t / (1 + (s - 1) t) (Esser et al. 2024, eq. 23): s > 1 moves times towards noise; s = 1 is the identity."""
    return shift * t / (1 + (shift - 1) * t)


def grid(num_steps: int, *, shift: float = 1.0) -> Tensor:
    """Flow times of a few-step sampler: shifted(1 - i/N), i = 0..N-1, fp64 (N,); the final 0 is implied."""
    if num_steps < 1:
        raise ValueError(f"a sampling grid needs at least one step, got {num_steps}")
    return shifted(1 - torch.arange(num_steps, dtype=torch.float64) / num_steps, shift)


def between(start: float, end: float, num_steps: int, *, shift: float = 1.0) -> Tensor:
    """Flow times (num_steps + 1,) fp64 from `start` down to `end`, evenly spaced before the shift: where a schedule's own steps lie."""
    ends = shifted(torch.tensor([start, end], dtype=torch.float64), 1 / shift)
    fractions = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    times = shifted(ends[0] + fractions * (ends[1] - ends[0]), shift)
    times[0], times[-1] = start, end  # exactly, not to rounding
    return times


def down_to(end: float, num_steps: int, *, t_max: float = 1.0, shift: float = 1.0) -> Tensor:
    """Path times (num_steps + 1,) fp64 of a teacher's way from its noise end t_max to path time `end`, which is hit exactly.

    Evenly spaced in the teacher's unshifted time: t_i = t_max S(u_i), u_i = 1 - (1 - S^-1(end/t_max)) i/num_steps, where
    S(u) = s u/(1 + (s - 1) u) with the shift s, and S^-1 is the same with 1/s.
    """
    times = between(1.0, end / t_max, num_steps, shift=shift) * t_max
    times[-1] = end
    return times


class TimeSampling(BaseModel, extra="forbid", frozen=True):
    """Recipe block for a training-time distribution: draw, then shift, then squeeze into [lo, hi]. mean, std: of `logit_normal`; a: of `u_shaped`."""

    used_with: ClassVar[UsedWith] = {"mean": ("name", ("logit_normal",)), "std": ("name", ("logit_normal",)), "a": ("name", ("u_shaped",))}
    name: Literal["uniform", "logit_normal", "u_shaped"] = "uniform"
    lo: float = Field(default=0.0, ge=0, le=1)
    hi: float = Field(default=1.0, ge=0, le=1)
    mean: float = Field(default=0.0, ge=-20, le=20)  # beyond which fp32 has no other times than the ends
    std: float = Field(default=1.0, gt=0, le=100)
    a: float = Field(default=4.0, gt=0, le=50)
    shift: Annotated[float, Field(ge=1e-3, le=1e3)] | Literal["teacher"] = "teacher"

    @model_validator(mode="after")
    def _ordered(self) -> TimeSampling:
        if self.lo > self.hi:
            raise ValueError(f"lo must not exceed hi, got lo {self.lo} and hi {self.hi}")
        return self

    def quantile(self, u: Tensor, *, teacher_shift: float) -> Tensor:
        """Fractions of the time range for uniform numbers u: (B,) fp32 or wider."""
        draws: dict[str, Callable[[Tensor], Tensor]] = {
            "uniform": uniform,
            "logit_normal": lambda v: logit_normal(v, mean=self.mean, std=self.std),
            "u_shaped": lambda v: u_shaped(v, a=self.a),
        }
        shift = teacher_shift if self.shift == "teacher" else float(self.shift)
        return self.lo + (self.hi - self.lo) * shifted(draws[self.name](u), shift)

    def up_to(self, limit: float) -> TimeSampling:
        """The same distribution squeezed below `limit`."""
        hi = min(self.hi, limit)
        return self.model_copy(update={"hi": hi, "lo": min(self.lo, hi)})

    def above(self, u: Tensor, floor: float, *, teacher_shift: float) -> Tensor:
        """The same distribution given that the fraction is at least `floor`, for uniform numbers u: (B,); ValueError where none is.

        So for `uniform` with a shift the draw is uniform before the shift.
        """
        start = _share_below(self, floor, teacher_shift)
        return self.quantile(start + (1 - start) * u, teacher_shift=teacher_shift).clamp(min=floor)


@lru_cache
def _share_below(sampling: TimeSampling, floor: float, teacher_shift: float) -> float:
    """The share of draws whose fraction is below `floor`, where the quantile function reaches it; ValueError where it never does.
    Asked for anew by every term of every step, and the same for a whole phase."""
    low, high = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    if not sampling.quantile(high, teacher_shift=teacher_shift) > floor:
        raise ValueError(f"no time of this distribution is above {floor:.4g}")
    if sampling.quantile(low, teacher_shift=teacher_shift) >= floor:
        return 0.0
    for _ in range(60):  # bisection: quantile functions rise
        middle = (low + high) / 2
        if sampling.quantile(middle, teacher_shift=teacher_shift) < floor:
            low = middle
        else:
            high = middle
    return high.item()
