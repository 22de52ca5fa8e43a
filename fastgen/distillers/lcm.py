"""Latent consistency distillation (Luo et al. 2023, arXiv:2310.04378): one x0 along each discretised trajectory of the guided teacher.

The student's x0 at t is regressed on its own x0 (stop-gradient) one solver step of `skip` grid times further down. The teacher's step
is guided with a scale w drawn for each sample, and the student is told w through a scalar input (the paper's augmented ODE,
section 4.2); it is exported for the recipe's teacher.guidance. `guidance: null` bakes that one scale in and needs no input.

Departures. The boundary condition f(x, 0) = x is the noising path's own: with alpha = 1, sigma = 0 the x0 of a velocity or eps network
is x, and for t' = 0 the target is the sample itself. The paper's c_skip and c_out (timestep scaling 10, sigma_d = .5) differ from 0
and 1 only at t below 1 % of the range, and a stock pipeline would not apply them to the exported network. The target network is the
student itself, without an average of its own: Song & Dhariwal (2023) show that the average only biases.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from fastgen.across import root_mean_square
from fastgen.conditioning import Conditioning
from fastgen.distillers import losses
from fastgen.distillers.base import Batch, Distiller, Facts, Loss, Models, Update
from fastgen.distillers.solver import SolverConfig, Step, draw_step, move, teacher_step
from fastgen.errors import UserError
from fastgen.path import expand_time
from fastgen.rng import SampleRng
from fastgen.roles import RoleSpec, frozen, student
from fastgen.surgery import second_time


class LCMConfig(SolverConfig):
    """The solver's keys, and: guidance: [lowest, highest] scale of the teacher's steps, drawn uniformly for each sample, or null for
    the recipe's teacher.guidance alone. huber: c of the pseudo-Huber distance, a grey value or latent unit."""

    guidance: tuple[float, float] | None = None
    huber: float = Field(1e-3, gt=0, le=1e6)

    @field_validator("guidance")
    @classmethod
    def _ordered(cls, guidance: tuple[float, float] | None) -> tuple[float, float] | None:
        if guidance is not None and not 1 <= guidance[0] < guidance[1] <= 1e3:
            raise ValueError("two increasing scales from 1 to 1000 are needed")
        return guidance


class LCM(Distiller):
    """Roles: student (trained), teacher (frozen). Needs latents."""

    Config = LCMConfig
    roles: ClassVar[dict[str, RoleSpec]] = {"student": student(inputs=("guidance",)), "teacher": frozen()}
    config: LCMConfig

    @classmethod
    def roles_for(cls, config: LCMConfig) -> dict[str, RoleSpec]:
        return cls.roles if config.guidance else {**cls.roles, "student": student()}

    @classmethod
    def needs_latents(cls, config: LCMConfig) -> bool:
        return True

    @classmethod
    def check(cls, config: LCMConfig, facts: Facts) -> None:
        if config.guidance and not config.guidance[0] <= facts.guidance <= config.guidance[1]:
            raise UserError(
                f"recipe key distiller.guidance: {list(config.guidance)} does not hold teacher.guidance {facts.guidance}, "
                "for which the student is exported"
            )

    def updates(self, step: int) -> list[Update]:
        return [Update(("student",), (self.consistency,))]

    def consistency(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """Distance of the student's x0 at the two ends of one teacher step."""
        scale = self._scale(rng)
        pair = teacher_step(models["teacher"], batch, rng, self.setting, *draw_step(self.config, self.setting, rng), guidance=scale)
        cond = batch.cond if scale is None else second_time.given(batch.cond, guidance=scale)
        x0 = move(models["student"], pair.x, pair.t, torch.zeros_like(pair.t), cond)
        target = self._target(models, pair, cond)
        return Loss(pseudo_huber(x0, target, self.config.huber), {"gap": root_mean_square(x0.detach() - target)})

    @torch.no_grad()
    def _target(self, models: Models, pair: Step, cond: Conditioning) -> Tensor:
        done = pair.t_next == 0
        x, t = pair.landing(done)
        return torch.where(expand_time(done, x), pair.x_next, move(models["student"], x, t, torch.zeros_like(t), cond))

    def _scale(self, rng: SampleRng) -> Tensor | None:
        if self.config.guidance is None:
            return None
        low, high = self.config.guidance
        return low + (high - low) * rng.uniform("guidance")


def pseudo_huber(x: Tensor, target: Tensor, c: float) -> Tensor:
    """Mean over elements of the pseudo-Huber distance."""
    return losses.charbonnier(x - target, c).mean()
