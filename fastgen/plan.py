"""What a recipe comes to, before anything is loaded: every name resolved and checked, and the outcome of a dry run."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastgen import checkpoint, export, foresight, sizes
from fastgen.conditioning import Conditioning
from fastgen.config import OptimizerBlock, Recipe, Tuning, flatten, validate
from fastgen.data import pair_folder
from fastgen.data.encoded import Encoder, Keeping
from fastgen.data.images import CaptionedImages, images_of
from fastgen.data.latents import LatentImages, name_of
from fastgen.data.pair_folder import Drawing, PairFolder, kept_before
from fastgen.data.pairs import Encode, Solver, TeacherSampler
from fastgen.data.prompts import load_prompts
from fastgen.data.store import DTYPES
from fastgen.data.training import prompt_weights
from fastgen.distillers import distiller_class
from fastgen.distillers.base import Distiller, Facts, MethodConfig, Origin, Setting
from fastgen.distillers.by_size import BySize
from fastgen.errors import UserError, nearest, shown
from fastgen.evaluation.block import protocol_of
from fastgen.evaluation.protocol import Protocol, shipped_protocols
from fastgen.families import adapters, pinned_revision, resolve_source, source_hash
from fastgen.families.base import Family
from fastgen.families.complete import has_no_weights
from fastgen.files import expanded, reading
from fastgen.generator import check_if_exported, in_two_parts
from fastgen.optimizers import check_optimizer
from fastgen.parallel import Cut, check_launch, choose_device, processes_of
from fastgen.rng import derive_seed
from fastgen.roles import LoraTuning, RoleSpec, build_roles
from fastgen.second_round import cannot_teach
from fastgen.surgery import compiled, formats
from fastgen.surgery.held import Storage
from fastgen.surgery.moe import conversion
from fastgen.surgery.moe.accounting import Account, account
from fastgen.surgery.moe.blocks import Groups, grouped_blocks
from fastgen.surgery.moe.capacity import Capacity, told
from fastgen.surgery.moe.conversion import Conversion
from fastgen.surgery.moe.layer import expert_layers
from fastgen.surgery.moe.modulation import Slim, slim_layers
from fastgen.surgery.moe.operators import upcycle
from fastgen.surgery.moe.split import Experts
from fastgen.surgery.shrink import Shrink, shrunk, summary

# What an expert was trained for, beside its phase and who its teacher is; another shape or tuning does not load.
_OF_AN_EXPERT = ("teacher.guidance", "teacher.negative_prompt", "teacher.embedded_guidance", "teacher.shift", "student.steps", "student.grid")
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """A recipe whose every name has been resolved and checked, before any network is loaded."""

    recipe: Recipe
    method: type[Distiller]
    method_config: MethodConfig
    family: Family
    prompts: dict[str, float] | None
    images: CaptionedImages | LatentImages | None
    pairs: PairFolder | None = None  # None also where the teacher draws them when the run starts
    protocol: Protocol | None = None
    started: bool = False
    sized: tuple[Family, ...] = ()  # the family at each of several sizes; `family` is the first
    divided: tuple[CaptionedImages | LatentImages, ...] = ()  # the images of each of them
    warnings: tuple[str, ...] = ()  # what will not go as the recipe may mean it
    # By roles and layers, how many experts a student has where some were added or removed (`moe.operators.sizes_of`). Of another run's student at
    # first; and while these are still to be altered `used`, how many of them a token uses there.
    expert_sizes: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    used: float | None = None
    kept: Mapping[str, Sequence[int]] | None = None  # the blocks that `student.shrink.keep: importance` came to, by their lists' names
    processes: int = 1  # that share the run

    @property
    def roles(self) -> dict[str, RoleSpec]:
        """The method's, and the teacher where it draws pairs when the run starts."""
        asked, roles = self.recipe.data.pairs_asked, self.method.roles_for(self.method_config)
        return roles if asked is None or asked.folder is not None else {"teacher": RoleSpec(trainable=False), **roles}

    @property
    def optimizers(self) -> dict[str, OptimizerBlock]:
        """One block for each trained role."""
        return {name: self.recipe.optimizer[_optimizer_key(name, self.recipe)] for name, spec in self.roles.items() if spec.trainable}

    @property
    def grid(self) -> list[float] | None:
        """Explicit sampling times, or None for the scheduler's own."""
        return None if self.recipe.student.grid == "auto" else list(self.recipe.student.grid)

    @property
    def families(self) -> tuple[Family, ...]:
        """The family at each size that the student draws."""
        return self.sized or (self.family,)

    @property
    def largest(self) -> int:
        """The place of the size with the most latents."""
        return max(range(len(self.families)), key=lambda place: math.prod(self.families[place].latent.shape))

    @property
    def times(self) -> Tensor:
        """The path times (N,) fp64 that the student is sampled at, of several sizes at the first."""
        return times_of(self.recipe, self.family)

    def keepings(self, keeping: Keeping) -> list[Keeping]:
        """How what has a size is kept, for each: of several in folders beside each other."""
        if not self.sized:
            return [keeping]
        return [keeping.beside(name_of(family.picture_shape[-2:])) for family in self.sized]

    def pairs_at(self, place: int, keeping: Keeping, sampler: Callable[[], TeacherSampler], encode: Encode) -> Encoder:
        """The pairs that the teacher draws at one of the sizes when the run starts, as many as the recipe asks for or its folder was begun for."""
        count = max(pairs_of(self, place), 0 if keeping.folder is None else kept_before(keeping.folder / "pairs"))
        return drawing_of(self, place).of_noise(sampler, encode, count, self.recipe.train.at_once)

    @property
    def reads_parts(self) -> bool:
        """Whether a process of several need not read more of the teacher's weights than its part, as nothing looks at whole ones before networks
        are cut: they are not measured, made into others, nor replaced by another run's."""
        recipe, narrow = self.recipe, self.storage.quantise is not None or self.storage.dtype == "bf16"
        as_they_are = self.shrink is None and self.experts is None and not narrow
        measured = self.method.straightness_of(self.method_config) > 0 or recipe.student.init != "teacher"
        return self.cut is not None and as_they_are and (self.started or not measured)

    @property
    def guidance(self) -> float:
        """Guidance the trained network is sampled with."""
        return self.recipe.teacher.guidance if self.method.student_is_guided(self.method_config) else 1.0

    @property
    def tuning(self) -> LoraTuning | None:
        tune = self.recipe.student.tune
        if not isinstance(tune, Tuning):
            return None
        shared = () if self.recipe.student.moe is None else ("shared.up", "shared.down")
        targets = (*self.family.lora_targets, *shared) if tune.lora.targets == "auto" else tuple(tune.lora.targets)
        return LoraTuning(tune.lora.rank, tune.lora.alpha or tune.lora.rank, targets, self.recipe.train.seed)

    @property
    def shrink(self) -> Shrink | None:
        block = self.recipe.student.shrink
        if block is None:
            return None
        keep = self.kept if block.keep == "importance" and self.kept is not None else block.keep
        return Shrink(block.depth, keep, block.init, self.recipe.train.seed)

    @property
    def student(self) -> dict[str, Any]:
        """What makes students other networks than their teacher, as `build_roles` takes it."""
        return {"tuning": self.tuning, "shrink": self.shrink, "experts": self.experts}

    def smaller(self) -> dict[str, Any] | None:
        """What the student has of its teacher (`shrink.summary`); None where that is all."""
        return None if self.shrink is None else summary(self.family.load_backbone(meta=True), self.shrink)

    @property
    def experts(self) -> Conversion | None:
        block, train = self.recipe.student.moe, self.recipe.train
        if block is None:
            return None
        return Conversion(
            Experts(block.experts, block.shared, block.routed, block.active if self.used is None else self.used, block.router),
            None if block.blocks == "all" else tuple(block.blocks),
            tuple(block.leave),
            block.importance,
            block.calibration,
            block.router_std,
            block.balance,
            train.seed,
            block.bias_rate,
            tuple((each.of, Groups(each.size, each.kept, each.alpha)) for each in block.groups),
            None if block.modulation is None else Slim(block.modulation.rank, block.modulation.shared),
            self._capacity() if self.used is None else None,
            self.expert_sizes,
        )

    def _capacity(self) -> Capacity | None:
        """What the number of experts follows: asked of the network how it is told the time."""
        block, family = self.recipe.student.moe, self.family
        if block is None or block.capacity is None:
            return None
        network, x = family.load_backbone(meta=True), torch.empty(1, *family.latent.shape, device="meta")
        at = told(network, lambda t: family.call(network, x, t, family.meta_conditioning(1)), (family.path.t_max, 0.0))
        return Capacity(block.capacity.noise, block.capacity.data, *at)

    def sparse(self) -> dict[str, Any] | None:
        """What a student of experts has (`moe.conversion.summary`); None for a dense one."""
        return None if self.experts is None else conversion.summary(self._converted(), *self.accounts())

    def accounts(self) -> tuple[Account, Account]:
        """What a student of experts has and costs, by kind of layer, for one evaluation on one sample; and its dense teacher."""
        ours, theirs = (self._account(network) for network in (self._converted(), self.family.load_backbone(meta=True)))
        return ours, theirs

    def _converted(self) -> nn.Module:
        """On the meta device, where experts are still to be removed with all of them."""
        asked, altering = self.experts, self.recipe.student.moe
        assert asked is not None and altering is not None
        dense = self.family.load_backbone(meta=True)
        network = conversion.converted(dense, self.family.blocks(dense), asked)
        if self.used is not None:
            if (up := altering.upcycle) is not None:
                equal = {layer.name: torch.ones(layer.num_experts) for layer in expert_layers(network)}
                upcycle(network, equal, factor=up.factor, most=up.most, noise=0)
            conversion.use(network, altering.active, self._capacity())
        return network

    def _account(self, network: nn.Module) -> Account:
        family = self.family
        x, t = torch.empty(1, *family.latent.shape, device="meta"), torch.empty(1, device="meta")
        return account(network, family.blocks(network), lambda: family.call(network, x, t, family.meta_conditioning(1)))

    def check_lora(self, key: str) -> None:
        """UserError where adapters alone cannot hold the student; key: what asks for them."""
        students = [spec for spec in self.roles.values() if spec.averaged]
        told: Any = {"method": self.recipe.distiller.name, "reshaped": _reshaped(self.recipe)}
        export.check_lora(students, self.family, tuned=self.tuning is not None, key=key, **told)

    @property
    def autocast(self) -> torch.dtype | None:
        return autocast_of(self.recipe)

    @property
    def storage(self) -> Storage:
        return storage_of(self.recipe)

    @property
    def cut(self) -> Cut | None:
        """How the run's processes keep parts of its networks, None where each has them whole. What differentiates the student needs its weights in
        full precision too; elsewhere they are gathered in the dtype that is computed in."""
        train = self.recipe.train
        compute = None if self.method.differentiates else self.autocast
        return Cut(train.mesh, compute, self.recipe.teacher.offload) if train.shard == "fsdp" else None

    @property
    def parts(self) -> int:
        """In how many parts processes keep each network."""
        cut = self.cut
        return 1 if cut is None else self.processes if cut.mesh is None else cut.mesh[1]

    @property
    def at_once(self) -> int:
        """Samples that one process trains on at a time."""
        return self.recipe.train.micro_batch or self.recipe.train.batch_size // self.processes

    @property
    def frozen_dtype(self) -> torch.dtype:
        return DTYPES[frozen_dtype_of(self.recipe)]

    def distiller(self, settings: Sequence[Setting]) -> Distiller:
        """The method, from the settings of every size."""
        each = [self.method(self.method_config, setting) for setting in settings]
        return BySize(each) if self.sized else each[0]

    def setting(self, negative: Conditioning, decode: Callable[[Tensor], Tensor] | None = None, place: int = 0) -> Setting:
        """What the method may know of the run at one of its sizes. negative: conditioning of the teacher's negative prompt, on the run's device."""
        family = self.families[place]
        return Setting(
            path=family.path,
            shape=family.latent.shape,
            grid=times_of(self.recipe, family),
            guidance=self.recipe.teacher.guidance,
            negative=negative,
            shift=family.shift,
            train_steps=self.recipe.train.steps,
            decode=decode,
            rule=family.guidance_rule,
            rule_kind=family.guidance_kind,
            groups=self._groups(),
            slimmed=self._slimmed(),
        )

    def _groups(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """Groups of the student's blocks, each with its name in the network and its place."""
        if self.experts is None or not self.experts.groups:
            return ()
        network = self._converted()
        names, places = ({id(module): name for name, module in network.named_modules()}, self.family.blocks(network))
        where = {id(block): place for place, block in enumerate(places)}
        found: dict[int, list[tuple[str, int]]] = {}
        for block, router in grouped_blocks(network):
            found.setdefault(id(router), []).append((names[id(block)], where[id(block)]))
        return tuple(tuple(group) for group in found.values())

    def _slimmed(self) -> tuple[str, ...]:
        if self.experts is None or self.experts.slim is None:
            return ()
        return ("common_modulation", *(name for name, _, _ in slim_layers(self._converted())))

    def resolved(self) -> dict[str, Any]:
        """The recipe with the method's defaults filled in and local files as absolute paths, so that it holds in any folder."""
        data = {**self.recipe.dump(), "distiller": self.method_config.model_dump(mode="json"), "teacher": resolved_teacher(self.recipe)}
        for key in ("prompts", "images", "pairs"):
            data["data"][key] = _absolute(data["data"][key])
        if isinstance(data["data"]["pairs"], dict):
            data["data"]["pairs"]["from"] = _absolute(data["data"]["pairs"]["from"])
        if data["data"]["store"] is not None:
            data["data"]["store"] = os.path.abspath(expanded(data["data"]["store"]))
        measuring = data["evaluate"]
        if measuring["data_dir"] is None and self.protocol is not None and any(_is_here(name) for name in self.protocol.files):
            measuring["data_dir"] = "."
        for key in ("data_dir", "weights_dir"):
            measuring[key] = _absolute(measuring[key])
        if measuring["protocol"] not in shipped_protocols():
            measuring["protocol"] = _absolute(measuring["protocol"])
        if data["student"]["init"] != "teacher":
            data["student"]["init"] = _absolute(data["student"]["init"])
        return data


def times_of(recipe: Recipe, family: Family) -> Tensor:
    """The path times (N,) fp64 that a recipe's student is sampled at, at a family's size."""
    student = recipe.student
    return family.sampling_times(student.steps, None if student.grid == "auto" else list(student.grid), student.stock_sampler)


def autocast_of(recipe: Recipe) -> torch.dtype | None:
    """The dtype that networks compute in, None for that of their weights."""
    return _AUTOCAST[recipe.train.precision]


def storage_of(recipe: Recipe) -> Storage:
    """How weights are kept that nothing trains: under adapters in the dtype that is computed in, unless the recipe says otherwise."""
    teacher, narrow = recipe.teacher, autocast_of(recipe) is not None and isinstance(recipe.student.tune, Tuning)
    if recipe.train.shard == "fsdp":  # cuts parameters, and what layers hold are none; under adapters they are rounded when they are gathered
        narrow = False
    return Storage("bf16" if narrow and teacher.dtype == "auto" else teacher.dtype, teacher.quantise)


def frozen_dtype_of(recipe: Recipe) -> str:
    """Of what nothing trains, as the recipe has it."""
    stated = recipe.teacher.dtype
    return recipe.train.precision if stated == "auto" else stated


def plan(
    recipe: Recipe, *, only: Literal["train", "export"] | None = None, started: bool = False, dry: bool = False, processes: int | None = None
) -> Plan:
    """Check everything a recipe names, or what one stage alone needs. UserError for the first mistake. started: the run has checkpoints,
    which hold all that `student.init` has brought, so that is not opened again. dry: nothing will be built, so a teacher's configurations
    will do, with a warning. processes: of a launcher elsewhere, None for those of this one."""
    check_launch(recipe.train, processes, dry=dry)
    method = distiller_class(recipe.distiller.name)
    config = validate(method.Config, recipe.distiller.model_dump(), "distiller")
    protocol = None if only == "export" else protocol_of(recipe.evaluate)
    recipe = pinned(recipe)
    family = sizes.find_teacher(recipe, planning=dry)
    _check_teacher(recipe, family)
    if not family.exportable and only != "train":
        raise UserError(f"recipe key teacher.pretrained: {recipe.teacher.pretrained!r} has no diffusers pipeline to export; use --only train")
    foresight.check_explicit(recipe, family)
    second = [] if started else _check_second_round(recipe, family, asked="teacher" in method.roles_for(config))
    foresight.check_sampler(recipe, family, method.samplers)
    early = None if recipe.data.buckets is None else images_of(recipe.data)
    sized = sizes.at_all(recipe, family, early)
    family = sized[0] if sized else family
    sizes.check_one_grid(recipe, method, config, [times_of(recipe, each) for each in sized])
    for each in sized or [family]:
        method.check(config, _facts(recipe, each, started=started))
    _check_optimizers(recipe, method.roles_for(config))
    _check_data(recipe, needs_latents=method.needs_latents(config), needs_pairs=method.needs_pairs(config))
    _check_inputs(recipe, method.roles_for(config), family)
    images = early or images_of(recipe.data, recipe.student.sizes)
    asked = recipe.data.pairs_asked
    pairs = None if asked is None or asked.folder is None else pair_folder.open_folder(asked.folder, asked)
    sizes.check_pairs(recipe, sized)
    if pairs is not None:
        pair_folder.check(pairs, identified_teacher(recipe), family.latent.shape, recipe.data.dtype)
    prompts = None if recipe.data.prompts is None else load_prompts(recipe.data.prompts)
    if prompts is None and images is None and pairs is not None:
        prompts = pair_folder.weighted_prompts(pairs, pairs.count)
    spread = processes_of(recipe.train, processes, dry=dry)
    parts = sizes.parts_of(images, sized)
    several: Any = {"sized": tuple(sized), "divided": tuple(parts)}
    if recipe.student.moe is not None and recipe.student.init != "teacher":
        several["expert_sizes"], several["used"] = _experts_of_another(recipe, started=started)
    planned = Plan(recipe, method, config, family, prompts, images, pairs, protocol, started, processes=spread, **several)
    for each in planned.families:
        foresight.check_grid(recipe, each)
    for own, each in zip(parts or [images], sized if parts else [family], strict=True):
        check_pictures(own, recipe, each)
    if asked is not None and asked.folder is None and recipe.data.store is not None:
        for place, keeping in enumerate(planned.keepings(Keeping(torch.device("cpu"), recipe.data).of_pairs())):
            keeping.check(planned.pairs_at(place, keeping, _undrawn, family.encode_prompts))
    small = [] if started else foresight.enlarged(parts or [images], sized if parts else [family], buckets=recipe.data.buckets is not None)
    foresight.check_store(recipe, family, prompt_weights(prompts, images), images, planned.frozen_dtype)
    for own, each in zip(parts, sized, strict=bool(parts)):
        foresight.check_stored_images(recipe, each, own, planned.frozen_dtype, name_of(each.picture_shape[-2:]))
    unmeasured = foresight.check_measuring(recipe, family, protocol, at_the_end=only is None, teacher="teacher" in planned.roles)
    _check_export(planned)
    _check_storage(planned)
    _check_compile(planned)
    _check_cut(planned)
    _check_shrink(planned)
    _check_experts(planned)
    _check_networks(planned)
    warnings = [*second, *family.warnings, *_weightless(recipe, family), *(images.warnings if images else ()), *small, *unmeasured]
    return planned if started else replace(planned, warnings=(*warnings, *check_texts(recipe, family, prompt_weights(prompts, images))))


def _check_second_round(recipe: Recipe, family: Family, *, asked: bool) -> list[str]:
    pairs = recipe.data.pairs_asked
    drawn = pairs is not None and pairs.folder is None
    return foresight.check_second_round(recipe, family, asked=asked, drawn=drawn, steps=None if pairs is None else pairs.steps)


def _weightless(recipe: Recipe, family: Family) -> list[str]:
    """A warning where the teacher's folder holds configurations alone, which only a dry run takes."""
    name = recipe.teacher.pretrained
    if not family.exportable or not has_no_weights(resolve_source(name, recipe.teacher.revision)):
        return []
    return [f"teacher.pretrained: {name!r} holds configurations and no weights: enough for this plan, and not to train"]


def check_texts(recipe: Recipe, family: Family, prompts: Iterable[str]) -> list[str]:
    """Warnings of what the teacher reads in part only, of the recipe's prompts or captions and of its negative prompt; UserError for a text
    of which it reads nothing."""
    source = "data.prompts" if recipe.data.images is None else "data.images"
    texts = {"teacher.negative_prompt": [recipe.teacher.negative_prompt], source: list(prompts)}
    return [line for key, some in texts.items() for line in family.legibility(some).check(f"recipe key {key}")]


def _facts(recipe: Recipe, family: Family, *, started: bool) -> Facts:
    student = recipe.student
    return Facts(
        steps=student.steps,
        guidance=recipe.teacher.guidance,
        grid=tuple(times_of(recipe, family).tolist()),
        end=family.path.t_max,
        train_steps=recipe.train.steps,
        origin=None if student.init == "teacher" or started else _origin(recipe),
        started=started,
        images=recipe.data.images is not None,
        exported=family.exportable,
        sampler=student.stock_sampler,
        own_sampler=student.own_sampler,
        path=family.path,
        linear_guidance=family.guidance_kind is None,
        picture=family.picture_shape,
        experts=None if student.moe is None else student.moe.active,
        grouped=student.moe is not None and bool(student.moe.groups),
        num_blocks=None if student.moe is None else len(family.blocks(family.load_backbone(meta=True))),
        reshaped=_reshaped(recipe),
        adapters=student.tune != "full",
    )


def _reshaped(recipe: Recipe) -> str | None:
    """The key by which the student has other layers than its teacher."""
    student = recipe.student
    return "student.shrink" if student.shrink is not None else "student.moe" if student.moe is not None else None


def _origin(recipe: Recipe) -> Origin:
    """What student.init holds, compared with the recipe. UserError where it has no trained student."""
    run_dir = expanded(recipe.student.init)
    trained, before = checkpoint.trained_students(run_dir)
    if not trained:
        raise UserError(f"recipe key student.init: {str(run_dir)!r} holds no student whose training is over")
    _check_same_shrink(run_dir, before["student"].get("shrink"), recipe.dump()["student"]["shrink"])
    _check_same_experts(run_dir, before["student"].get("moe"), recipe.dump()["student"]["moe"])
    _check_same_tuning(run_dir, before["student"].get("tune", "full"), recipe)
    old, new = flatten(before), flatten({"teacher": resolved_teacher(recipe), "student": recipe.dump()["student"]})
    content = checkpoint.read_state(checkpoint.latest(run_dir))["inputs"].get("teacher.pretrained")
    who = "teacher.pretrained"
    same_teacher = old.get(who) == new[who] if content is None else content == _teacher_hash(recipe)
    if old.get(who) == new[who] and old.get("teacher.lora") != new["teacher.lora"]:
        who = "teacher.lora"
    changed = ([] if same_teacher else [who]) + [key for key in _OF_AN_EXPERT if old.get(key) != new[key]]
    here = {key: "which has changed since" if old.get(key) == new[key] else f"here {new[key]!r}" for key in changed}
    differs = [f"{key} {old.get(key)!r}, {here[key]}" for key in changed]
    return Origin(str(run_dir), trained, before["distiller"], tuple(differs))


def _check_same_shrink(run_dir: Path, before: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
    """UserError where students have other blocks of their teachers. What they began with is no matter: the one takes over the other's weights."""
    blocks = [None if each is None else repr((each["depth"], each["keep"])) for each in (before, now)]  # 1 is one block, 1.0 all of them
    if blocks[0] != blocks[1]:
        said = f"{str(run_dir)!r} holds a student with student.shrink {shown(before)}, here {shown(now)}; both need the same"
        raise UserError(f"recipe key student.init: {said}")


def _check_same_experts(run_dir: Path, before: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
    """UserError where students' layers are split in other ways. How many experts are active, and how they began, is no matter."""
    shapes = [None if each is None else _shape(each) for each in (before, now)]
    if shapes[0] != shapes[1]:
        said = f"{str(run_dir)!r} holds a student with student.moe {shown(before)}, here {shown(now)}; both need the same split"
        raise UserError(f"recipe key student.init: {said}")


def _check_same_tuning(run_dir: Path, before: Any, recipe: Recipe) -> None:
    """UserError where one student is a whole network and the other an adapter, or adapters of other layers or ranks; adapters begin anew on a whole
    network where they have a base of their own."""
    now = recipe.dump()["student"]["tune"]
    begins = before == "full" and now != "full" and _reshaped(recipe) is not None
    each = [tune if tune == "full" else tune["lora"] | {"alpha": tune["lora"]["alpha"] or tune["lora"]["rank"]} for tune in (before, now)]
    if each[0] != each[1] and not begins:
        said = f"{str(run_dir)!r} holds a student with student.tune {shown(before)}, here {shown(now)}; both need the same"
        raise UserError(f"recipe key student.init: {said}")


def _experts_of_another(recipe: Recipe, *, started: bool) -> tuple[Mapping[str, Mapping[str, Sequence[int]]], float | None]:
    """How many experts the run's students have that student.init names, where some were added or removed, and how many of them a token uses there if
    they are to be altered now. started: what a run has that has begun, it tells itself (`inputs.as_begun`)."""
    assert recipe.student.moe is not None
    if started:
        return {}, min(recipe.student.moe.active, recipe.student.moe.experts)
    run_dir = expanded(recipe.student.init)
    before = checkpoint.trained_students(run_dir)[1]["student"]["moe"]
    recorded = checkpoint.read_state(checkpoint.latest(run_dir))["inputs"].get("student.moe")
    return ({} if recorded is None else json.loads(recorded)), (before["active"] if recipe.student.moe.alters else None)


def _shape(moe: dict[str, Any]) -> list[Any]:
    """What decides which parameters a student of experts has, of its recipe's block, which may be older than some keys."""
    groups = [{key: each[key] for key in ("of", "size")} for each in moe.get("groups", [])]
    return [*(moe[key] for key in ("experts", "shared", "routed", "blocks", "leave")), groups, moe.get("modulation"), moe.get("bias_rate", 0) > 0]


def pinned(recipe: Recipe) -> Recipe:
    """The recipe with the commit of its hub id in teacher.revision."""
    block = recipe.teacher
    commit = pinned_revision(block.pretrained, block.revision)
    return recipe if commit == block.revision else recipe.model_copy(update={"teacher": block.model_copy(update={"revision": commit})})


def _teacher_hash(recipe: Recipe) -> str:
    return source_hash(recipe.teacher.pretrained, recipe.teacher.revision, recipe.teacher.adapters)


def resolved_teacher(recipe: Recipe) -> dict[str, Any]:
    """The recipe's teacher block, local folders and files as their absolute paths: who the teacher is, in any folder."""
    data = recipe.teacher.model_dump(mode="json") | {"pretrained": _absolute(recipe.teacher.pretrained)}
    for adapter in data["lora"] or ():
        adapter["path"] = _absolute(adapter["path"])
    return data


def identified_teacher(recipe: Recipe) -> dict[str, Any]:
    """The same by content: its own as `sha256`, that of its adapters in place of their paths."""
    lora = [{"weight": each.weight, "sha256": each.sha256} for each in adapters.find(recipe.teacher.adapters)]
    return resolved_teacher(recipe) | {"sha256": _teacher_hash(recipe), "lora": lora or None}


def check_pictures(images: CaptionedImages | LatentImages | None, recipe: Recipe, family: Family) -> None:
    """UserError for images that are not what a recipe's teacher draws."""
    if isinstance(images, LatentImages):
        images.check(family, identified_teacher(recipe), recipe.data.dtype)
    else:
        foresight.check_images(images, family)


def _undrawn() -> TeacherSampler:
    raise AssertionError("a plan draws nothing")


def drawing_of(planned: Plan, place: int = 0) -> Drawing:
    """What the teacher draws a run's pairs with when it starts, at one of its sizes: each but the first with a seed, and so prompts, of its own."""
    recipe, family, asked = planned.recipe, planned.families[place], planned.recipe.data.pairs_asked
    assert asked is not None and asked.folder is None
    found = drawing(recipe, family, prompt_weights(planned.prompts, planned.images), asked.steps, asked.solver or "euler")
    return found if place == 0 else replace(found, seed=derive_seed(found.seed, "size", *family.picture_shape))


def pairs_of(planned: Plan, place: int) -> int:
    """How many of the pairs that the teacher draws are of one of the sizes: even shares."""
    asked = planned.recipe.data.pairs_asked
    assert asked is not None and asked.count is not None
    share, left = divmod(asked.count, len(planned.families))
    return share + (place < left)


def drawing(recipe: Recipe, family: Family, prompts: Mapping[str, float], steps: int | None, solver: Solver, images: str | None = None) -> Drawing:
    """What a recipe's teacher draws pairs with. steps: its own unless stated."""
    times = family.grid(steps or family.own_call["num_inference_steps"])
    precision = {"teacher.dtype": frozen_dtype_of(recipe), "teacher.quantise": recipe.teacher.quantise, "train.precision": recipe.train.precision}
    teacher = identified_teacher(recipe)
    return Drawing(times, family.latent.shape, solver, teacher, prompts, recipe.train.seed, precision, images)


def _absolute(source: Any) -> Any:
    """An existing file or folder by its absolute path; anything else, such as a number or a bundled name, as it is."""
    path = expanded(source) if isinstance(source, str) and source else None
    return str(path.resolve()) if path and path.exists() else source


def _is_here(name: str) -> bool:
    return not expanded(name).is_absolute() and expanded(name).exists()


def _check_export(planned: Plan) -> None:
    block = planned.recipe.export
    if block.weights == "lora":
        planned.check_lora("recipe key export.weights")
        if block.dtype != "fp32":
            raise UserError(f"recipe key export.dtype: {block.dtype} is of a whole pipeline; `export.weights: lora` writes fp32, so remove it")


def _check_storage(planned: Plan) -> None:
    """UserError for stored weights where nothing is frozen, for a format whose package is not here, and for a network on the CPU that
    gradients go through."""
    storage, method = planned.storage, planned.recipe.distiller.name
    nothing_frozen = all(spec.trains_network for spec in planned.roles.values())
    for key, given in {"dtype": storage.dtype != "auto", "quantise": storage.quantise is not None}.items():
        if given and planned.tuning is None and nothing_frozen:
            said = f"{method} with student.tune: full keeps no frozen network; remove it, or train adapters (student.tune.lora)"
            raise UserError(f"recipe key teacher.{key}: {said}")
    if planned.recipe.teacher.offload:
        judges = [name for name, spec in planned.roles.items() if spec.trainable and spec.frozen_network]
        if planned.tuning is not None:
            raise UserError("recipe key teacher.offload: true, but the student's adapters train on the teacher's network (student.tune.lora)")
        if nothing_frozen:
            raise UserError(f"recipe key teacher.offload: true, but {method} with student.tune: full keeps no frozen network; remove it")
        if judges:
            said = f"true, but the {judges[0]} sends gradients through the teacher; set distiller.gan.features to fake_score"
            raise UserError(f"recipe key teacher.offload: {said}")
    if storage.quantise is not None:
        formats.check_installed(storage.quantise, "teacher.quantise")


def _check_cut(planned: Plan) -> None:
    """UserError for what processes that keep parts of networks cannot have."""
    if planned.cut is None:
        return
    teacher, said = (
        planned.recipe.teacher,
        "train.shard: fsdp cannot cut weights that layers hold in a format; remove it, or use ddp",
    )
    if teacher.quantise is not None:
        raise UserError(f"recipe key teacher.quantise: {teacher.quantise}, but {said}")
    if teacher.dtype == "bf16":
        raise UserError(f"recipe key teacher.dtype: bf16, but {said}")
    pairs, alone = planned.recipe.data.pairs_asked, "with train.shard: fsdp no process draws alone"
    if pairs is not None and pairs.folder is None:
        raise UserError(f"recipe key data.pairs: drawn by the teacher when the run starts, but {alone}; draw them with `fastgen cache pairs`")
    if planned.recipe.evaluate.every:
        raise UserError(f"recipe key evaluate.every: {planned.recipe.evaluate.every}, but {alone}; set it to 0, the end is measured all the same")
    for name, block in planned.recipe.optimizer.items():
        if block.name == "adamw8bit":
            raise UserError(f"recipe key optimizer.{name}.name: adamw8bit has no states of parts of weights (train.shard: fsdp); use adamw")


def _check_shrink(planned: Plan) -> None:
    """UserError where the teacher's network cannot be made smaller so, or the student would share it."""
    if planned.shrink is None:
        return
    if planned.tuning is not None:
        said = "adapters (student.tune.lora) share the teacher's network, of which they have every block; train with student.tune: full, or remove it"
        raise UserError(f"recipe key student.shrink: {said}")
    shrunk(planned.family.load_backbone(meta=True), planned.shrink)


def _check_compile(planned: Plan) -> None:
    """UserError where blocks are to be compiled and cannot be."""
    if planned.recipe.train.compile == "none":
        return
    said = None
    if planned.recipe.teacher.offload:
        said = "its blocks come to the device one at a time (teacher.offload)"
    elif planned.experts is not None:
        said = "which experts a token uses is not known beforehand (student.moe)"
    elif lack := compiled.missing(choose_device(planned.recipe.train.device)):
        said = lack
    if said is not None:
        raise UserError(f"recipe key train.compile: blocks cannot be compiled: {said}; remove it")


def _check_experts(planned: Plan) -> None:
    """UserError where the teacher's layers cannot be split so, or the student would share them."""
    if planned.experts is None or (planned.started and planned.recipe.student.init != "teacher"):
        return
    if planned.shrink is not None:
        raise UserError("recipe key student.moe: the student has fewer blocks than its teacher (student.shrink); remove one of them")
    dense = planned.family.load_backbone(meta=True)
    planned.experts.check_leave(dense, planned.family.blocks(dense))
    planned._converted()


def _check_networks(planned: Plan) -> None:
    """Read the header of every weights file, and find the layers that adapters go to."""
    if planned.family.exportable:
        teacher = planned.recipe.teacher
        for file in sorted(resolve_source(teacher.pretrained, teacher.revision).rglob("*.safetensors")):
            with reading(file), safe_open(file, "pt"):
                pass
    recompute = planned.recipe.train.checkpointing
    if recompute or planned.tuning is not None or any(spec.heads for spec in planned.roles.values()):
        network = planned.family.load_backbone(meta=True)
        asked: Any = planned.student | {"recompute": recompute, "storage": planned.storage}
        build_roles(planned.roles, planned.family, network, **asked)


def _check_optimizers(recipe: Recipe, roles: Mapping[str, RoleSpec]) -> None:
    trained = [name for name, spec in roles.items() if spec.trainable]
    for name in recipe.optimizer:
        if name not in trained:
            raise UserError(f"recipe key optimizer.{name}: {recipe.distiller.name} trains no such role; {nearest(name, trained)}")
    for name in trained:
        if _optimizer_key(name, recipe) not in recipe.optimizer:
            raise UserError(f"recipe key optimizer.{name}: missing; {recipe.distiller.name} trains {', '.join(trained)}")
        check_optimizer(recipe.optimizer[_optimizer_key(name, recipe)], f"optimizer.{_optimizer_key(name, recipe)}")


def _check_teacher(recipe: Recipe, family: Family) -> None:
    """Refuse a student of several experts, or another pipeline of two networks, of which only the first would be taken; a student that is
    right at its own times alone; and one whose files are not those that were exported."""
    if not family.exportable:
        return
    folder = resolve_source(recipe.teacher.pretrained, recipe.teacher.revision)
    if reason := cannot_teach(folder) or in_two_parts(family):
        raise UserError(f"recipe key teacher.pretrained: {recipe.teacher.pretrained!r} is {reason}, which cannot teach yet")
    check_if_exported(folder)


def _optimizer_key(role: str, recipe: Recipe) -> str:
    """The role's own block, or for one of several alike (`student_2`) that of the first."""
    return role if role in recipe.optimizer else re.sub(r"_\d+$", "", role)


def _check_inputs(recipe: Recipe, roles: Mapping[str, RoleSpec], family: Family) -> None:
    wanted = [name for spec in roles.values() for name in spec.inputs]
    if wanted and family.time_projection is None:
        raise UserError(
            f"recipe key distiller.name: {recipe.distiller.name} gives the student a {wanted[0].replace('_', ' ')} input, "
            f"for which family {type(family).__name__} has no place"
        )


def _check_data(recipe: Recipe, *, needs_latents: bool, needs_pairs: bool) -> None:
    if needs_latents and recipe.data.images is None:
        raise UserError(f"recipe key data.images: missing; {recipe.distiller.name} trains on images")
    asked = recipe.data.pairs_asked
    if not needs_latents and recipe.data.prompts is None and (asked is None or asked.folder is None or not needs_pairs):
        raise UserError(f"recipe key data.prompts: missing; {recipe.distiller.name} trains on prompts")
    unused = "prompts" if needs_latents else "images"
    if getattr(recipe.data, unused) is not None:
        raise UserError(f"recipe key data.{unused}: {recipe.distiller.name} does not use it; remove it")
    if needs_pairs and recipe.data.pairs is None:
        raise UserError(
            f"recipe key data.pairs: missing; {recipe.distiller.name} regresses on noise-sample pairs: "
            "give a number, or a folder made by `fastgen cache pairs`"
        )
    if recipe.data.pairs is not None and not needs_pairs:
        raise UserError(f"recipe key data.pairs: {recipe.distiller.name} does not use them without distiller.regression; remove it")
