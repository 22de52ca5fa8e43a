"""SlimFlow (Zhu et al. 2024, arXiv:2407.12718): reflow and one-step distillation of students that are smaller than their teacher (`student.shrink`).

Annealing reflow begins with noise that no pair has, as flow matching on the teacher's samples, and ends at the pairs' own: so a small student need
not leave what it began with at once. Flow-guided distillation adds to the pairs' one step a second target for fresh noise: the student's own step
half of the way, and the teacher's from there. Paper's clock: t = 0 is noise; here t = 1 is.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.config import MOST_STEPS
from fastgen.data.training import PairBatch
from fastgen.distillers.base import Batch, Facts, Loss, Models, Options, Update
from fastgen.distillers.reflow import Line, Reflow, ReflowConfig, line_of, start_time
from fastgen.distillers.solver import move
from fastgen.errors import UserError
from fastgen.rng import SampleRng
from fastgen.roles import RoleSpec, frozen, student


class AnnealConfig(Options):
    """steps: student steps over which the share of foreign noise falls from 1 to 0."""

    steps: int = Field(ge=1, le=MOST_STEPS)
    schedule: Literal["linear", "cosine"] = "linear"

    def share(self, step: int) -> float:
        """beta at a student step: of the noise z^beta = sqrt(1 - beta^2) z + beta z', which has unit variance for every beta."""
        done = min(1.0, step / self.steps)
        return 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


class TwoStepConfig(Options):
    """weight: beside the pairs' term. lo, hi: fractions of the start's flow time between which the half-way point is drawn."""

    weight: float = Field(default=1.0, gt=0, le=1e6)
    lo: float = Field(default=0.2, gt=0, lt=1)
    hi: float = Field(default=0.8, gt=0, lt=1)

    @model_validator(mode="after")
    def _ordered(self) -> TwoStepConfig:
        if self.lo > self.hi:
            raise ValueError(f"lo must not exceed hi, got lo {self.lo} and hi {self.hi}")
        return self


class SlimFlowConfig(ReflowConfig):
    """reflow's keys, and: anneal (None: pairs as they are); two_step (None: pairs alone); flip: whether half of the pairs, noise and sample, are
    mirrored, for a teacher that draws mirrored pictures from mirrored noise, about."""

    anneal: AnnealConfig | None = None
    two_step: TwoStepConfig | None = None
    flip: bool = Field(default=False, strict=True)


class SlimFlow(Reflow):
    """Roles: student; teacher (frozen) for the two-step target. Needs pairs."""

    Config = SlimFlowConfig
    roles = {"student": student(), "teacher": frozen()}  # noqa: RUF012
    config: SlimFlowConfig

    @classmethod
    def roles_for(cls, config: SlimFlowConfig) -> dict[str, RoleSpec]:
        return cls.roles if config.two_step is not None else {"student": cls.roles["student"]}

    @classmethod
    def check(cls, config: SlimFlowConfig, facts: Facts) -> None:  # type: ignore[override]
        super().check(config, facts)
        if config.anneal is not None and config.anneal.steps > facts.train_steps:
            raise UserError(f"recipe key distiller.anneal.steps: {config.anneal.steps}, but training ends after train.steps {facts.train_steps}")
        if config.flip and facts.picture is not None and len(facts.picture) < 3:
            raise UserError("recipe key distiller.flip: the teacher's samples are vectors, which have no mirror image")

    def updates(self, step: int) -> list[Update]:
        return [Update(("student",), (self.straighten, self.two_steps) if self.config.two_step else (self.straighten,))]

    def line(self, pairs: PairBatch, rng: SampleRng, step: int) -> Line:
        if self.config.anneal is not None and (share := self.config.anneal.share(step)) > 0:
            foreign = rng.normal("foreign", self.setting.shape)
            pairs = replace(pairs, noise=math.sqrt(1 - share**2) * pairs.noise + share * foreign)
        if self.config.flip:
            mirrored = (rng.uniform("flip") < 0.5).view(-1, *(1,) * (pairs.x0.ndim - 1))
            pairs = replace(pairs, noise=_flipped(pairs.noise, mirrored), x0=_flipped(pairs.x0, mirrored))
        return line_of(pairs, self.setting)

    def two_steps(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """The distance of the student's one step from where two lead: its own to a time between, and the guided teacher's to data."""
        config, setting = self.config.two_step, self.setting
        assert config is not None
        noise = rng.normal("noise", setting.shape)
        start = start_time(setting)
        fresh = line_of(PairBatch(noise, torch.zeros_like(noise), batch.cond), setting)  # to 0, so that its start is sampling's
        first = torch.full((batch.size,), start, device=noise.device)
        x, half = fresh.at(first), start * (config.lo + (config.hi - config.lo) * rng.uniform("half"))
        with torch.no_grad():
            between = move(models["student"], x, first, half, batch.cond)
            target = move(setting.guide(models["teacher"]), between, half, torch.zeros_like(half), batch.cond)
        loss = self.distance(models["student"], _through(x, start, target, batch), first, step)
        return Loss(config.weight * loss.value, {f"two_step_{name}": value for name, value in loss.logs.items()})


def _through(x: Tensor, start: float, x0: Tensor, batch: Batch) -> Line:
    """The line that passes x (B, ...) at flow time `start` and ends at x0."""
    return Line((x - (1 - start) * x0) / start, x0, batch.cond)


def _flipped(x: Tensor, mirrored: Tensor) -> Tensor:
    return torch.where(mirrored, x.flip(-1), x)
