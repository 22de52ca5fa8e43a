"""TBCM, trajectory-backward consistency (hustvl/TBCM 2025): sCM at points of the teacher's own trajectories.

A few dozen guided teacher evaluations carry pure noise to data; every point on the way, with the velocity the teacher gave there,
is a training point. So nothing opens an image, adds noise, or calls the teacher again, and the points are where sampling goes.
`train.batch_size` counts trajectories: each gives `trajectory.evaluations` - 1 points. Only prompts are needed.

From the released code; its optional filter of trajectories that end in a black image needs a VAE and is left out.
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
