"""How straight a run's flows are, logged: the teacher's before training, guided as its pairs are, and the averaged student's after it.

S relative to E||Z_1 - Z_0||^2, as `fastgen straightness` measures it (straightness.py), of as many samples as the method asks for and in few
steps, so only a rough number. Its streams are its own and it leaves no trace in what is trained.
"""

from __future__ import annotations

from typing import Any

import torch

from fastgen.config import TrainBlock
from fastgen.data.training import Data
from fastgen.distillers.base import Setting
from fastgen.rng import SampleRng
from fastgen.sampling import Predict
from fastgen.straightness import Measured, flow_times, follow, summary

STEPS = 16  # of Heun's, 31 evaluations a sample


@torch.no_grad()
def straightness_of(
    predict: Predict, data: Data, setting: Setting, *, guidance: float, samples: int, train: TrainBlock, device: torch.device
) -> dict[str, Any]:
    """`straightness` and `one_step` with their standard errors, and `samples`. predict: guided, by `guidance`. Sample i depends on the run's seed,
    the data's prompts and i alone."""
    times, parts = flow_times(predict.path, STEPS).to(device), list[Measured]()
    for start in range(0, samples, train.at_once):
        rng = SampleRng(train.seed, ("straightness",), range(start, min(start + train.at_once, samples)), device)
        parts.append(follow(predict, rng.normal("noise", setting.shape), times, data.draw(rng.at("data")).cond))
    found = summary(Measured.of(parts), noise_end=times[0].item(), guidance=guidance, steps=STEPS)
    names = ("straightness", "straightness_error", "one_step", "one_step_error", "samples")
    return {name: getattr(found, name) for name in names}
