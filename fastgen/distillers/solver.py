"""Solver steps of the guided teacher: one for discrete consistency methods, several for methods whose student skips them.

Everything is in flow-matching terms, whatever the teacher's path and kind: one DDIM step between two noise levels is one Euler step
x + (t' - t) velocity there. Times are fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen import timesteps
from fastgen.conditioning import Conditioning
from fastgen.distillers.base import Batch, MethodConfig, Setting
from fastgen.path import Flow, expand_time
from fastgen.rng import SampleRng
from fastgen.sampling import Predict
from fastgen.surgery.second_time import noise_fraction

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


@torch.no_grad()
def integrate(predict: Predict, x: Tensor, times: Tensor, cond: Conditioning, solver: Literal["euler", "heun"] = "euler") -> Tensor:
    """x (B, ...), at flow times[0], carried along the ODE by one step between each two of `times` (N + 1, B), descending; without gradients.

    `euler` is DDIM, N evaluations; `heun` averages the slopes at both ends of a step, 2 N evaluations, but a step to 0 is Euler's, for some
    networks predict nothing there (Karras et al. 2022, algorithm 1). Samples whose time does not change stay where they are.
    """
    for t, t_next in pairwise(times):
        step = expand_time(t_next - t, x)
        slope = predict(x, t, cond, "velocity", FLOW)
        if solver == "heun":
            ahead = Step(x, t, x + step * slope, t_next)
            slope = 0.5 * (slope + predict(*ahead.landing(t_next == 0), cond, "velocity", FLOW))
        x = x + step * slope
    return x


def shortcut(predict: Predict, x: Tensor, times: Tensor, cond: Conditioning, solver: Literal["euler", "heun"] = "euler") -> tuple[Tensor, Tensor]:
    """The constant pair (x0, eps), each (B, ...), whose one DDIM step leads from x at flow times[0] where `integrate` leads along all of `times`."""
    return FLOW.through(x, integrate(predict, x, times, cond, solver), times[0], times[-1])


def sub_times(setting: Setting, start: float, end: float, steps: int) -> Tensor:
    """Flow times (steps + 1,) fp64 from path time `start` down to `end`, evenly spaced in the teacher's unshifted time, as its own steps are."""
    path = setting.path
    return noise_fraction(path, timesteps.between(start / path.t_max, end / path.t_max, steps, shift=setting.shift) * path.t_max)
