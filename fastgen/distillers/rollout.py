"""Backward simulation: the samples a multi-step student is trained on are its own (Yin et al. 2024b, section 4.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.conditioning import Conditioning
from fastgen.distillers.base import Setting
from fastgen.rng import SampleRng
from fastgen.sampling import Predict, Renoise, few_step


def student_samples(predict: Predict, setting: Setting, cond: Conditioning, rng: SampleRng, *, renoise: Renoise, train: bool) -> Tensor:
    """x0 samples (B, *shape) of a rollout that exits at a random step of the grid, the same step for the whole global batch.

    With `train` exactly the exit's evaluation is in the graph; without it none is. A one-step student always sees pure noise.
    """
    exit_at = rng.shared_index("exit", len(setting.grid))
    noise = rng.normal("noise", setting.shape)
    times = setting.grid.to(noise.device)
    with torch.set_grad_enabled(train):
        return few_step(predict, noise, times, cond, rng, renoise=renoise, grad_at=exit_at)
