"""What a student's surgery goes by that has to be measured on its teacher: Dense2MoE's Taylor importance of hidden neurons, before layers are
split, and what each block is worth, before some are left out.

It is measured on the teacher's own denoising loss without guidance: the loss of distilling into a fresh copy has gradient exactly 0. The clean
samples are training images where the run has any; else the teacher draws them with its guidance, in a few steps of its own sampler. Cached
pairs are not read: there are few methods that have them, and drawing some batches is little beside a run.

The split is not recorded apart: it lies in the student's weights, so a run that goes on, or takes another run's student, measures nothing. Which
blocks stay is recorded among the run's inputs, as weights do not tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastgen import inputs
from fastgen.config import MoEBlock, UpcycleBlock
from fastgen.data.training import Data
from fastgen.denoiser import Denoiser, Predictor
from fastgen.distillers.base import Batch, Setting
from fastgen.distillers.losses import mean_squared_error
from fastgen.files import expanded
from fastgen.group import Alone
from fastgen.plan import Plan
from fastgen.progress import Progress
from fastgen.rng import SampleRng
from fastgen.roles import Roles
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


def with_kept(
    plan: Plan, network: nn.Module, data: Data, settings: Sequence[Setting], device: torch.device, progress: Progress, members: Alone
) -> Plan:
    """The plan with the blocks that importance keeps, where it is to decide: those of the run that `student.init` names, else measured on the
    teacher's `network`, which is on `device` afterwards. members: of whom the main one measures."""
    block, shrink = plan.recipe.student.shrink, plan.shrink
    if block is None or shrink is None or shrink.keep != "importance":
        return plan
    if plan.recipe.student.init != "teacher":
        return replace(plan, kept=inputs.kept_by(expanded(plan.recipe.student.init)))
    progress.stage("measuring which blocks count")
    teacher = _predictor(plan, network, device)
    losses = _losses(plan, "block importance", block.calibration, teacher, data, settings, device)
    return replace(plan, kept=members.told(lambda: most_important(network, shrink, losses)))


def centre_routers(
    plan: Plan, roles: Roles, dense: nn.Module, data: Data, settings: Sequence[Setting], device: torch.device, progress: Progress
) -> None:
    """Have routers of blocks, which begin random, see what tells samples apart, at the noise levels that the student is sampled at. Not those of
    zeros, and none where nothing is to be measured (`student.moe.calibration: 0`)."""
    block = plan.recipe.student.moe
    if block is None or not block.groups or block.router_std == 0 or block.calibration < 1:
        return
    progress.stage("measuring what routers of blocks see")
    with _lent(plan, dense, device) as drawing:
        for denoiser in [role.denoiser for role in roles.values() if moe.block_routers(role.denoiser.backbone)]:
            with _at(denoiser, device):
                losses = _losses(plan, "block routers", block.calibration, drawing, data, settings, device, Predictor(denoiser, plan.family))
                moe.centre(denoiser.backbone, losses)


@contextmanager
def _lent(plan: Plan, dense: nn.Module, device: torch.device) -> Iterator[Predictor]:
    """The teacher's network, which roles have by now, on the device; blocks that lie elsewhere for good (`teacher.offload`) come by themselves."""
    with _at(dense, device if plan.cut is not None else next(dense.parameters()).device):
        yield Predictor(Denoiser(dense, plan.family, autocast=plan.autocast), plan.family)


@contextmanager
def _at(network: nn.Module, device: torch.device) -> Iterator[None]:
    home = next(network.parameters()).device
    if home != device:
        network.to(device)
    try:
        yield
    finally:
        if home != device:
            network.to(home)


