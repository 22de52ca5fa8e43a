"""Short runs in fp64 for the tests of strategies: the same recipe on one process and on several, of every kind of method.

Everything is in fp64 because rounding grows: in fp32 a discriminator's losses differ by 1e-4 after twenty steps for no other reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from toy_runs import CPU, normal, optimizer_block, toy_method, toy_setting, toy_trainer

from fastgen import checkpoint, inputs, run
from fastgen.config import Recipe, validate
from fastgen.data import training
from fastgen.data.encoded import Keeping
from fastgen.data.pairs import TeacherSampler, make_pairs
from fastgen.denoiser import Denoiser, Predictor
from fastgen.distillers.base import Distiller
from fastgen.distillers.dmd2 import DMD2
from fastgen.distillers.f_distill import FDistill
from fastgen.distillers.phased_dmd import PhasedDMD
from fastgen.distillers.reflow import Reflow
from fastgen.distillers.scm import SCM
from fastgen.families.toy import Toy
from fastgen.parallel import SingleProcess, Strategy
from fastgen.plan import Plan, plan
from fastgen.roles import LoraTuning, build_roles
from fastgen.run import building
from fastgen.run.building import Run
from fastgen.surgery.second_time import Defaults
from fastgen.trainer import Metrics, Trainer

STEPS, BATCH = 20, 8
LORA = LoraTuning(rank=3, alpha=3, targets=("layers.0", "layers.1", "layers.2"))
PHASES = [{"start": 1, "end": 0.5}, {"start": 0.5, "end": 0}]


class WithRoot(Toy):
    """Its first layer lies outside the blocks, as embeddings do."""

    def blocks(self, backbone: nn.Module) -> list[nn.Module]:
        return super().blocks(backbone)[1:]

    def feature_widths(self, backbone: nn.Module) -> list[int]:
        return super().feature_widths(backbone)[1:]


def toy(
    kind: type[Distiller],
    parallel: Strategy,
    *,
    family: type[Toy] = Toy,
    tuning: LoraTuning | None = None,
    grid: tuple[float, ...] = (1.0, 0.5),
    micro_batch: int | None = None,
    **keys: Any,
) -> Trainer:
    own = family("toy:mixture", width=16)
    method = toy_method(kind, replace(toy_setting(own, grid=grid, guidance=1.5), train_steps=STEPS, decode=own.decode), **keys)
    defaults = Defaults.on(own.path, method.setting.grid, method.setting.guidance)
    backbone = own.load_backbone().double()
    roles = build_roles(method.roles_for(method.config), own, backbone, tuning=tuning, defaults=defaults)
    trainer = toy_trainer(
        method,
        own,
        prompts=("", "0", "1"),
        latents=normal(64, 2),
        optimizers=optimizer_block(lr=3e-3, schedule="cosine", clip=0.5),
        roles=roles,
        parallel=parallel,
        steps=STEPS,
        batch_size=BATCH,
        micro_batch=micro_batch,
    )
    if kind is Reflow:
        teacher = Predictor(Denoiser(Toy("toy:mixture").load_backbone(), own), own)
        pairs = make_pairs(TeacherSampler(teacher, own.grid(20), (2,), "heun"), own.encode_prompts, {"": 1.0}, range(64), seed=1, batch=64)
        trainer.data = training.with_pairs(trainer.data.parts[0], pairs, own, Keeping(CPU))
    return trainer


def digits(recipe: str, parallel: Strategy, *overrides: str, batch: int = 4, wide: bool | None = True) -> Trainer:
    """A run of the digits teacher, in fp64 or as it is; None: as it is, but loaded whole by every process."""
    keys = [f"train.batch_size={batch}", f"train.steps={STEPS}", "train.sample_every=0", "train.device=cpu", "evaluate.protocol=null", *overrides]
    return built(plan(Recipe.load(recipe, keys), only="train"), parallel, wide=wide).trainer


def built(planned: Plan, parallel: Strategy, *, wide: bool | None = True) -> Run:
    load = planned.family.load_backbone
    if wide:
        planned.family.load_backbone = lambda **asked: load(**asked).double()  # type: ignore[method-assign]
    if wide is not False:
        planned.family.load_outline = lambda: None  # type: ignore[method-assign]
    before = building.launch
    building.launch = lambda *_: parallel  # type: ignore[assignment]
    try:
        return run.build(planned, run.Progress())
    finally:
        building.launch = before


def sizes(parallel: Strategy) -> Trainer:
    """A run of the scenes teacher at three sizes, of which each update has one, in two micro-batches a process."""
    with TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.txt")
        prompts.write_text("a red circle\na blue square\n", encoding="utf-8")
        keys = ("data.prompts=" + str(prompts), "train.micro_batch=1", "train.steps=5", "optimizer.student.lr=1e-4", "optimizer.fake_score.lr=1e-4")
        return digits("scenes_dmd2_sizes_1step", parallel, *keys)


MOE = ("student.moe.calibration=2", "student.moe.experts=4", "student.moe.balance=0.1", "distiller.shared=0.5", "optimizer.student.warmup=0")
GROUPED = (*MOE, "student.moe.router=expert", "student.moe.capacity={noise: 1, data: 3}", "student.moe.groups=[{size: 2, kept: 1}]")
GROUPED += ("student.moe.router_std=0.5", "distiller.shared=0.2", "distiller.blocks=0.4", "train.steps=5")
BIASED = (*MOE, "student.moe.bias_rate=0.01", "student.moe.router_std=0.5", "distiller.shared=0", "evaluate.protocol=null", "train.device=cpu")
ALTERED = (*BIASED, "student.moe.remove_dead=0.95", "student.moe.upcycle={factor: 2}", "student.moe.active=3", "train.batch_size=4", "train.steps=4")


@functools.cache
def trained_experts() -> checkpoint.Content:
    """Of a run that is over, on one process: a student whose experts are not used alike."""
    keys = (*BIASED, "train.batch_size=8", "train.steps=2")
    running = built(plan(Recipe.load("digits_dense2moe", keys), only="train"), SingleProcess(CPU))
    running.trainer.run([])
    return checkpoint.Content.of(running.trainer, running.plan.resolved(), apart=True)


def altered(parallel: Strategy, folder: Path, *more: str) -> Run:
    """A run that begins with that student, less what it does not use and with copies of what it does. folder: of this process's own."""
    checkpoint.write(folder / "checkpoints", trained_experts(), keep=1)
    running = built(plan(Recipe.load("digits_dense2moe", [*ALTERED, f"student.init={folder}", *more]), only="train"), parallel)
    assert any(removed for _, removed, _ in running.plan.expert_sizes["student"].values())
    return running


