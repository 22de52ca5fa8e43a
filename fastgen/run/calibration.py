"""What a student's surgery goes by that has to be measured on its teacher: Dense2MoE's Taylor importance of hidden neurons, before layers are
split, and what each block is worth, before some are left out.

It is measured on the teacher's own denoising loss without guidance: the loss of distilling into a fresh copy has gradient exactly 0. The clean
samples are training images where the run has any; else the teacher draws them with its guidance, in a few steps of its own sampler. Cached
pairs are not read: there are few methods that have them, and drawing some batches is little beside a run.

The split is not recorded apart: it lies in the student's weights, so a run that goes on, or takes another run's student, measures nothing. Which
blocks stay is recorded among the run's inputs, as weights do not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastgen import inputs
from fastgen.data.training import Data
from fastgen.denoiser import Denoiser, Predictor
from fastgen.distillers.base import Batch, Setting
from fastgen.distillers.losses import mean_squared_error
from fastgen.files import expanded
from fastgen.plan import Plan
from fastgen.progress import Progress
from fastgen.rng import SampleRng
from fastgen.sampling import few_step
from fastgen.surgery import moe
from fastgen.surgery.moe.conversion import Conversion
from fastgen.surgery.moe.importance import Importance
from fastgen.surgery.shrink import most_important
from fastgen.timesteps import TimeSampling

# Network evaluations with which the teacher draws what it is measured on: coarse, but noised again anyway.
DRAWN_IN = 8


def measured(plan: Plan, conversion: Conversion, network: nn.Module, data: Data, settings: Sequence[Setting], device: torch.device) -> Importance:
    """The importance that a plan asks for, of the teacher's `network`, which is on `device` afterwards."""
    blocks = plan.family.blocks(network)
    if conversion.importance != "taylor":
        return conversion.without_measuring(network, blocks)
    teacher = _predictor(plan, network, device)
    losses = _losses(plan, "expert importance", conversion.batches, teacher, data, settings, device)
    return moe.taylor(conversion.layers(network, blocks), losses)


def with_kept(plan: Plan, network: nn.Module, data: Data, settings: Sequence[Setting], device: torch.device, progress: Progress) -> Plan:
    """The plan with the blocks that importance keeps, where it is to decide: those of the run that `student.init` names, else measured on the
    teacher's `network`, which is on `device` afterwards."""
    block, shrink = plan.recipe.student.shrink, plan.shrink
    if block is None or shrink is None or shrink.keep != "importance":
        return plan
    if plan.recipe.student.init != "teacher":
        return replace(plan, kept=inputs.kept_by(expanded(plan.recipe.student.init)))
    progress.stage("measuring which blocks count")
    teacher = _predictor(plan, network, device)
    losses = _losses(plan, "block importance", block.calibration, teacher, data, settings, device)
    return replace(plan, kept=most_important(network, shrink, losses))


def _predictor(plan: Plan, network: nn.Module, device: torch.device) -> Predictor:
    return Predictor(Denoiser(network.to(device), plan.family, autocast=plan.autocast), plan.family)


def _losses(
    plan: Plan, name: str, batches: int, teacher: Predictor, data: Data, settings: Sequence[Setting], device: torch.device
) -> Iterator[Callable[[], Tensor]]:
    """name: of the random stream."""
    train = plan.recipe.train
    for index in range(batches):
        rng = SampleRng(train.seed, (name, index), range(train.at_once), device)
        batch = data.draw(rng.at("data"))
        clean, setting = batch.latents, settings[batch.place]
        if clean is None:
            with torch.no_grad():
                times = plan.families[batch.place].sampling_times(DRAWN_IN).to(device)
                noise = rng.normal("sample", setting.shape)
                clean = few_step(setting.guide(teacher), noise, times, batch.cond, renoise="euler")
        yield lambda clean=clean, batch=batch, rng=rng, setting=setting: _denoising(teacher, clean, batch, rng, setting)


def _denoising(teacher: Predictor, clean: Tensor, batch: Batch, rng: SampleRng, setting: Setting) -> Tensor:
    """MSE of the network's own prediction kind, at uniform times."""
    t = setting.draw_times(TimeSampling(), rng.uniform("time"))
    eps = rng.normal("noise", setting.shape)
    prediction = teacher(setting.path.mix(clean, eps, t), t, batch.cond, teacher.kind)
    return mean_squared_error(prediction, setting.path.predict(clean, eps, t, teacher.kind))
