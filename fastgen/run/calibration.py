"""How much each hidden neuron of the teacher counts, before a student's layers are split: Dense2MoE's Taylor importance.

It is measured on the teacher's own denoising loss without guidance: the loss of distilling into a fresh copy has gradient exactly 0. The clean
samples are training images where the run has any; else the teacher draws them with its guidance, in a few steps of its own sampler. Cached
pairs are not read: there are few methods that have them, and drawing some batches is little beside a run.

The split is not recorded apart: it lies in the student's weights, so a run that goes on, or takes another run's student, measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastgen.data.training import TrainingData
from fastgen.denoiser import Denoiser, Predictor
from fastgen.distillers.base import Batch, Setting
from fastgen.distillers.losses import mean_squared_error
from fastgen.plan import Plan
from fastgen.rng import SampleRng
from fastgen.sampling import few_step
from fastgen.surgery import moe
from fastgen.surgery.moe.conversion import Conversion
from fastgen.surgery.moe.importance import Importance
from fastgen.timesteps import TimeSampling

# Network evaluations with which the teacher draws what it is measured on: coarse, but noised again anyway.
DRAWN_IN = 8


def measured(plan: Plan, conversion: Conversion, network: nn.Module, data: TrainingData, setting: Setting, device: torch.device) -> Importance:
    """The importance that a plan asks for, of the teacher's `network`, which is on `device` afterwards."""
    blocks = plan.family.blocks(network)
    if conversion.importance != "taylor":
        return conversion.without_measuring(network, blocks)
    teacher = Predictor(Denoiser(network.to(device), plan.family, autocast=plan.autocast), plan.family)
    return moe.taylor(conversion.layers(network, blocks), _losses(plan, conversion, teacher, data, setting, device))


def _losses(
    plan: Plan, conversion: Conversion, teacher: Predictor, data: TrainingData, setting: Setting, device: torch.device
) -> Iterator[Callable[[], Tensor]]:
    train = plan.recipe.train
    times = plan.family.sampling_times(DRAWN_IN).to(device)
    for index in range(conversion.batches):
        rng = SampleRng(train.seed, ("expert importance", index), range(train.at_once), device)
        batch = data.draw(rng.at("data"))
        clean = batch.latents
        if clean is None:
            with torch.no_grad():
                noise = rng.normal("sample", setting.shape)
                clean = few_step(setting.guide(teacher), noise, times, batch.cond, renoise="euler")
        yield lambda clean=clean, batch=batch, rng=rng: _denoising(teacher, clean, batch, rng, setting)


def _denoising(teacher: Predictor, clean: Tensor, batch: Batch, rng: SampleRng, setting: Setting) -> Tensor:
    """MSE of the network's own prediction kind, at uniform times."""
    t = setting.draw_times(TimeSampling(), rng.uniform("time"))
    eps = rng.normal("noise", setting.shape)
    prediction = teacher(setting.path.mix(clean, eps, t), t, batch.cond, teacher.kind)
    return mean_squared_error(prediction, setting.path.predict(clean, eps, t, teacher.kind))
