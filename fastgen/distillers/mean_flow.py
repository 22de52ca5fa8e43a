"""MeanFlow (Geng et al. 2025, arXiv:2505.13447): a student that predicts average velocities, so that one step crosses any interval.

u(z, r, t) = 1/(t - r) times the integral of v along the trajectory from r to t; differentiating (t - r) u gives the identity
u = v - (t - r) du/dt (eq. 6), with the total derivative du/dt = v d_z u + d_t u as one forward-mode product along (v, 0, 1). The loss
regresses u on the right-hand side without gradient (alg. 1). A step is z_r = z_t - (t - r) u (eq. 12): the deterministic Euler step that
students are exported with, when u is asked for with r the next time of the grid, as the second time's default is.

`distillation` takes v from the guided teacher at z_t; `training` takes eps - x0 from data, with guidance as in section 4.2 (their eq. 19
with kappa = 0): v = w (eps - x0) + (1 - w) u(z, t, t | negative), from the student itself.

Everything is in flow-matching terms through `Predictor`, whatever the teacher's path and kind. Departures: `on_grid` draws a share of
the intervals with r on the sampling grid, and the derivative can be faded in, or taken as a difference along t.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen import conditioning
from fastgen.conditioning import Conditioning
from fastgen.config import MOST_STEPS
from fastgen.distillers.base import Batch, Distiller, Loss, MethodConfig, Models, Update
from fastgen.distillers.solver import FLOW
from fastgen.distillers.tangents import Network, check_student, derivative, faded, precise
from fastgen.path import expand_time
from fastgen.rng import SampleRng
from fastgen.roles import RoleSpec, frozen, student
from fastgen.sampling import Predict
from fastgen.surgery.second_time import given, noise_fraction
from fastgen.timesteps import TimeSampling
from fastgen.unused import UsedWith


class MeanFlowConfig(MethodConfig):
    """variant: v from the teacher, or from data. times: both ends of an interval are drawn from it. ratio: share of samples with
    r < t (the paper's 25 %; distillation to few steps gains from more); the others learn u(z, t, t) = v. on_grid: share of samples
    with one time drawn, t, and for r the next time of the student's sampling grid below it. power, constant: p and c of the weight
    (|d|^2 + c)^-p with |d|^2 the sum over a sample. warmup: student steps over which du/dt is faded in. drop: share of prompts replaced
    by the negative prompt, in the training variant with guidance.

    tangent: how du/dt is computed. `exact`; `semi_continuous`, exact along z and one backward difference of `discrete_step` along t, for
    networks whose time embedding is so steep that its exact slope is mostly ripple (1000 t sinusoids); `discrete`, one such difference along
    the trajectory, for networks without forward mode; `finite_difference`, central and fine, the exact tangent's stand-in there."""

    used_with: ClassVar[UsedWith] = {
        "discrete_step": ("tangent", ("semi_continuous", "discrete")),
        "drop": ("variant", ("training",)),
    }
    variant: Literal["distillation", "training"] = "distillation"
    times: TimeSampling = TimeSampling(name="logit_normal", mean=-0.4)
    ratio: float = Field(0.25, ge=0, le=1)
    on_grid: float = Field(0.0, ge=0, le=1)
    power: float = Field(1.0, ge=0, le=2)
    constant: float = Field(1e-3, gt=0, le=1e6)
    warmup: int = Field(0, ge=0, le=MOST_STEPS)
    drop: float = Field(0.1, ge=0, le=1)
    tangent: Literal["exact", "semi_continuous", "discrete", "finite_difference"] = "exact"
    discrete_step: float = Field(0.01, gt=0, lt=1)


class MeanFlow(Distiller):
    """Roles: student with a second time (trained), teacher (frozen; absent in the training variant). Needs latents."""

    Config = MeanFlowConfig
    samplers = ("euler",)
    differentiates = True
    roles: ClassVar[dict[str, RoleSpec]] = {"student": student(inputs=("second_time",)), "teacher": frozen()}
    config: MeanFlowConfig

    def __init__(self, config: Any, setting: Any) -> None:
        super().__init__(config, setting)
        self._checked = False

    @classmethod
    def roles_for(cls, config: MeanFlowConfig) -> dict[str, RoleSpec]:
        return cls.roles if config.variant == "distillation" else {"student": cls.roles["student"]}

    @classmethod
    def needs_latents(cls, config: MeanFlowConfig) -> bool:
        return True

    def updates(self, step: int) -> list[Update]:
        return [Update(("student",), (self.match,))]

    def match(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """Weighted |u - sg(v - (t - r) du/dt)|^2 at noised data."""
        assert batch.latents is not None
        t, r = self.draw_interval(rng)
        eps = rng.normal("noise", self.setting.shape)
        x, cond = FLOW.mix(batch.latents, eps, t), batch.cond
        if self.config.variant == "distillation":
            with torch.no_grad():
                v = self.setting.guide(models["teacher"])(x, t, cond, "velocity", FLOW)
        else:
            v, cond = self._data_velocity(models["student"], x, t, FLOW.predict(batch.latents, eps, t, "velocity"), cond, rng)
        return self.loss(models["student"], x, t, r, v, cond, faded(step, self.config.warmup))

    def loss(self, student: Predict, x: Tensor, t: Tensor, r: Tensor, v: Tensor, cond: Conditioning, fade: float = 1.0) -> Loss:
        """The term at given points: x, v (B, ...), r <= t (B,) flow times; fade: factor of du/dt."""
        cond = given(cond, second_time=r)
        u = student(x, t, cond, "velocity", FLOW)
        slope = self._slope(student, x, t, r, v.to(x.dtype), cond, u.detach())
        target = v - fade * expand_time(t - r, x) * slope
        error = (u - target).square().flatten(1).sum(1)
        weight = (error.detach() + self.config.constant) ** -self.config.power
        logs = {"error": error.detach().mean(), "slope": slope.flatten(1).norm(dim=1).mean()}
        return Loss((weight * error).mean(), logs)

    def draw_interval(self, rng: SampleRng) -> tuple[Tensor, Tensor]:
        """Flow times (t, r), (B,) fp64, r <= t, within what the teacher's path reaches."""
        drawn = self.config.times.quantile(rng.uniform("times", (2,)).double(), teacher_shift=self.setting.shift).clamp(
            max=self.setting.last_time(FLOW)
        )
        distinct, on_grid = (rng.uniform("which", (2,)) < torch.tensor([self.config.ratio, self.config.on_grid], device=drawn.device)).T
        t = torch.where(on_grid, drawn[:, 0], drawn.amax(1))
        grid = noise_fraction(self.setting.path, self.setting.grid.double()).to(t.device)
        below = torch.where(grid < t[:, None], grid, 0).amax(1)
        return t, torch.where(distinct, torch.where(on_grid, below, drawn.amin(1)), t)

    @torch.no_grad()
    def _slope(self, student: Predict, x: Tensor, t: Tensor, r: Tensor, v: Tensor, cond: Conditioning, u: Tensor) -> Tensor:
        """du/dt (B, ...) along the trajectory, with r, also in the conditioning, held. u: the student's, there."""
        mode = self.config.tangent
        if mode == "exact" or mode == "finite_difference":
            return self._along(student, x, t, cond, (v, torch.ones_like(t)), mode)
        if mode == "discrete":
            return self._backward_difference(student, x, t, r, v, cond, u)
        along_x = self._along(student, x, t, cond, (v, None), "exact")
        return along_x + self._backward_difference(student, x, t, r, torch.zeros_like(v), cond, u)

    def _along(
        self,
        student: Predict,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        direction: tuple[Tensor, Tensor | None],
        mode: Literal["exact", "finite_difference"],
    ) -> Tensor:
        if mode == "exact" and not self._checked:
            check_student(student, _average(student), x, t, cond, direction)
            self._checked = True
        return derivative(student, _average(student), x, t, cond, direction, mode)

    def _backward_difference(self, student: Predict, x: Tensor, t: Tensor, r: Tensor, v: Tensor, cond: Conditioning, u: Tensor) -> Tensor:
        """(u(x, r, t) - u(x - d v, r, t - d)) / d, with t - d no further than halfway to r."""
        step = torch.full_like(t, self.config.discrete_step)
        step = torch.where(t > r, torch.minimum(step, (t - r) / 2), step)  # where t is r, the derivative counts nothing
        d = expand_time(step, x)
        with precise(student) as was_coarse:
            here = _average(student)(x, t, cond) if was_coarse else u
            return (here - _average(student)((x - d * v).to(x.dtype), t - step, cond)) / d

    def _data_velocity(
        self, student: Predict, x: Tensor, t: Tensor, velocity: Tensor, cond: Conditioning, rng: SampleRng
    ) -> tuple[Tensor, Conditioning]:
        """(v, conditioning) of the training variant; samples that lose their prompt learn the plain velocity."""
        if self.setting.guidance == 1:
            return velocity, cond
        lost = rng.uniform("drop") < self.config.drop
        negative = conditioning.repeat(self.setting.negative, len(x))
        with torch.no_grad():
            unconditional = student(x, t, given(negative, second_time=t), "velocity", FLOW)
        scale = self.setting.guidance
        v = torch.where(expand_time(lost, x), velocity, scale * velocity + (1 - scale) * unconditional)
        return v, conditioning.drop(cond, self.setting.negative, lost)


def _average(student: Predict) -> Network:
    """u in flow-matching terms."""
    return lambda x, t, cond: student(x, t, cond, "velocity", FLOW)
