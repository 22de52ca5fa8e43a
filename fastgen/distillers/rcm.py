"""rCM (Zheng et al. 2025, arXiv:2510.08431): sCM with a score-distillation regulariser, both in one student update.

The consistency term alone covers modes and blurs; the distribution-matching term alone sharpens and drops modes. The whole method is
the composition of sCM's term and DMD2's two terms, so with `points: teacher_trajectory` it trains on prompts alone.

The student's two terms keep the paper's ratio: |F - F- - g|^2 to match_weight |x0 - sg(x0 - grad)|^2, both summed over a sample's elements.
Departures: the fake score is trained in the network's own prediction kind, not in TrigFlow's; the rollout moves between its steps as
the exported sampler does (`renoise`), where the paper draws fresh noise; the fading-in of the tangent is sCM's.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field

from fastgen.config import MOST_STEPS
from fastgen.distillers.base import Batch, Facts, Loss, Models, Update
from fastgen.distillers.dmd2 import DMD2, DMD2Config
from fastgen.distillers.rollout import RolloutConfig, check_renoise
from fastgen.distillers.scm import SCM, SCMConfig
from fastgen.errors import UserError
from fastgen.rng import SampleRng
from fastgen.roles import RoleSpec, frozen, student, trainable
from fastgen.sampling import Renoise
from fastgen.timesteps import TimeSampling


class RCMConfig(SCMConfig):
    """sCM's keys, and: start: student steps of the consistency term alone before matching begins. critic_updates: fake-score updates
    before each student update (the paper's F - 1). match_weight: lambda. match_times, critic_times, renoise, rollout: as in dmd2."""

    start: int = Field(0, ge=0, le=MOST_STEPS)
    critic_updates: int = Field(4, ge=1, le=1000)
    match_weight: float = Field(0.01, gt=0, le=1e6)
    match_times: TimeSampling = TimeSampling(lo=0.02, hi=0.98)
    critic_times: TimeSampling = TimeSampling(lo=0.001, hi=1.0)
    renoise: Renoise = "euler"
    rollout: RolloutConfig = RolloutConfig()

    @property
    def matching(self) -> DMD2Config:
        """The DMD2 part."""
        shared = ("critic_updates", "match_times", "critic_times", "renoise", "rollout")
        return DMD2Config(name="dmd2", **{key: getattr(self, key) for key in shared})


class RCM(SCM):
    """Roles: student, fake_score (trained), teacher (frozen)."""

    Config = RCMConfig
    roles: ClassVar[dict[str, RoleSpec]] = {"student": student(), "fake_score": trainable(), "teacher": frozen()}
    config: RCMConfig

    def __init__(self, config: Any, setting: Any) -> None:
        super().__init__(config, setting)
        self._dmd2 = DMD2(config.matching, setting)

    @classmethod
    def roles_for(cls, config: RCMConfig) -> dict[str, RoleSpec]:
        # The regulariser needs the teacher's score even where the ODE is the data's.
        return cls.roles | super().roles_for(config)

    @classmethod
    def check(cls, config: RCMConfig, facts: Facts) -> None:  # type: ignore[override]
        check_renoise(config.renoise, facts)
        if config.start >= facts.train_steps:
            raise UserError(f"recipe key distiller.start: {config.start} leaves none of train.steps {facts.train_steps} for the matching")
        super().check(config, facts)

    def span(self, role: str) -> tuple[int, int] | None:
        start = self.config.start
        return None if role != "fake_score" or start == 0 else (start, self.setting.train_steps - start)

    def updates(self, step: int) -> list[Update]:
        first, *replays = super().updates(step)
        if step < self.config.start:
            return [first, *replays]
        critic = Update(("fake_score",), (self.critic,))
        return [*[critic] * self.config.critic_updates, Update(("student",), (*first.terms, self.match)), *replays]

    def critic(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """DMD2's denoising loss of the fake score on the student's samples."""
        return self._dmd2.critic(models, batch, rng, step)

    def match(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """DMD2's surrogate, weighted and summed over elements; it is half a mean of squares, hence the factors."""
        loss = self._dmd2.match(models, batch, rng, step)
        return Loss(2 * math.prod(self.setting.shape) * self.config.match_weight * loss.value, loss.logs)
