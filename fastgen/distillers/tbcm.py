"""TBCM, trajectory-backward consistency (hustvl/TBCM 2025): sCM at points of the teacher's own trajectories.

A few dozen guided teacher evaluations carry pure noise to data; every point on the way, with the velocity the teacher gave there,
is a training point. So nothing opens an image, adds noise, or calls the teacher again, and the points are where sampling goes.
`train.batch_size` counts trajectories: each gives `trajectory.evaluations` - 1 points. Only prompts are needed.

From the released code, with these departures: each trajectory draws times of its own, uniform in flow time within their intervals; no
extra weight 1/tan t and no learned log-variance by default; no late decrease of the tangent's time part; and no filter of
trajectories that end in a black image, which would need a VAE.
"""

from __future__ import annotations

from typing import Literal

from fastgen.distillers.scm import SCM, SCMConfig


class TBCMConfig(SCMConfig):
    """sCM's keys; the points are the teacher's trajectories."""

    variant: Literal["distillation"] = "distillation"
    points: Literal["teacher_trajectory"] = "teacher_trajectory"


class TBCM(SCM):
    """Roles: student (trained), teacher (frozen)."""

    Config = TBCMConfig
    config: TBCMConfig
