"""sCM (Lu & Song 2025, arXiv:2410.11081): continuous-time consistency on TrigFlow, sigma_d = 1.

The consistency function is f(x, t) = cos t x - sin t F(x, t), the student's x0; along the ODE dx/dt it should not change. A no-grad
pass gives the tangent g = cos t df/dt of the current student, exact through any network (fastgen.jvp); an ordinary pass is then
regressed on its own output plus g. `distillation` follows the guided teacher's ODE, `training` the straight pair (x0, eps) of the data.

The loss is summed over a sample's elements, as rCM's is: |g| is about 1 after normalisation, and its mean over the elements of a large
latent would drown in Adam's eps. So every time has a loss near 1 and the learned log-variance is off by default (rCM drops it too).
Lu & Song's prior weight 1/tan t is already inside g and is not applied twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.across import root_mean_square
from fastgen.config import MOST_STEPS
from fastgen.denoiser import Predictor
from fastgen.distillers import losses
from fastgen.distillers.base import Batch, Distiller, Facts, Loss, MethodConfig, Models, Update
from fastgen.distillers.points import TRIG, Points, TrajectoryConfig, data_points, trajectory_points
from fastgen.distillers.tangents import Network, check_student, derivative, faded, precise
from fastgen.errors import UserError
from fastgen.path import expand_time
from fastgen.rng import SampleRng
from fastgen.roles import RoleSpec, frozen, student
from fastgen.sampling import Predict
from fastgen.timesteps import TimeSampling
from fastgen.unused import UsedWith


class SCMConfig(MethodConfig):
    """variant: whose ODE the student is made consistent along. points: noised images, or the teacher's own trajectories, which need
    prompts only. times: noise levels of noised images. warmup: student steps over which the time-derivative part of the tangent is
    faded in (H). normaliser: c in g/(|g| + c). replay: optimizer updates in which the points of one step are used, so that a
    trajectory serves several. log_variance: weigh noise levels by a learned log-variance of the loss.

    tangent: `exact`; `semi_continuous`, exact along x and one backward difference of `discrete_step` along t, for networks whose
    time embedding is so steep that its exact slope is mostly ripple (1000 t sinusoids); `discrete`, one such difference along the
    ODE, for networks without forward mode; `finite_difference`, central and fine, the exact tangent's stand-in there."""

    used_with: ClassVar[UsedWith] = {
        "times": ("points", ("data",)),
        "trajectory": ("points", ("teacher_trajectory",)),
        "discrete_step": ("tangent", ("semi_continuous", "discrete")),
    }
    variant: Literal["distillation", "training"] = "distillation"
    points: Literal["data", "teacher_trajectory"] = "data"
    times: TimeSampling = TimeSampling(name="logit_normal", mean=-0.1, std=1.6)
    trajectory: TrajectoryConfig = TrajectoryConfig()
    warmup: int = Field(0, ge=0, le=MOST_STEPS)
    normaliser: float = Field(0.1, gt=0, le=1e6)
    tangent: Literal["exact", "semi_continuous", "discrete", "finite_difference"] = "exact"
    discrete_step: float = Field(1.5e-3, gt=0, lt=1)
    replay: int = Field(1, ge=1, le=1000)
    log_variance: bool = Field(default=False, strict=True)

    @model_validator(mode="after")
    def _one_ode(self) -> SCMConfig:
        if self.variant == "training" and self.points == "teacher_trajectory":
            raise ValueError("variant: training follows the data's own pairs; points: teacher_trajectory has none")
        return self


