"""A plan with its networks, data and trainer: what a run works with, before its first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastgen import checkpoint, conditioning, inputs
from fastgen.config import Recipe
from fastgen.data import training
from fastgen.data.encoded import Keeping
from fastgen.data.encoders import origin_of
from fastgen.data.pairs import Pairs, drawn_prompts
from fastgen.denoiser import Denoiser, Predictor
from fastgen.errors import UserError
from fastgen.export import Expert, StudentInfo
from fastgen.families import adapters
from fastgen.families.base import Family
from fastgen.files import expanded
from fastgen.generator import ImageGenerator
from fastgen.group import Alone
from fastgen.licensing import license_of
from fastgen.parallel import Strategy, launch
from fastgen.plan import Plan, drawing_of, pairs_of
from fastgen.progress import Progress
from fastgen.roles import Roles, build_roles
from fastgen.run.calibration import centre_routers, measured, with_altered_experts, with_kept
from fastgen.run.straightened import straightness_of
from fastgen.shards import largest
from fastgen.surgery.compiled import compile_blocks
from fastgen.surgery.second_time import Defaults
from fastgen.trainer import Trainer


@dataclass
class Run:
    """A plan with its networks, data and trainer, and what it was begun with. warnings: what was said before training. straightness: of the
    teacher's flow, where it was measured."""

    plan: Plan
    roles: Roles
    data: training.Data
    trainer: Trainer
    parallel: Strategy
    began: inputs.Inputs = field(default_factory=inputs.Inputs)
    warnings: tuple[str, ...] = ()
    straightness: dict[str, Any] | None = None

    @property
    def examples(self) -> list[str]:
        """Of the prompts that it draws, those that its export is shown and verified with."""
        return spread(self.data.prompts, 8)

    def info(self) -> StudentInfo:
        recipe, resolved = self.plan.recipe, self.plan.resolved()
        teacher = {key: resolved["teacher"][key] for key in ("pretrained", "revision", "guidance", "negative_prompt")}
        teacher["sha256"] = self.began.hashes.get(inputs.TEACHER)
        if lora := adapters.find(self.plan.recipe.teacher.adapters):
            teacher["lora"] = [adapter.record for adapter in lora]
        if stated := license_of(teacher["pretrained"], teacher["revision"]):
            teacher["license"] = stated
        return StudentInfo(
            method=recipe.distiller.name,
            steps=recipe.student.steps,
            grid=self.plan.grid,
            guidance=self.plan.guidance,
            sampler=recipe.student.stock_sampler,
            own_sampler=self.own_sampler(),
            teacher=teacher,
            prompts=self.examples,
            recipe=resolved,
            unfinished=self.unfinished(),
            families=self.plan.sized,
            smaller=self.plan.smaller(),
            sparse=self.plan.sparse(),
        )

    def own_sampler(self) -> dict[str, Any] | None:
        """As fastgen.json has it (`manifest.Beside`); None for a student of a stock sampler."""
        name = self.plan.recipe.student.own_sampler
        if name is None:
            return None
        return {"name": name, **({"edges": self.trainer.distiller.windows()} if name == "linear_windows" else {})}

    def unfinished(self) -> dict[str, dict[str, int]]:
        """The students that this run still trains, each with its own step and how many it will have."""
        distiller = self.trainer.distiller
        trained = {role: distiller.trained(role, self.trainer.step) for role, _ in distiller.students()}
        return {role: {"step": step, "of": count} for role, (step, count) in trained.items() if step < count}

    def generator(self, role: str, experts: Sequence[Expert] = ()) -> ImageGenerator:
        """Pictures from a role's current weights, of several sizes the first: the student on its grid, the teacher at its own steps. experts: the
        student's own, where they are not the run's roles as they stand."""
        recipe, family = self.plan.recipe, self.plan.family
        student = role == "student"
        models = self.trainer.models | {expert.role.name: expert.role.predictor for expert in experts}
        made = ImageGenerator(
            family,
            self.trainer.distiller.sampler(models) if student else self.roles[role].predictor,
            steps=recipe.student.steps if student else family.own_call["num_inference_steps"],
            guidance=self.plan.guidance if student else recipe.teacher.guidance,
            negative_prompt=recipe.teacher.negative_prompt,
            grid=self.plan.grid if student else None,
            device=next(experts[0].role.denoiser.parameters()).device if experts else self.parallel.device,
            sampler=recipe.student.stock_sampler if student else family.samplers[0],
            name="the student" if student else f"teacher {recipe.teacher.pretrained!r}",
        )
        made.families = self.plan.sized
        return made

    def averaged(self) -> list[Expert]:
        """The student's experts, with their averaged weights for good. Where processes keep parts of networks all of them call this, and the main one
        alone has experts."""
        self.trainer.ema.settle()
        whole = [(self.parallel.plain(self.roles[name]), end) for name, end in self.trainer.distiller.students()]
        return [Expert(role, end) for role, end in whole if role is not None]


