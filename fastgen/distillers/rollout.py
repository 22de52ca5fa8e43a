"""Backward simulation: the samples a multi-step student is trained on are its own (Yin et al. 2024b, section 4.5)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fastgen.conditioning import Conditioning
from fastgen.distillers.base import Setting
from fastgen.rng import SampleRng
from fastgen.sampling import Predict, Renoise, few_step
from fastgen.timesteps import TimeSampling


class RolloutConfig(BaseModel):
    """times: the student's own `grid`, or `sampled` anew each time: the noise end, then running minima of draws from `sampling`
    (Zheng et al. 2025, section 4). steps: most evaluations of a sampled rollout."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    times: Literal["grid", "sampled"] = "grid"
    steps: int = Field(default=4, ge=1)
    sampling: TimeSampling = TimeSampling()

    def draw(self, setting: Setting, rng: SampleRng) -> Tensor:
        """Descending path times (N,) fp64, the same for the whole global batch."""
        if self.times == "grid":
            return setting.grid.to(rng.device)
        drawn = setting.draw_times(self.sampling, rng.shared_uniform("rollout_times", self.steps - 1)).double()
        return torch.cat([setting.grid[:1].to(drawn), drawn]).cummin(0).values


ON_GRID = RolloutConfig()


def student_samples(
    predict: Predict,
    setting: Setting,
    cond: Conditioning,
    rng: SampleRng,
    *,
    renoise: Renoise,
    train: bool,
    rollout: RolloutConfig = ON_GRID,
) -> Tensor:
    """x0 samples (B, *shape) of a rollout that exits at a random step of its times, the same step for the whole global batch.

    With `train` exactly the exit's evaluation is in the graph; without it none is. A one-step student always sees pure noise.
    """
    times = rollout.draw(setting, rng)
    exit_at = rng.shared_index("exit", len(times))
    noise = rng.normal("noise", setting.shape)
    with torch.set_grad_enabled(train):
        return few_step(predict, noise, times, cond, rng, renoise=renoise, grad_at=exit_at)
