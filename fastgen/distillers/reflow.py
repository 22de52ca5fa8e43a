"""Reflow (Liu et al. 2022, arXiv:2209.03003): the student learns the straight lines between noise and where the teacher leads from it.

The pairs are `data.pairs`. A line goes through the student's own start, x_s = alpha_s x0 + sigma_s z' at the noise level that its sampling begins
at: on paths that do not reach pure noise the pair's noise is what x_s is, not z'. Lines are rectified flow's, x_t = (1 - t) x0 + t z' with the
velocity z' - x0, and the student is asked for its velocity there; it keeps its own kind and path, where the line of a straight flow is exact under
DDIM. With times at the noise end alone (`lo: 1`) it is the one-step distillation of InstaFlow (Liu et al. 2023, arXiv:2309.06380), and with
`u_shaped` times, `huber` and a perceptual metric it is RF++ (Lee et al. 2024, arXiv:2405.20320). A second round is a run whose teacher is the first
one's student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from fastgen import feature_distance
from fastgen.conditioning import Conditioning
from fastgen.data.training import PairBatch
from fastgen.distillers import premetrics
from fastgen.distillers.base import Batch, Distiller, Facts, Loss, MethodConfig, Models, Setting, Update
from fastgen.distillers.premetrics import PerceptualConfig, VelocityConfig
from fastgen.errors import UserError
from fastgen.path import Flow, expand_time
from fastgen.rng import SampleRng
from fastgen.roles import student
from fastgen.sampling import Predict, initial
from fastgen.timesteps import TimeSampling
from fastgen.unused import InKey

FLOW = Flow()
_SMALLEST = 1e-5  # flow time, as RF++: a line's clean end tells nothing of the noise


@dataclass(frozen=True)
class Line:
    """Straight lines from noise (B, *shape) at flow time 1 to x0 (B, *shape), and their conditioning."""

    noise: Tensor
    x0: Tensor
    cond: Conditioning

    @property
    def velocity(self) -> Tensor:
        return self.noise - self.x0

    def at(self, t: Tensor) -> Tensor:
        """x_t at flow times t (B,)."""
        return FLOW.mix(self.x0, self.noise, t)


def line_of(pairs: PairBatch, setting: Setting) -> Line:
    """The lines that pass through the samples that sampling starts from, in fp32 or wider."""
    start = setting.grid[:1].to(pairs.noise.device)
    alpha, sigma = (value.to(pairs.noise) for value in setting.path.coeffs(start))
    noise = (initial(setting.path, pairs.noise, start) - alpha * pairs.x0) / sigma
    return Line(noise, pairs.x0, pairs.cond)


def start_time(setting: Setting) -> float:
    """The flow time of the noise level that the student's sampling begins at."""
    return FLOW.time(setting.path.ratio(setting.grid[0].double())).item()


class ReflowConfig(MethodConfig):
    """times: fractions of the start's flow time; their shift is 1 unless stated, as a teacher's undoes the U of `u_shaped`. velocity, perceptual:
    what is compared, see premetrics.py. straightness: of how many samples the run logs how straight the teacher's flow is before and the student's
    after (run/straightened.py), 0 for not at all; it changes nothing that is trained."""

    times: TimeSampling = TimeSampling(name="uniform", shift=1.0)
    velocity: VelocityConfig = VelocityConfig()
    perceptual: PerceptualConfig | None = None
    straightness: int = Field(default=32, ge=0, le=10**6)

    @model_validator(mode="after")
    def _velocity_counts(self) -> Self:
        if self.perceptual is not None and self.perceptual.alone and self.perceptual.after == 0 and self.velocity != VelocityConfig():
            given = self.velocity.model_dump(exclude_unset=True)
            raise InKey(("velocity",), "not used with perceptual.alone: true from the first step on; remove it, or give perceptual.after", given)
        return self

    @field_validator("straightness")
    @classmethod
    def _enough_for_a_spread(cls, straightness: int) -> int:
        if straightness == 1:
            raise ValueError("of 1 sample there is no error to tell; 2 or more, or 0 for not at all")
        return straightness


class Reflow(Distiller):
    """Role: student. Needs pairs."""

    Config = ReflowConfig
    samplers = ("euler", "stochastic", "fixed_noise")
    roles: ClassVar = {"student": student()}
    config: ReflowConfig

    @classmethod
    def needs_pairs(cls, config: ReflowConfig) -> bool:
        return True

    @classmethod
    def leaves_a_flow(cls, config: ReflowConfig) -> bool:
        return config.times.lo < 1  # where it learns no other velocity than the first

    @classmethod
    def straightness_of(cls, config: ReflowConfig) -> int:
        return config.straightness if cls.leaves_a_flow(config) else 0

    @classmethod
    def files(cls, config: ReflowConfig) -> dict[str, str]:
        perceptual = config.perceptual
        return {} if perceptual is None else {"distiller.perceptual.metric": feature_distance.content(perceptual.metric)}

    @classmethod
    def check(cls, config: ReflowConfig, facts: Facts) -> None:
        premetrics.check(config.perceptual, facts)
        if config.times.hi == 0:
            raise UserError("recipe key distiller.times.hi: 0 is where samples are clean, and nothing is learned there")
        if config.times.lo == 1 and facts.steps > 1:
            raise UserError(
                f"recipe key distiller.times.lo: 1 trains the noise end alone, but student.steps {facts.steps} asks at other times too; take lo 0"
            )

    @classmethod
    def load(cls, config: ReflowConfig) -> None:
        if config.perceptual is not None:
            feature_distance.load_distance(config.perceptual.metric)

    def updates(self, step: int) -> list[Update]:
        return [Update(("student",), (self.straighten,))]

    def straighten(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """The distance of the student's velocity from the line's at one point of each."""
        assert batch.pairs is not None
        line = self.line(batch.pairs, rng, step)
        return self.distance(models["student"], line, self.times(rng), step)

    def line(self, pairs: PairBatch, rng: SampleRng, step: int) -> Line:
        return line_of(pairs, self.setting)

    def times(self, rng: SampleRng) -> Tensor:
        """Flow times (B,) fp32."""
        fractions = self.config.times.quantile(rng.uniform("time"), teacher_shift=self.setting.shift)
        path = self.setting.path
        floor = FLOW.time(path.ratio(torch.tensor(path.t_min, dtype=torch.float64))).item()
        return (fractions * start_time(self.setting)).clamp(min=max(floor, _SMALLEST))

    def distance(self, student: Predict, line: Line, t: Tensor, step: int) -> Loss:
        """Of the student's velocity at flow times t (B,) from the line's, and of the pictures it leads to. Logged are each sample's."""
        x_t, perceptual = line.at(t), self.config.perceptual
        velocity = student(x_t, t, line.cond, "velocity", FLOW)
        of_velocity = premetrics.velocity_distance(self.config.velocity, velocity, line.velocity, t)
        logs: dict[str, Tensor] = {"velocity": of_velocity.detach()}
        if perceptual is None or step < perceptual.after:
            return Loss(of_velocity.mean(), logs)
        of_pictures = premetrics.picture_distance(perceptual, self.setting, x_t - expand_time(t, x_t) * velocity, line.x0, t)
        logs["perceptual"] = of_pictures.detach()
        return Loss((of_pictures if perceptual.alone else of_velocity + of_pictures).mean(), logs)
