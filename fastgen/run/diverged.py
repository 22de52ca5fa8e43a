"""What to do after a divergence: which checkpoint is sound, and how to go on from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from fastgen import checkpoint
from fastgen.divergence import DIVERGED, SUSPICIOUS
from fastgen.errors import TrainingFailed
from fastgen.shards import largest
from fastgen.trainer import Trainer


def with_way_on(failure: TrainingFailed, folder: Path, trainer: Trainer) -> TrainingFailed:
    """The same failure with the newest sound checkpoint of `folder`, and the command that goes on from it with a lower learning rate."""
    role = failure.role
    sound = newest_sound(folder, {name: start * (_limit(trainer, name) if name == role else DIVERGED) for name, start in trainer.begun.items()})
    lower = "" if role is None else f" optimizer.{role}.lr={trainer.optimizer_blocks[role].lr / 10:g}"
    if sound is None:
        way = "newest sound checkpoint: none; start again" + (f" with a lower learning rate, such as{lower}" if role else "")
    else:
        resume = "--resume" if sound == checkpoint.checkpoints(folder)[-1] else f"--resume-from {sound.name}"
        allow = f" --allow-change optimizer.{role}.lr" if role else ""
        way = f"newest sound checkpoint: {sound.name}; go on from it with fastgen train RECIPE{lower} {resume}{allow}"
    return TrainingFailed(f"{failure}; {way}", role=role)


def _limit(trainer: Trainer, role: str) -> float:
    """How far the weights of the role that diverged may have grown in a sound checkpoint: half of the orders of magnitude by which it failed,
    at most two, for it may have been on its way long before a number was not finite."""
    grown = largest(trainer.roles[role].parameters().values()) / trainer.begun[role] if role in trainer.roles and trainer.begun[role] else math.inf
    return min(max(SUSPICIOUS, math.sqrt(grown)), SUSPICIOUS**2) if math.isfinite(grown) else SUSPICIOUS**2


def newest_sound(folder: Path, limits: Mapping[str, float]) -> Path | None:
    """The newest checkpoint whose weights and averages are all finite and, role by role, within `limits`; None where there is none."""
    return next((path for path in reversed(checkpoint.checkpoints(folder)) if _is_sound(path, limits)), None)


def _is_sound(path: Path, limits: Mapping[str, float]) -> bool:
    for file in [*path.glob("role_*.safetensors"), *path.glob("ema_*.safetensors")]:
        try:
            size = largest(value for value in load_file(file).values() if value.is_floating_point() and value.numel())
        except (OSError, SafetensorError):
            return False
        limit = limits.get(checkpoint.component(file.name).partition("_")[2], 0.0)
        if not math.isfinite(size) or size > limit > 0:
            return False
    return True