def keeping_of(plan: Plan, device: torch.device, members: Alone | None = None, family: Family | None = None) -> Keeping:
    """How a run of the plan keeps what it encodes, which its processes share, at the size of a family, by default the first."""
    origin = origin_of(family or plan.family, plan.recipe.teacher, plan.recipe.data, plan.frozen_dtype)
    return Keeping(device, plan.recipe.data, origin, members or Alone())


def image_keepings(plan: Plan, device: torch.device, members: Alone | None = None) -> list[Keeping]:
    """And its images at each of its sizes."""
    return [plan.keepings(keeping_of(plan, device, members, family))[place] for place, family in enumerate(plan.families)]


def prepared(plan: Plan, parallel: Strategy, progress: Progress, warn: Callable[[str], None]) -> training.Data:
    """What a plan trains on but pairs, encoded."""
    keeping, batch = keeping_of(plan, parallel.device, parallel.members), plan.recipe.train.at_once
    if not plan.sized:
        return training.prepare(plan.family, plan.prompts, plan.images, keeping, progress, warn, batch=batch)
    keepings = [keeping, *image_keepings(plan, parallel.device, parallel.members)]
    return training.prepare_sizes(plan.sized, plan.prompts, plan.images, plan.divided, keepings, progress, warn, batch=batch)


