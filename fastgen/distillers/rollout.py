"""Backward simulation: the samples a multi-step student is trained on are its own (Yin et al. 2024b, section 4.5)."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fastgen.conditioning import Conditioning
from fastgen.distillers.base import Facts, Options, Setting
from fastgen.errors import UserError
from fastgen.rng import SampleRng
from fastgen.sampling import Predict, Renoise, walk
from fastgen.timesteps import TimeSampling
from fastgen.unused import UsedWith


class RolloutConfig(Options):
    """times: the student's own `grid`, or `sampled` anew each time: the noise end, then running minima of draws from `sampling`
    (Zheng et al. 2025, section 4). steps: most evaluations of a sampled rollout."""

    used_with: ClassVar[UsedWith] = {"steps": ("times", ("sampled",)), "sampling": ("times", ("sampled",))}
    times: Literal["grid", "sampled"] = "grid"
    steps: int = Field(default=4, ge=1, le=1000)
    sampling: TimeSampling = TimeSampling()

    def draw(self, setting: Setting, rng: SampleRng) -> Tensor:
        """Descending path times (N,) fp64, the same for the whole global batch."""
        if self.times == "grid":
            return setting.grid.to(rng.device)
        drawn = setting.draw_times(self.sampling, rng.shared_uniform("rollout_times", self.steps - 1)).double()
        return torch.cat([setting.grid[:1].to(drawn), drawn]).cummin(0).values


ON_GRID = RolloutConfig()


def check_renoise(renoise: Renoise, facts: Facts) -> None:
    """UserError where rollouts would move otherwise between their steps than the exported student's sampler."""
    if facts.exported and facts.steps > 1 and renoise != facts.sampler:
        sampled = f"the student is sampled and exported with {facts.sampler} steps"
        raise UserError(f"recipe key distiller.renoise: {renoise}, but {sampled}, so train it with them")


class Segment(NamedTuple):
    """Which part of its sampling a student is trained on: the evaluations `first` to `stop` - 1 (None: the last), whose samples are
    taken to path time `end`."""

    first: int = 0
    stop: int | None = None
    end: float = 0.0


WHOLE = Segment()


class Sample(NamedTuple):
    """What a rollout ends with: x (B, *shape) at the segment's end, the x0 that its exit predicted (the same for end 0), and the path
    time () of the noise that the exit was given: its own, or for the first evaluation, which sees pure noise, the noise end."""

    x: Tensor
    x0: Tensor
    t: Tensor


def student_samples(
    predict: Predict,
    setting: Setting,
    cond: Conditioning,
    rng: SampleRng,
    *,
    renoise: Renoise,
    train: bool,
    rollout: RolloutConfig = ON_GRID,
    segment: Segment = WHOLE,
    data: Tensor | None = None,
) -> Sample:
    """A rollout that exits at a random evaluation of the segment, the same one for the whole global batch.

    With `train` exactly the exit's evaluation is in the graph; without it none is. The first evaluation always sees pure noise.
    data: clean latents (B, *shape); noised, they replace the student's own samples as the inputs of later evaluations, which saves
    the rollout and trains on inputs that sampling never meets.
    """
    times, path = rollout.draw(setting, rng), setting.path
    exit_at = segment.first + rng.shared_index("exit", (segment.stop or len(times)) - segment.first)
    noise, t = rng.normal("noise", setting.shape), times[exit_at]
    each, given = t.expand(len(noise)), t if exit_at else torch.full_like(t, path.t_max)
    with torch.no_grad():
        if data is None or exit_at == 0:
            x = walk(predict, noise, times[: exit_at + 1], cond, rng, renoise=renoise)
        else:
            x = path.mix(data, noise, each).to(noise.dtype)
    with torch.set_grad_enabled(train):
        x0 = predict(x, each, cond).to(noise.dtype)
        if segment.end == 0:
            return Sample(x0, x0, given)
        end = torch.full_like(each, segment.end)
        return Sample(path.mix(x0, path.convert(x0, x, each, "x0", "eps"), end).to(noise.dtype), x0, given)
