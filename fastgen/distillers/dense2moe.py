"""Dense2MoE (arXiv:2510.09094): distils a dense network into one whose feed-forward layers were split into experts (`student.moe`).

First the shared experts train alone, as if the routed ones had been pruned away; then they rest, and routed experts and routers train. Where
blocks are in groups (`student.moe.groups`), all of them run so far; at last the blocks in groups and the groups' routers train, nothing else, with
each group's output in place of its blocks' features. All against the teacher's own prediction and its blocks' features at the same sample, time
and prompt, without guidance, which is applied to the student when it is sampled, as to its teacher; so a share of the prompts is the negative
one. The loss of the features weighs layers so that each counts about as much as the output, and those with large features less:

    w_l = sg[ |L_out| / |L_l| (sum_j |f_j|) / (n |f_l|) ],   L = L_out + features sum_l w_l L_l

with L_l the mean squared error of layer l's features, f_l the teacher's, n their number. The balance loss comes from the network itself.

The paper does not say what trains beside experts: by default nothing else (`others`) but modulation layers that were made small
(`student.moe.modulation`), in every stage, because these are not the teacher's any more. It does not say whose layers count in double blocks:
here each stream of a block is one. Nor learning rates, nor how long stages are: `shared` and `blocks` divide the run. Few-step methods take such
a student over with student.init and the same student.moe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen import conditioning
from fastgen.across import batch_mean, batch_total
from fastgen.distillers import losses
from fastgen.distillers.base import Batch, Distiller, Facts, Loss, MethodConfig, Models, Update
from fastgen.distillers.points import TRIG, TrajectoryConfig, trajectory_points
from fastgen.errors import UserError
from fastgen.rng import SampleRng
from fastgen.roles import RoleSpec, frozen, student
from fastgen.surgery.moe.layer import Part, part
from fastgen.timesteps import TimeSampling
from fastgen.unused import UsedWith, positive


class Dense2MoEConfig(MethodConfig):
    """shared: the share of student steps in which the shared experts train alone; 1 for all, 0 for none. blocks: the share, the last ones, in
    which blocks in groups train. others: whether what is no expert trains along, in all stages. points: noised images, or the teacher's own
    trajectories, which need prompts only. times: noise levels of noised images. drop: share of prompts replaced by the negative prompt.
    features: weight of the loss of the blocks' features, 0 for none; taps: the places of the blocks whose features count, auto for all; where
    blocks in groups train, the last of each group in any case."""

    used_with: ClassVar[UsedWith] = {
        "times": ("points", ("data",)),
        "trajectory": ("points", ("teacher_trajectory",)),
        "taps": ("features", positive),
    }
    shared: float = Field(0.5, ge=0, le=1)
    blocks: float = Field(0.0, ge=0, le=1)
    others: Literal["frozen", "trained"] = "frozen"
    points: Literal["data", "teacher_trajectory"] = "data"
    times: TimeSampling = TimeSampling()
    trajectory: TrajectoryConfig = TrajectoryConfig()
    drop: float = Field(0.1, ge=0, le=1)
    features: float = Field(1.0, ge=0, le=1e6)
    taps: Literal["auto"] | Annotated[tuple[Annotated[int, Field(ge=0, le=1000)], ...], Field(min_length=1)] = "auto"

    @model_validator(mode="after")
    def _one_run(self) -> Dense2MoEConfig:
        if self.shared + self.blocks > 1:
            raise ValueError(f"shared ({self.shared:g}) and blocks ({self.blocks:g}) are shares of one run; together they are at most 1")
        if self.blocks == 1 and self.taps != "auto":
            raise ValueError("taps are not used with blocks: 1, for the last blocks of groups count there; remove them")
        if self.taps != "auto" and (twice := [tap for tap in self.taps if self.taps.count(tap) > 1]):
            raise ValueError(f"taps: {twice[0]} is there twice")
        return self


class Dense2MoE(Distiller):
    """Roles: student (trained, in stages), teacher (frozen)."""

    Config = Dense2MoEConfig
    roles: ClassVar[dict[str, RoleSpec]] = {"student": student(), "teacher": frozen()}
    config: Dense2MoEConfig

    @classmethod
    def leaves_a_flow(cls, config: Dense2MoEConfig) -> bool:
        return True

    @classmethod
    def student_is_guided(cls, config: Dense2MoEConfig) -> bool:
        return True

    @classmethod
    def needs_latents(cls, config: Dense2MoEConfig) -> bool:
        return config.points == "data"

    @classmethod
    def check(cls, config: Dense2MoEConfig, facts: Facts) -> None:
        if facts.experts is None:
            raise UserError("recipe key student.moe: missing; dense2moe trains a student of experts, and it says of how many")
        if facts.adapters:
            raise UserError("recipe key student.tune: dense2moe trains the experts themselves, which adapters do not reach; use full")
        if facts.grouped and config.blocks == 0:
            raise UserError("recipe key distiller.blocks: 0, so which blocks a sample passes through is never learned; give it a share of the steps")
        if facts.grouped and round(config.blocks * facts.train_steps) == 0:
            said = f"{config.blocks:g} of {facts.train_steps} steps are none, so which blocks a sample passes through is never learned"
            raise UserError(f"recipe key distiller.blocks: {said}; give it more")
        if config.blocks > 0 and not facts.grouped:
            raise UserError(f"recipe key distiller.blocks: {config.blocks:g}, but no blocks are in groups; give student.moe.groups, or remove it")
        if facts.experts == 0 and config.shared + config.blocks < 1:
            said = f"0, so routed experts never run, but distiller.shared ({config.shared:g}) leaves steps in which they train"
            raise UserError(f"recipe key student.moe.active: {said}; set it to 1, or make some active")
        if config.taps != "auto" and facts.num_blocks is not None and (wrong := [tap for tap in config.taps if tap >= facts.num_blocks]):
            raise UserError(f"recipe key distiller.taps: no block {wrong[0]}; this network has blocks 0 to {facts.num_blocks - 1}")

    def updates(self, step: int) -> list[Update]:
        stage = self.stage(step)
        parts: tuple[Part | None, ...] = (stage, None) if self.config.others == "trained" else (stage,)
        grouped = [name for group in self.setting.groups for name, _ in group] if stage == "blocks" else []
        inside = tuple(f"{name}." for name in (*grouped, *self.setting.slimmed))
        return [Update(("student",), (self.imitate,), only=lambda name: part(name) in parts or name.startswith(inside))]

    def stage(self, step: int) -> Part:
        """What trains in student step `step`."""
        steps = self.setting.train_steps
        if step >= steps - round(self.config.blocks * steps):
            return "blocks"
        return "shared" if step < round(self.config.shared * steps) else "experts"

    def imitate(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """MSE of the network's own prediction kind, and of the features of its blocks."""
        x, t, cond = self._points(models, batch, rng)
        stage = self.stage(step)
        net: Any = models["student"].using(0 if stage == "shared" else None, whole=stage != "blocks")
        taps = self._taps(stage)
        with torch.no_grad():
            wanted = models["teacher"].features(x, t, cond, taps)
        got = net.features(x, t, cond, taps)
        output = losses.mean_squared_error(got.prediction, wanted.prediction)
        if not got.features:
            return Loss(output)
        logs = {"output": output.detach(), "features": relative_error(got.features, wanted.features)}
        return Loss(output + self.config.features * self_weighted(got.features, wanted.features, output), logs)

    def _taps(self, stage: Part) -> tuple[int, ...] | None:
        """Of groups the last block, behind which the student's features are the group's output."""
        if self.config.features == 0:
            return ()
        if stage == "blocks":
            return tuple(group[-1][1] for group in self.setting.groups)
        return None if self.config.taps == "auto" else self.config.taps

    def _points(self, models: Models, batch: Batch, rng: SampleRng) -> tuple[Tensor, Tensor, conditioning.Conditioning]:
        """Samples on the network's own path, with their times and conditioning."""
        setting, cond = self.setting, batch.cond
        drop = rng.uniform("drop") < self.config.drop
        if self.config.points == "teacher_trajectory":
            points = trajectory_points(models["teacher"], batch, rng, setting, self.config.trajectory)
            x, t = TRIG.retime(points.x, points.t, setting.path)
            cond, drop = points.cond, drop.repeat_interleave(len(t) // batch.size)
        else:
            assert batch.latents is not None
            t = setting.draw_times(self.config.times, rng.uniform("time"))
            x = setting.path.mix(batch.latents, rng.normal("noise", setting.shape), t)
        return x, t, conditioning.drop(cond, setting.negative, drop)


def self_weighted(features: Sequence[Tensor], wanted: Sequence[Tensor], output: Tensor) -> Tensor:
    """sum_l w_l L_l of the module's docstring, (), for layers' features (B, ...), fp32 or wider; output: the loss that they are weighed by. A layer
    whose features are the teacher's to the bit weighs nothing. Norms are of one sample's, averaged over the batch."""
    pairs = [(_wide(own), _wide(theirs)) for own, theirs in zip(features, wanted, strict=True)]
    errors = torch.stack([losses.mean_squared_error(own, theirs) for own, theirs in pairs])
    with torch.no_grad():
        norms = batch_mean(torch.stack([theirs.flatten(1).norm(dim=1).mean() for _, theirs in pairs]))
        whole, tiny = batch_mean(errors), torch.finfo(errors.dtype).tiny
        weights = (batch_mean(output) / whole.clamp(min=tiny)) * (norms.mean() / norms.clamp(min=tiny))
        weights = torch.where((whole > 0) & (norms > 0), weights, 0.0)
    return (weights * errors).sum()


@torch.no_grad()
def relative_error(features: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The mean over layers of |f - f'|^2 / |f'|^2, (): what to watch, for the weighted loss is as large as the output's by its making."""
    pairs = [(_wide(own), _wide(theirs)) for own, theirs in zip(features, wanted, strict=True)]
    sums = [batch_total(torch.stack([(own - theirs).square().sum(), theirs.square().sum()])) for own, theirs in pairs]
    return torch.stack([error / size.clamp(min=torch.finfo(size.dtype).tiny) for error, size in sums]).mean()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
