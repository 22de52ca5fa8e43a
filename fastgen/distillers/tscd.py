"""Trajectory-segmented consistency distillation (Ren et al. 2024, Hyper-SD, arXiv:2404.13686, section 3.1).

The time range is cut into k segments, fewer in every stage (8, 4, 2, 1). Along each segment the student learns to jump consistently:
its predictions at both ends of one guided teacher step from t to t' are carried by DDIM to one random time s between the segment's
start and t', and the former is regressed on the latter (stop-gradient, MSE). With k segments left it samples in k steps.

Without s as an input of the network no student is consistent at every s of a curved trajectory: `target: start` carries both
predictions to the segment's start instead (multistep consistency models, Heek et al. 2024), for which the exact average velocity is
the optimum, and which is all that a student with as many steps as segments is ever asked for.

Segments are cut at the student's own sampling times, interpolated where a stage has more segments than the student has steps, so that
a deterministic sampler only ever asks for jumps that were trained. Out of scope: the paper's adversarial loss (late in each stage),
its human-feedback LoRA and its final one-step score distillation.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from fastgen.conditioning import Conditioning
from fastgen.data import weighted
from fastgen.distillers import losses
from fastgen.distillers.base import Batch, Distiller, Facts, Loss, Models, Update
from fastgen.distillers.solver import SolverConfig, Step, draw_step, move, teacher_step
from fastgen.errors import UserError
from fastgen.path import expand_time
from fastgen.rng import SampleRng
from fastgen.roles import RoleSpec, frozen, student
from fastgen.surgery.second_time import noise_fraction


class Stage(BaseModel):
    """segments: k. share: of the training that the stage takes, relative to the others' shares."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    segments: int = Field(ge=1, le=1000)
    share: float = Field(default=1.0, ge=1e-6, le=1e6)


class TSCDConfig(SolverConfig):
    """The solver's keys, and: stages, with fewer segments each; student.steps must be a multiple of the last one's. target: s, `random`
    between the segment's start and t' as in the paper, or the `start` itself."""

    target: Literal["random", "start"] = "random"
    stages: tuple[Stage, ...] = tuple(Stage(segments=k) for k in (8, 4, 2, 1))

    @field_validator("stages")
    @classmethod
    def _fewer(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        if not stages or any(a.segments <= b.segments for a, b in pairwise(stages)):
            raise ValueError("at least one stage is needed, and each must have fewer segments than the one before")
        return stages


class TSCD(Distiller):
    """Roles: student (trained), teacher (frozen). Needs latents."""

    Config = TSCDConfig
    samplers = ("euler",)
    roles: ClassVar[dict[str, RoleSpec]] = {"student": student(), "teacher": frozen()}
    config: TSCDConfig

    @classmethod
    def needs_latents(cls, config: TSCDConfig) -> bool:
        return True

    @classmethod
    def check(cls, config: TSCDConfig, facts: Facts) -> None:
        last, steps = config.stages[-1].segments, facts.steps
        if steps % last:
            raise UserError(f"recipe key distiller.stages: the last stage has {last} segments, of which student.steps {steps} is not a multiple")

    def updates(self, step: int) -> list[Update]:
        return [Update(("student",), (self.consistency,))]

    def segments_at(self, step: int) -> int:
        """k of the stage that student step `step` falls into."""
        shares = weighted.scaled(stage.share for stage in self.config.stages)
        done = (step + 0.5) / self.setting.train_steps * sum(shares)
        for stage, share in zip(self.config.stages, shares, strict=True):
            done -= share
            if done < 0:
                return stage.segments
        return self.config.stages[-1].segments

    def boundaries(self, segments: int) -> Tensor:
        """Flow times (k,) fp64 at which the segments start, from 0 upwards."""
        times = noise_fraction(self.setting.path, self.setting.grid.double())
        knots = torch.cat([times, times.new_zeros(1)]).flip(0)
        places = torch.arange(segments, dtype=torch.float64, device=knots.device) * (len(times) / segments)
        below = places.long()
        return knots[below] + (places - below) * (knots[below + 1] - knots[below])

    def starts(self, t: Tensor, segments: int) -> Tensor:
        """The start (B,) of the segment that each flow time t (B,) is in; a boundary belongs to the segment below it."""
        bounds = self.boundaries(segments).to(t)
        return torch.where(bounds < t[:, None] - 1e-9, bounds, 0).amax(1)

    def consistency(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """Squared distance at s of the student's jumps from the two ends of one teacher step inside a segment."""
        segments = self.segments_at(step)
        t, t_next = draw_step(self.config, self.setting, rng)
        start = self.starts(t, segments)
        t_next = torch.maximum(t_next, start)
        s = start if self.config.target == "start" else start + rng.uniform("target").double() * (t_next - start)
        pair = teacher_step(models["teacher"], batch, rng, self.setting, t, t_next)
        jump = move(models["student"], pair.x, t, s, batch.cond)
        target = self._target(models, pair, s, batch.cond, done=t_next == start)
        return Loss(losses.mean_squared_error(jump, target), {"segments": torch.tensor(float(segments), device=jump.device)})

    @torch.no_grad()
    def _target(self, models: Models, pair: Step, s: Tensor, cond: Conditioning, done: Tensor) -> Tensor:
        """Where the jump from (x_next, t_next) lands at s; where that is the segment's start already (`done`), x_next itself."""
        x, t = pair.landing(done)
        return torch.where(expand_time(done, x), pair.x_next, move(models["student"], x, t, s, cond))
