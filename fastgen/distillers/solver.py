"""One solver step of the guided teacher, for discrete consistency methods: two noisy samples on one trajectory.

Everything is in flow-matching terms, whatever the teacher's path and kind: one DDIM step between two noise levels is one Euler step
x + (t' - t) velocity there. Times are fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from fastgen import timesteps
from fastgen.conditioning import Conditioning
from fastgen.distillers.base import Batch, MethodConfig, Setting
from fastgen.path import Flow, expand_time
from fastgen.rng import SampleRng
from fastgen.sampling import Predict

FLOW = Flow()


class SolverConfig(MethodConfig):
    """num_times: size of the teacher's time grid (evenly spaced, then shifted as the teacher's). skip: how many of its times one
    solver step crosses; fewer close to data, where it ends."""

    num_times: int = Field(1000, ge=2, le=10**6)
    skip: int = Field(20, ge=1, le=10**6)


def draw_step(config: SolverConfig, setting: Setting, rng: SampleRng) -> tuple[Tensor, Tensor]:
    """Flow times (t, t'), (B,) fp64: t any of the grid, t' up to `skip` places below, both at least 0."""
    index = (rng.uniform("time").double() * config.num_times).floor() + 1
    places = torch.stack([index, (index - config.skip).clamp(min=0)])
    t, t_next = timesteps.shifted(places / config.num_times, setting.shift).clamp(max=setting.last_time(FLOW))
    return t, t_next


@dataclass(frozen=True)
class Step:
    """x (B, ...) at t (B,), and x_next at t_next where the teacher takes it; without gradients."""

    x: Tensor
    t: Tensor
    x_next: Tensor
    t_next: Tensor

    def landing(self, done: Tensor) -> tuple[Tensor, Tensor]:
        """(x_next, t_next), but (x, t) for the samples in `done` (B,), whose target needs no network: at t = 0 one may be singular."""
        return torch.where(expand_time(done, self.x), self.x, self.x_next), torch.where(done, self.t, self.t_next)


@torch.no_grad()
def teacher_step(teacher: Predict, batch: Batch, rng: SampleRng, setting: Setting, t: Tensor, t_next: Tensor, guidance: Tensor | None = None) -> Step:
    """Noised data at t and one step of the teacher to t_next; guidance: one scale a sample (B,), None for the setting's."""
    assert batch.latents is not None
    x = FLOW.mix(batch.latents, rng.normal("noise", setting.shape), t)
    velocity = setting.guide(teacher, guidance)(x, t, batch.cond, "velocity", FLOW)
    return Step(x, t, x + expand_time(t_next - t, x) * velocity, t_next)


def move(student: Predict, x: Tensor, t: Tensor, to: Tensor, cond: Conditioning) -> Tensor:
    """Where the student's prediction at (x, t) puts the sample at flow time `to` (B,): DDIM; its x0 for `to` = 0."""
    return x + expand_time(to - t, x) * student(x, t, cond, "velocity", FLOW)
