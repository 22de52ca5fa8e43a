"""The first-step anchor of DP-DMD (arXiv:2602.03139): the student's first step follows the teacher, the later ones match distributions.

The first step decides what the picture will be. Matching asks its prediction alone to look like a finished sample, which costs
diversity; regressed onto the teacher's guided trajectory it keeps the teacher's choice of modes.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from fastgen import timesteps
from fastgen.distillers import losses
from fastgen.distillers.base import Batch, Options, Setting
from fastgen.distillers.solver import FLOW
from fastgen.path import expand_time
from fastgen.rng import SampleRng
from fastgen.sampling import Predict, initial, walk


class AnchorConfig(Options):
    """weight: of the regression. evaluations: of the guided teacher, from noise to the student's second time; 6 of 24 is what LightX2V uses
    for four steps."""

    weight: float = Field(default=0.05, gt=0, le=1e6)
    evaluations: int = Field(default=6, ge=1, le=1000)


def anchor_loss(student: Predict, teacher: Predict, batch: Batch, rng: SampleRng, setting: Setting, config: AnchorConfig) -> Tensor:
    """Scalar: weighted MSE between the student's velocity at the first step and the one that leads to the teacher's sample at its end.

    Velocities are flow-matching ones, (x_t - x_t') / (t - t') in flow times, whatever the teacher's own path is. The teacher starts at
    the noise end, where pure noise belongs, also where the student is told an earlier time.
    """
    times = timesteps.down_to(setting.grid[1].item(), config.evaluations, t_max=setting.path.t_max, shift=setting.shift)
    noise = rng.normal("noise", setting.shape)
    start = initial(setting.path, noise, setting.grid)
    with torch.no_grad():
        anchor = walk(setting.guide(teacher), noise, times.to(rng.device), batch.cond, renoise="euler")
    ends = [setting.grid[i].to(rng.device).expand(batch.size) for i in (0, 1)]
    (x, t), (x_next, t_next) = (setting.path.retime(sample, time, FLOW) for sample, time in zip((start, anchor), ends, strict=True))
    target = (x - x_next) / expand_time(t - t_next, x)
    velocity = student(x, t, batch.cond, "velocity", FLOW)
    return config.weight * losses.mean_squared_error(velocity, target.to(velocity.dtype))