def with_altered_experts(
    plan: Plan,
    roles: Roles,
    taken: Sequence[str],
    dense: nn.Module,
    data: Data,
    settings: Sequence[Setting],
    device: torch.device,
    progress: Progress,
    members: Alone,
) -> Plan:
    """The plan with how many experts there are once those of trained students that nobody asks for are removed, and useful ones copied; and roles so
    altered. taken: those that another run has trained; dense: the teacher's network. members: of whom the main one measures, for where numbers nearly
    tie processes may disagree.

    Measured on the denoising loss as the teacher's neurons are, but of the student itself, at the noise levels that it is sampled at: elsewhere an
    expert is of no use to it. (A student of few steps is trained on other losses, of which some have no gradient before the first step.)
    """
    block = plan.recipe.student.moe
    if block is None or plan.used is None:
        return plan
    network = {name: roles[name].denoiser for name in taken}
    with _lent(plan, dense, device) as drawing:
        for name, denoiser in network.items():
            student = Predictor(denoiser, plan.family)

            def losses(stream: str, student: Predictor = student) -> Iterator[Callable[[], Tensor]]:
                return _losses(plan, stream, block.calibration, drawing, data, settings, device, student)

            with _at(denoiser, device):
                if block.remove_dead:
                    progress.stage("measuring which experts are used")
                    gone = _remove_dead(denoiser.backbone, block, losses("expert load"), members)
                    progress.stage(f"removed {gone} experts of {name}")
                if block.upcycle is not None:
                    progress.stage("measuring which experts are useful")
                    _copy_useful(denoiser.backbone, block.upcycle, losses("expert utility"), plan.recipe.train.seed, members)
    plan = replace(plan, expert_sizes={name: moe.sizes_of(each.backbone) for name, each in network.items()}, used=None)
    assert plan.experts is not None
    for denoiser in network.values():
        denoiser.forget_loads()
        moe.use(denoiser.backbone, plan.experts.experts.active, plan.experts.capacity)
    return plan


def _remove_dead(network: nn.Module, block: MoEBlock, losses: Iterator[Callable[[], Tensor]], members: Alone) -> int:
    """How many are gone; as many stay as a token is to use once they are copied."""

    @torch.no_grad()
    def counts() -> dict[str, Tensor]:
        with moe.recording(network) as routings:
            for loss in losses:
                loss()
        return moe.counts(routings)

    at_least = math.ceil(block.active / (1 if block.upcycle is None else block.upcycle.factor))
    return sum(len(each) for each in moe.remove(network, _of_the_main(counts, members), block.remove_dead, at_least=at_least).values())


def _copy_useful(network: nn.Module, how: UpcycleBlock, losses: Iterator[Callable[[], Tensor]], seed: int, members: Alone) -> None:
    def utilities() -> dict[str, Tensor]:
        return moe.weight_utility(network) if how.utility == "weight" else moe.gradient_utility(network, losses)

    utility = _of_the_main(utilities, members)
    moe.upcycle(network, utility, factor=how.factor, most=how.most, noise=how.noise, seed=seed)
    if how.noise:  # which checkpoints keep only where it is a parameter
        for layer in moe.expert_layers(network):
            moe.learn_bias(layer)


def _of_the_main(measure: Callable[[], dict[str, Tensor]], members: Alone) -> dict[str, Tensor]:
    """What the main process measures, on the CPU, everywhere."""
    told = members.told(lambda: {name: each.tolist() for name, each in measure().items()})
    return {name: torch.tensor(each, dtype=torch.float64) for name, each in told.items()}


def _predictor(plan: Plan, network: nn.Module, device: torch.device) -> Predictor:
    return Predictor(Denoiser(network.to(device), plan.family, autocast=plan.autocast), plan.family)


def _losses(
    plan: Plan,
    name: str,
    batches: int,
    teacher: Predictor,
    data: Data,
    settings: Sequence[Setting],
    device: torch.device,
    student: Predictor | None = None,
) -> Iterator[Callable[[], Tensor]]:
    """name: of the random stream. student: whose losses these are in place of the teacher's, at its own times."""
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
        own = None if student is None else plan.families[batch.place].sampling_times(plan.recipe.student.steps, plan.grid).to(device)
        yield lambda clean=clean, batch=batch, rng=rng, setting=setting, own=own: _denoising(student or teacher, clean, batch, rng, setting, own)


def _denoising(teacher: Predictor, clean: Tensor, batch: Batch, rng: SampleRng, setting: Setting, own: Tensor | None) -> Tensor:
    """MSE of the network's own prediction kind, at uniform times, or at those of `own` (N,)."""
    drawn = rng.uniform("time")
    t = setting.draw_times(TimeSampling(), drawn) if own is None else own[(drawn * len(own)).long().clamp(max=len(own) - 1)]
    eps = rng.normal("noise", setting.shape)
    prediction = teacher(setting.path.mix(clean, eps, t), t, batch.cond, teacher.kind)
    return mean_squared_error(prediction, setting.path.predict(clean, eps, t, teacher.kind))
