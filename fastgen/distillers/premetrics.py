"""What reflow compares by: distances of velocities, and of the pictures that they lead to (RF++: Lee et al. 2024, arXiv:2405.20320, section 4.2).

Any of them is right for pairs of a deterministic sampler alone, where x_t has one x0 (almost): then every distance has one least point.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from fastgen import feature_distance
from fastgen.config import MOST_STEPS
from fastgen.distillers.base import Facts, Options, Setting
from fastgen.distillers.losses import per_sample_mean
from fastgen.errors import UserError
from fastgen.own_code import absolute
from fastgen.unused import UsedWith


class VelocityConfig(Options):
    """metric: `l2`, the mean squared error, or `huber`, (sqrt(|d|^2 + (c D)^2) - c D) / D of the difference d of a sample of D numbers, which is
    |d|/D far away; c: as RF++'s released code has it. weight: of a time t in (0, 1], `constant` or `one_minus_t`."""

    used_with: ClassVar[UsedWith] = {"c": ("metric", ("huber",))}
    metric: Literal["l2", "huber"] = "l2"
    c: float = Field(default=0.00054, gt=0, le=1e6)
    weight: Literal["constant", "one_minus_t"] = "constant"


class PerceptualConfig(Options):
    """metric: `lpips`, or features whose mean squared difference counts: `fastgen:digits`, `fastgen:scenes` or a function of yours, pixels
    (B, 3, H, W) in [0, 1] -> tensors (B, ...), as `module:function` or `path/to/file.py:function`. scale: beside the velocity's distance.
    weight: of a time t, `constant` (RF++'s E) or `inverse_time`, 1/t (its F). after: student steps of the velocity's distance alone. alone: whether
    the velocity's distance ends there (InstaFlow's second part of distillation)."""

    metric: str = "lpips"
    scale: float = Field(default=1.0, gt=0, le=1e6)
    weight: Literal["constant", "inverse_time"] = "inverse_time"
    after: int = Field(default=0, ge=0, le=MOST_STEPS)
    alone: bool = Field(default=False, strict=True)

    @field_validator("metric")
    @classmethod
    def _holds_in_any_folder(cls, metric: str) -> str:
        return absolute(metric)


def check(config: PerceptualConfig | None, facts: Facts) -> None:
    """UserError where a metric cannot be had, or does not compare what the teacher's samples decode to."""
    if config is None:
        return
    feature_distance.check(config.metric, facts.picture)
    if config.after >= facts.train_steps:
        raise UserError(f"recipe key distiller.perceptual.after: {config.after} leaves none of train.steps {facts.train_steps}")


def velocity_distance(config: VelocityConfig, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
    """(B,), fp32 or wider, of velocities (B, ...) at flow times t (B,)."""
    difference = (prediction - target).flatten(1)
    if config.metric == "l2":
        distance = per_sample_mean(difference.square())
    else:
        count = difference.shape[1]
        floor = config.c * count
        distance = ((difference.square().sum(1) + floor**2).sqrt() - floor) / count
    return distance if config.weight == "constant" else (1 - t).to(distance) * distance


def picture_distance(config: PerceptualConfig, setting: Setting, x0: Tensor, target: Tensor, t: Tensor) -> Tensor:
    """(B,), fp32, of what samples (B, *shape) decode to, at flow times t (B,), with the gradient to x0 alone."""
    assert setting.decode is not None, f"{config.metric} needs a decoder"
    with torch.no_grad():
        wanted = setting.decode(target)
    distance = config.scale * feature_distance.load_distance(config.metric, x0.device)(setting.decode(x0), wanted)
    return distance if config.weight == "constant" else distance / t.to(distance)
