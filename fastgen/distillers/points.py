"""Where consistency methods train: noisy samples on TrigFlow, each with the velocity of the ODE that it is carried along.

All scalars are fp64. Times are drawn as fractions of the flow-matching path and moved to TrigFlow at equal noise ratio, so that
`logit_normal` with (mean, std) is exactly ln tan t ~ N(mean + ln shift, std^2): Lu & Song's (P_mean - ln sigma_d, P_std).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen import timesteps
from fastgen.conditioning import Conditioning
from fastgen.distillers.base import Batch, Models, Options, Setting
from fastgen.path import Flow, TrigFlow, expand_time
from fastgen.rng import SampleRng
from fastgen.sampling import Predict
from fastgen.timesteps import TimeSampling
from fastgen.unused import UsedWith

TRIG = TrigFlow()
# At the ends themselves a change of path has no derivative.
_INSIDE = (1e-6, math.pi / 2 - 1e-6)


@dataclass(frozen=True)
class Points:
    """x (N, ...), t (N,) TrigFlow time fp64, velocity dx/dt (N, ...) and conditioning (N, ...); without gradients."""

    x: Tensor
    t: Tensor
    velocity: Tensor
    cond: Conditioning


def trig_time(setting: Setting, flow_time: Tensor) -> Tensor:
    """TrigFlow times fp64 of flow-matching times in [0, 1], no later than the teacher's own path reaches."""
    return TRIG.time(Flow().ratio(flow_time.double())).clamp(max=setting.last_time(TRIG))


def data_points(models: Models, batch: Batch, rng: SampleRng, setting: Setting, times: TimeSampling, *, use_teacher: bool) -> Points:
    """Noised data. The velocity is the guided teacher's (distillation), or that of the drawn pair, cos t z - sin t x0 (training)."""
    assert batch.latents is not None
    t = trig_time(setting, times.quantile(rng.uniform("time").double(), teacher_shift=setting.shift)).clamp(*_INSIDE)
    eps = rng.normal("noise", setting.shape)
    with torch.no_grad():
        x = TRIG.mix(batch.latents, eps, t)
        if use_teacher:
            velocity = setting.guide(models["teacher"])(x, t, batch.cond, "velocity", TRIG)
        else:
            velocity = TRIG.predict(batch.latents, eps, t, "velocity")
    return Points(x, t, velocity, batch.cond)


class TrajectoryConfig(Options):
    """Where the teacher's trajectory stops on its way from noise to data.

    evaluations: of the guided teacher for one trajectory (N); each but the first gives a training point. route: `stratified` draws
    one time in each interval of the fixed route, `logit_normal` draws all from `times` and sorts them, `grid` is the fixed route
    itself: flow times from 1 to `end`, evenly spaced and then shifted.
    """

    used_with: ClassVar[UsedWith] = {
        "times": ("route", ("logit_normal",)),
        "shift": ("route", ("stratified", "grid")),
        "end": ("route", ("stratified", "grid")),
    }
    evaluations: int = Field(default=16, ge=2, le=1000)
    route: Literal["stratified", "logit_normal", "grid"] = "stratified"
    shift: float = Field(default=2.5, ge=1e-3, le=1e3)
    end: float = Field(default=0.0025, gt=0, lt=1)
    times: TimeSampling = TimeSampling(name="logit_normal")

    def flow_times(self, rng: SampleRng, *, teacher_shift: float) -> Tensor:
        """Descending flow times (B, N) fp64, the first of them 1."""
        route = timesteps.shifted(torch.linspace(1, self.end, self.evaluations, dtype=torch.float64), self.shift)
        route = route.to(rng.device).expand(len(rng.ids), -1)
        if self.route == "grid":
            return route
        uniform = rng.uniform("route", (self.evaluations - 1,)).double()
        if self.route == "stratified":
            drawn = route[:, 1:] + uniform * (route[:, :-1] - route[:, 1:])
        else:
            drawn = self.times.quantile(uniform, teacher_shift=teacher_shift).sort(1, descending=True).values
        return torch.cat([route[:, :1], drawn], 1)


@torch.no_grad()
def trajectory_points(teacher: Predict, batch: Batch, rng: SampleRng, setting: Setting, config: TrajectoryConfig) -> Points:
    """The guided teacher's own Euler trajectories from pure noise, one for each sample of the batch, as B (N - 1) points in the
    order sample 0's, sample 1's, ...; the starts are left out, because there the tangent vanishes for every student (TBCM, hustvl 2025)."""
    guided = setting.guide(teacher)
    times = trig_time(setting, config.flow_times(rng, teacher_shift=setting.shift))
    times = torch.cat([times[:, :1], times[:, 1:].clamp(*_INSIDE)], 1)
    x, points, velocities = rng.normal("noise", setting.shape).double(), [], []
    for i in range(config.evaluations):
        velocity = guided(x, times[:, i], batch.cond, "velocity", TRIG)
        points.append(x)
        velocities.append(velocity)
        if i + 1 < config.evaluations:
            step = expand_time(times[:, i] - times[:, i + 1], x)
            x = torch.cos(step) * x - torch.sin(step) * velocity  # exact for a constant (x0, eps): DDIM
    count = config.evaluations - 1
    cond = {key: value.repeat_interleave(count, 0) for key, value in batch.cond.items()}
    return Points(torch.stack(points[1:], 1).flatten(0, 1), times[:, 1:].flatten(), torch.stack(velocities[1:], 1).flatten(0, 1), cond)
