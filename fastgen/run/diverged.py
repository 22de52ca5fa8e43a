"""What to do after a divergence: which checkpoint is sound, and how to go on from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from fastgen import checkpoint
from fastgen.divergence import DIVERGED, largest
from fastgen.errors import TrainingFailed
from fastgen.trainer import Trainer


def with_way_on(failure: TrainingFailed, folder: Path, trainer: Trainer) -> TrainingFailed:
    """The same failure with the newest sound checkpoint of `folder`, and the command that goes on from it with a lower learning rate."""
    sound, role = newest_sound(folder, trainer.begun), failure.role
    lower = "" if role is None else f" optimizer.{role}.lr={trainer.optimizer_blocks[role].lr / 10:g}"
    if sound is None:
        way = "newest sound checkpoint: none; start again" + (f" with a lower learning rate, such as{lower}" if role else "")
    else:
        resume = "--resume" if sound == checkpoint.checkpoints(folder)[-1] else f"--resume-from {sound.name}"
        allow = f" --allow-change optimizer.{role}.lr" if role else ""
        way = f"newest sound checkpoint: {sound.name}; go on from it with fastgen train RECIPE{lower} {resume}{allow}"
    return TrainingFailed(f"{failure}; {way}", role=role)


def newest_sound(folder: Path, begun: Mapping[str, float]) -> Path | None:
    """The newest checkpoint whose weights and averages are all finite, and none grown beyond what training does; None where there is none."""
    return next((path for path in reversed(checkpoint.checkpoints(folder)) if _is_sound(path, begun)), None)


def _is_sound(path: Path, begun: Mapping[str, float]) -> bool:
    for file in [*path.glob("role_*.safetensors"), *path.glob("ema_*.safetensors")]:
        try:
            size = largest(value for value in load_file(file).values() if value.is_floating_point())
        except (OSError, SafetensorError):
            return False
        start = begun.get(file.stem.removeprefix("role_").removeprefix("ema_"), 0.0)
        if not math.isfinite(size) or size > DIVERGED * start > 0:
            return False
    return True