class SCM(Distiller):
    """Roles: student (trained), teacher (frozen; absent when the ODE is the data's)."""

    Config = SCMConfig
    differentiates = True
    roles: ClassVar[dict[str, RoleSpec]] = {"student": student(), "teacher": frozen()}
    config: SCMConfig

    def __init__(self, config: Any, setting: Any) -> None:
        super().__init__(config, setting)
        self._stored: dict[Sequence[int], Points] = {}
        self._checked = False

    @classmethod
    def roles_for(cls, config: SCMConfig) -> dict[str, RoleSpec]:
        roles = cls.roles | {"student": replace(cls.roles["student"], log_variance=config.log_variance)}
        alone = config.variant == "training" and config.points == "data"
        return {name: spec for name, spec in roles.items() if name != "teacher" or not alone}

    @classmethod
    def needs_latents(cls, config: SCMConfig) -> bool:
        return config.points == "data"

    @classmethod
    def check(cls, config: SCMConfig, facts: Facts) -> None:
        if facts.guidance != 1 and "teacher" not in cls.roles_for(config):
            raise UserError(f"recipe key teacher.guidance: {facts.guidance}, but distiller.variant: training has no teacher to guide; remove it")

    def updates(self, step: int) -> list[Update]:
        self._stored.clear()
        return [Update(("student",), (self.consistency,)), *[Update(("student",), (self.replayed,))] * (self.config.replay - 1)]

    def consistency(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """|F - sg(F + g)|^2, summed over each sample's elements, at fresh points."""
        points = self.draw_points(models, batch, rng)
        if self.config.replay > 1:
            self._stored[tuple(rng.ids)] = points
        return self._loss(models["student"], points, step)

    def replayed(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """The same at the points that this step's first update drew for these samples; the student has moved on."""
        return self._loss(models["student"], self._stored[tuple(rng.ids)], step)

    def draw_points(self, models: Models, batch: Batch, rng: SampleRng) -> Points:
        """Where this micro-batch trains."""
        if self.config.points == "teacher_trajectory":
            return trajectory_points(models["teacher"], batch, rng, self.setting, self.config.trajectory)
        return data_points(models, batch, rng, self.setting, self.config.times, use_teacher=self.config.variant == "distillation")

    def _loss(self, student: Predictor, points: Points, step: int) -> Loss:
        output = student.output(points.x, points.t, points.cond, "velocity", TRIG)
        prediction = output.prediction
        g = self.tangent(student, points, prediction.detach(), faded(step, self.config.warmup))
        norm = g.flatten(1).norm(dim=1)
        target = prediction.detach() + g / expand_time(norm + self.config.normaliser, g)
        errors = (prediction - target).square().flatten(1).sum(1)
        value = errors.mean() if output.log_variance is None else losses.log_variance_weighted(errors, output.log_variance)
        return Loss(value, {"tangent_norm": norm.mean(), "velocity_gap": _gap(prediction, points)})

    @torch.no_grad()
    def tangent(self, student: Predict, points: Points, prediction: Tensor, fade: float = 1.0) -> Tensor:
        """g (N, ...) fp64 = -cos^2 t (F - dx/dt) - fade (cos t sin t x + J), with J = cos t sin t dF/dt along the ODE (alg. 1);
        with fade 1 it is cos t df/dt. prediction: the student's F (N, ...) at the points."""
        cos, sin = (expand_time(c, points.x) for c in TRIG.coeffs(points.t))
        jvp_part = cos * sin * points.x + self._scaled_derivative(student, points, prediction)
        return -(cos**2) * (prediction - points.velocity) - fade * jvp_part

    def _scaled_derivative(self, student: Predict, points: Points, prediction: Tensor) -> Tensor:
        """cos t sin t dF/dt along the ODE. The input tangents carry the factor, which keeps them finite at both ends."""
        mode = self.config.tangent
        cos, sin = TRIG.coeffs(points.t)
        factor = cos * sin
        direction = expand_time(factor, points.x) * points.velocity
        if mode in ("exact", "finite_difference"):
            return self._along(student, points, (direction, factor), mode)
        backward = expand_time(factor, points.x) * self._backward_difference(student, points, prediction)
        return backward if mode == "discrete" else backward + self._along(student, points, (direction, None), "exact")

    def _along(self, student: Predict, points: Points, tangents: tuple[Tensor, Tensor | None], mode: Literal["exact", "finite_difference"]) -> Tensor:
        if mode == "exact" and not self._checked:
            check_student(student, _network(student), points.x, points.t, points.cond, tangents)
            self._checked = True
        return derivative(student, _network(student), points.x, points.t, points.cond, tangents, mode)

    def _backward_difference(self, student: Predict, points: Points, prediction: Tensor) -> Tensor:
        """(cos d F(x, t) - F(x', t - d)) / sin d, where x' is one step d back along the ODE, or x itself if x is differentiated
        exactly (Zheng et al. 2025, section 3: fully discrete and semi-continuous)."""
        step = torch.minimum(torch.full_like(points.t, self.config.discrete_step), points.t / 2)
        cos, sin = (expand_time(c, points.x) for c in TRIG.coeffs(step))
        x = points.x if self.config.tangent == "semi_continuous" else cos * points.x - sin * points.velocity
        network = _network(student)
        with precise(student) as was_coarse:
            here = network(points.x, points.t, points.cond) if was_coarse else prediction
            return (cos * here - network(x, points.t - step, points.cond)) / sin


def _network(student: Predict) -> Network:
    """F in TrigFlow."""
    return lambda x, t, cond: student(x, t, cond, "velocity", TRIG)


def _gap(prediction: Tensor, points: Points) -> Tensor:
    """RMS difference of the student's F from the ODE's velocity."""
    return root_mean_square(prediction.detach() - points.velocity)
