"""DMD (Yin et al. 2024a, arXiv:2311.18828): one step, distribution matching held in place by a regression on noise-sample pairs.

The pairs (`data.pairs`) are drawn once from the teacher's deterministic sampler; each update's matching and regression use batches of
their own. Without the regression the fake score lags behind and modes are lost; DMD2 mends that with more critic updates instead.
"""

from __future__ import annotations

from pydantic import Field

from fastgen.distillers.base import Facts
from fastgen.distillers.dmd2 import DMD2, DMD2Config
from fastgen.distillers.losses import MatchingWeight
from fastgen.distillers.regression import RegressionConfig
from fastgen.errors import UserError


class DMDConfig(DMD2Config):
    """dmd2's keys with DMD's defaults: one critic update a step, the alpha-weighted normaliser of its eq. 8, and the regression."""

    critic_updates: int = Field(default=1, ge=1, le=1000)
    weight: MatchingWeight = "alpha"
    regression: RegressionConfig | None = RegressionConfig()


class DMD(DMD2):
    """Roles: student, fake_score (trained), teacher (frozen). Needs pairs."""

    Config = DMDConfig

    @classmethod
    def check(cls, config: DMDConfig, facts: Facts) -> None:  # type: ignore[override]
        if config.regression is None:
            raise UserError("recipe key distiller.regression: null, but dmd is dmd2 with the regression; use distiller.name: dmd2 without it")
        if facts.steps != 1:
            raise UserError(f"recipe key student.steps: {facts.steps}, but dmd distils to one step; use dmd2 or phased_dmd for more")
        super().check(config, facts)
