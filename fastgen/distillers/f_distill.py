"""f-distill (Xu et al. 2025, arXiv:2502.15681): DMD2 for any f-divergence, each sample's gradient times h(r) = r^2 f''(r).

r, the teacher's density over the student's at the noised sample, is read off the discriminator, so one is needed for every divergence but
the reverse KL, whose h is constant. Two normalisations keep the factor at 1 on average: r by its mean within each tenth of the noise
range (E_q[r] is 1 for the true ratio), then h by its mean. Both are running means over the steps before (running.py), where the paper
takes those of the batch: a micro-batch may hold a few samples only, and gradients must not depend on its size.

With a guided teacher the ratio is that of the data set to the student, not of the guided law, which has no samples.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fastgen.distillers.base import Batch, Facts, Models
from fastgen.distillers.divergences import DIVERGENCES, Name
from fastgen.distillers.dmd2 import DMD2, DMD2Config
from fastgen.distillers.gan import GANConfig, log_ratio
from fastgen.distillers.matching import Matched
from fastgen.distillers.rollout import Sample
from fastgen.distillers.running import log_means, new_log_means
from fastgen.errors import UserError

_BINS = 10
_LOWEST, _HIGHEST = 0.1, 20.0  # of the ratio, as released


class FDistillConfig(DMD2Config):
    """dmd2's keys, and: divergence. ratio_decay: weight of the past in the running means at each student step; 0 normalises by the last
    step alone."""

    divergence: Name = "js"
    ratio_decay: float = Field(default=0.9, ge=0, lt=1)
    gan: GANConfig | None = GANConfig()


class FDistill(DMD2):
    """Roles: student, fake_score, discriminator (trained), teacher (frozen). Needs latents."""

    Config = FDistillConfig
    config: FDistillConfig  # type: ignore[assignment]

    def __init__(self, config: Any, setting: Any) -> None:
        super().__init__(config, setting)
        self.statistics |= {"ratio": new_log_means(_BINS), "h": new_log_means()}

    @classmethod
    def check(cls, config: FDistillConfig, facts: Facts) -> None:  # type: ignore[override]
        super().check(config, facts)
        if config.gan is None and config.divergence != "reverse_kl":
            raise UserError(f"recipe key distiller.gan: null, but divergence {config.divergence} needs the ratio that a discriminator estimates")

    def factors(self, models: Models, batch: Batch, sample: Sample, matched: Matched, step: int) -> Tensor | None:
        others = super().factors(models, batch, sample, matched, step)
        if self.config.gan is None:
            return others
        logits = models[self.judge_at(step)].logits(matched.noised, matched.t, batch.cond)
        own = self._normalised(log_ratio(logits), matched.t, step)
        return own if others is None else own * others

    def _normalised(self, log_ratio: Tensor, t: Tensor, step: int) -> Tensor:
        """h (B,) of log r (B,) at path times t, after both normalisations."""
        decay = self.config.ratio_decay
        bins = (t / self.setting.path.t_max * _BINS).long().clamp(max=_BINS - 1)
        log_ratio = log_ratio.clamp(math.log(_LOWEST), math.log(_HIGHEST))
        ratio = (log_ratio - log_means(self.statistics["ratio"], log_ratio, bins, step, decay)).exp()
        log_h = DIVERGENCES[self.config.divergence].h(ratio).log()
        return (log_h - log_means(self.statistics["h"], log_h, torch.zeros_like(bins), step, decay)).exp()