def altered_briefly(parallel: Strategy) -> Trainer:
    with TemporaryDirectory() as folder:
        return altered(parallel, Path(folder)).trainer


def resumed(parallel: Strategy, run_dir: Path) -> Trainer:
    """What another number of processes goes on with."""
    state = checkpoint.read_state(checkpoint.latest(run_dir))
    planned = plan(validate(Recipe, state["recipe"]), only="train", started=True)
    trainer = built(inputs.as_begun(planned, inputs.Inputs(state["inputs"])), parallel).trainer
    checkpoint.load(checkpoint.latest(run_dir), trainer)
    return trainer


# Each makes a run of some steps on a strategy. A whole batch at once shows what depends on the samples that a process sees together.
CASES: dict[str, Callable[[Strategy], Trainer]] = {
    "dmd2": lambda on: toy(DMD2, on, gan={"r1": 0.1}, critic_updates=2),
    "dmd2 heads on the fake score": lambda on: toy(DMD2, on, gan={"features": "fake_score", "r1": 0.1}, critic_updates=2),
    "dmd2 lora": lambda on: toy(DMD2, on, tuning=LORA, gan={}, critic_updates=2),
    "dmd2 reward": lambda on: toy(DMD2, on, reward={"name": "matching_cases:first_coordinate"}, critic_updates=1),
    "dmd2 micro-batches": lambda on: toy(DMD2, on, gan={"r1": 0.1}, critic_updates=2, micro_batch=2),
    "scm": lambda on: toy(SCM, on, grid=(1.0,)),
    "scm lora": lambda on: toy(SCM, on, tuning=LORA, grid=(1.0,)),
    "phased_dmd": lambda on: toy(PhasedDMD, on, phases=PHASES, gan={}, critic_updates=1, grid=(1.0, 0.75, 0.5, 0.25)),
    "phased_dmd lora": lambda on: toy(PhasedDMD, on, tuning=LORA, phases=PHASES, gan={}, critic_updates=1, grid=(1.0, 0.75, 0.5, 0.25)),
    "f_distill": lambda on: toy(FDistill, on, gan={}, critic_updates=1),
    "f_distill lora": lambda on: toy(FDistill, on, tuning=LORA, gan={}, critic_updates=1),
    "reflow": lambda on: toy(Reflow, on, grid=(1.0,)),
    "reflow lora": lambda on: toy(Reflow, on, tuning=LORA, grid=(1.0,)),
    "dmd2 sizes": sizes,
    "dense2moe": lambda on: digits("digits_dense2moe", on, *MOE),
    "dense2moe micro-batches": lambda on: digits("digits_dense2moe", on, *MOE, "train.micro_batch=1", "train.steps=4"),
    "dense2moe blocks": lambda on: digits("digits_dense2moe", on, *GROUPED),
    "dense2moe altered": altered_briefly,
}

# And of networks whose first layer is none of their blocks, so that the gradients of heads go through it.
WITH_ROOTS: dict[str, Callable[[Strategy], Trainer]] = {
    "heads above a root": lambda on: toy(DMD2, on, family=WithRoot, gan={"r1": 0.1}, critic_updates=2),
    "heads above a trained root": lambda on: toy(DMD2, on, family=WithRoot, gan={"features": "fake_score", "r1": 0.1}, critic_updates=2),
    "heads above a root lora": lambda on: toy(DMD2, on, family=WithRoot, tuning=LORA, gan={}, critic_updates=2),
}


def trained(trainer: Trainer) -> list[Metrics]:
    """Every step's metrics, unrounded, without times."""
    rows: list[Metrics] = []
    trainer.run([lambda _step, metrics: rows.append({k: v for k, v in metrics.items() if k not in ("seconds", "samples_per_second")})])
    return rows


def kept(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, averages, statistics and moments by name."""
    named = {f"{name}/{key}": value for name, role in trainer.roles.trained.items() for key, value in role.state_dict().items()}
    named |= {f"ema/{name}/{key}": value for name, average in trainer.ema.items() for key, value in average.state_dict().items()}
    named |= {f"statistics/{key}": value for key, value in trainer.distiller.statistics.items()}
    for name, optimizer in trainer.optimizers.items():
        for index, state in enumerate(optimizer.state.values()):
            named |= {f"moments/{name}/{index}/{key}": torch.as_tensor(value) for key, value in state.items()}
    return {key: value.detach().clone() for key, value in named.items()}


def difference(name: str, one: float, other: float) -> float:
    """Relative where numbers are large: a running factor may reach thousands. A standard deviation is logged in fp32."""
    return abs(one - other) / max(1.0, abs(one)) * (1e-3 if name.endswith("sample_std") else 1)