def build(plan: Plan, progress: Progress) -> Run:
    """Load the teacher, make the roles, encode the data."""
    recipe, family = plan.recipe, plan.family
    parallel, sharded = launch(recipe.train, plan.cut), plan.cut is not None
    plan.method.load(plan.method_config)
    for each in plan.families:
        each.encode_with(parallel.device, plan.frozen_dtype)
    left_out: list[str] = []
    data = prepared(plan, parallel, progress, left_out.append)
    for warning in left_out:
        progress.warn(f"warning: {warning}")
    progress.stage(f"loading {recipe.teacher.pretrained}")
    outline = family.load_outline() if plan.reads_parts else None
    if outline is None:
        backbone = family.load_backbone()
        _check_finite(recipe, backbone.parameters())
    else:
        backbone, parallel.weights = outline
    negative = conditioning.to(family.encode_negative(recipe.teacher.negative_prompt or None), parallel.device)
    settings = [plan.setting(negative, each.decode, place) for place, each in enumerate(plan.families)]
    setting = settings[0]
    defaults = Defaults.on(setting.path, setting.grid, setting.guidance)
    plan = with_kept(plan, backbone, data, settings, parallel.device, progress, parallel.members)
    importance = None
    if plan.experts is not None and not plan.started and recipe.student.init == "teacher":
        progress.stage("measuring which neurons count")
        importance = measured(plan, plan.experts, backbone, data, settings, parallel.device)
    roles = build_roles(
        plan.roles,
        family,
        backbone,
        **plan.student,
        importance=importance,
        autocast=plan.autocast,
        defaults=defaults,
        seed=recipe.train.seed,
        recompute=recipe.train.checkpointing,
        storage=plan.storage,
        device=torch.device("cpu") if sharded else parallel.device,  # where they are cut, a block at a time
        offloaded=recipe.teacher.offload and not sharded,
    )
    if recipe.student.init == "teacher" and not plan.started:
        centre_routers(plan, roles, backbone, data, settings, parallel.device, progress)
    if recipe.student.init != "teacher" and not plan.started:
        taken = checkpoint.load_students(expanded(recipe.student.init), roles, plan.method.inherited(plan.method_config))
        roles.align_adapters(taken)
        plan = with_altered_experts(plan, roles, taken, backbone, data, settings, parallel.device, progress, parallel.members)
    before = None
    if (samples := plan.method.straightness_of(plan.method_config)) and not plan.started:
        progress.stage("measuring how straight the teacher's flow is")
        teacher = setting.guide(Predictor(Denoiser(backbone, family, autocast=plan.autocast), family))  # without the roles' adapters
        told: Any = {"guidance": setting.guidance, "samples": samples, "train": recipe.train, "device": parallel.device}
        before = straightness_of(teacher, data, setting, **told)
    trainer = Trainer(plan.distiller(settings), roles, data, plan.optimizers, recipe.train, parallel)
    if outline is not None:
        _check_finite(recipe, (parameter for role in roles.values() for parameter in role.denoiser.backbone.parameters()))
    if recipe.train.compile == "blocks":
        progress.stage("compiling blocks as they are called first")
        compile_blocks(block for role in roles.values() for block in family.blocks(role.denoiser.backbone))
    return Run(plan, roles, data, trainer, parallel, warnings=(*plan.warnings, *left_out), straightness=before)


def _check_finite(recipe: Recipe, weights: Iterable[Tensor]) -> None:
    if not math.isfinite(largest(weights)):
        raise UserError(f"recipe key teacher.pretrained: {recipe.teacher.pretrained!r} has weights that are not finite, so it cannot teach")


def load_pairs(run: Run, progress: Progress, place: int = 0) -> Pairs:
    """The noise-sample pairs that the recipe names, at one of its sizes: of a folder, or drawn from the teacher now."""
    plan = run.plan
    keeping = plan.keepings(keeping_of(plan, run.parallel.device, run.parallel.members).of_pairs())[place]
    if plan.pairs is not None:
        return plan.pairs.load(keeping, progress)
    drawing, asked = drawing_of(plan, place), pairs_of(plan, place)
    predict = run.trainer.distiller.setting.guide(run.trainer.models["teacher"])
    encoder = plan.pairs_at(place, keeping, lambda: drawing.sampler(predict, run.parallel.device), run.data.conditioning)
    rows = keeping.rows(encoder, progress)
    pairs = Pairs(rows, tuple(drawn_prompts(drawing.prompts, range(encoder.count), seed=drawing.seed)))
    return pairs if encoder.count == asked else pairs.first(asked)


def with_pairs(run: Run, progress: Progress) -> training.Data:
    """A run's data with the pairs that its recipe names beside it, of each size."""
    plan, batch = run.plan, run.plan.recipe.train.at_once
    keepings = plan.keepings(keeping_of(plan, run.parallel.device, run.parallel.members))

    def at(place: int, data: training.TrainingData) -> training.TrainingData:
        return training.with_pairs(data, load_pairs(run, progress, place), plan.family, keepings[place], progress, batch=batch)

    if isinstance(run.data, training.SizedData):
        return replace(run.data, parts=tuple(at(place, data) for place, data in enumerate(run.data.parts)))
    return at(0, run.data)


def spread(items: Sequence[str], count: int) -> list[str]:
    """`count` (2 or more) items at even distances, the first and the last among them; all of them when there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
