"""Recipes: the pydantic schema of a YAML recipe, strict about keys and types, with dotted `key=value` overrides.

Every mistake is a UserError that names the recipe key, what was given and what is allowed. Defaults live here and in the
methods' own Config; a recipe states only what differs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, ValidationInfo, field_validator, model_validator

from fastgen.errors import UserError, nearest, one_line, shown
from fastgen.files import expanded
from fastgen.manifest import MOST_SIZES, OwnSampler, Sampler
from fastgen.unused import InKey, UsedWith, check
from fastgen.yaml_files import MOST_DEPTH, parse, read_yaml

MOST_STEPS = 10**9  # of training: a year of them at thirty a second
Pixels = Annotated[int, Field(ge=1, le=2**16)]
Size = Annotated[list[Pixels], Field(min_length=2, max_length=2)]  # height, width
LARGEST = 1e18  # of a real number: its square fits single precision


class Block(BaseModel):
    """Base of every recipe block: unknown keys, infinities and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AdapterBlock(Block):
    """path: a .safetensors file, a folder with one, or `owner/name` or `owner/name/FILE` of the hub. weight: of the adapter's effect."""

    path: str = Field(min_length=1)
    weight: float = Field(1.0, ge=-1e4, le=1e4)


class TeacherBlock(Block):
    """revision: of a hub id, a commit, branch or tag; None: its newest. guidance: classifier-free guidance n + w (c - n); 1 is none. None for
    all else: the pipeline's own. size: [height, width] in pixels; resolution: the same for squares. frames: of a video. embedded_guidance: what
    the network is told of guidance, where it was trained with such an input. shift: of the teacher's times, None for what its scheduler
    says; stated, it goes before that, and the scheduler may be of any kind. dtype: of weights that nothing trains, the network's under adapters
    among them, and of the text encoders; `auto`: that of train.precision. quantise: the format of those in the network's blocks instead.
    offload: the network lies on the CPU, and its blocks come to the device one at a time. lora: adapters that are fused into the pipeline's network
    and text encoders before anything else: the teacher is the tuned one."""

    pretrained: str
    revision: str | None = Field(None, min_length=1)
    family: str = "auto"
    guidance: float = Field(1.0, ge=1, le=1e3)
    negative_prompt: str = ""
    max_sequence_length: int | None = Field(None, ge=1, le=2**20)
    size: Size | None = None
    resolution: Pixels | None = None
    frames: int | None = Field(None, ge=1, le=2**12)
    embedded_guidance: float | None = Field(None, ge=0, le=1e3)
    shift: float | None = Field(None, ge=1e-3, le=1e3)
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    quantise: Literal["fp8", "int8", "nf4"] | None = None
    offload: bool = Field(default=False, strict=True)
    lora: list[AdapterBlock] | None = Field(None, min_length=1, max_length=64)

    @property
    def options(self) -> dict[str, Any]:
        """What a family is told beside its source."""
        names = ("revision", "max_sequence_length", "size", "resolution", "frames", "embedded_guidance", "shift")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {**given, "lora": self.adapters} if self.adapters else given

    @property
    def adapters(self) -> list[dict[str, Any]]:
        """`lora` as families take it."""
        return [adapter.model_dump() for adapter in self.lora or ()]


class LoraBlock(Block):
    rank: int = Field(ge=1, le=2**16)  # no layer is wider
    alpha: float | None = Field(None, gt=0, le=1e6)  # None: equal to the rank
    targets: Literal["auto"] | list[str] = "auto"


class Tuning(Block):
    lora: LoraBlock


class ShrinkBlock(Block):
    """depth: how many of the teacher's blocks the student has, as a share with a point in it (0.5, and 1.0 for all) or as a number (1 for one).
    keep: which: `even`, `first`, `ends`, those without which the teacher is worst (`importance`), or places from 0; of a network with several lists
    of blocks, by their names. init: `pruned`, with the teacher's weights, or `random`. calibration: of `importance`, how many batches it is
    measured on."""

    depth: int | float | None = None
    keep: Literal["even", "first", "ends", "importance"] | list[int] | dict[str, list[int]] = Field("even", validate_default=True)
    init: Literal["pruned", "random"] = "pruned"
    calibration: int = Field(8, le=10**6)
    used_with: ClassVar[UsedWith] = {"calibration": ("keep", ("importance",))}

    @field_validator("depth", mode="before")
    @classmethod
    def _share_or_number(cls, depth: Any) -> Any:
        share, number = isinstance(depth, float) and 0 < depth <= 1, isinstance(depth, int) and not isinstance(depth, bool) and 1 <= depth <= 1000
        if not (depth is None or share or number):
            raise ValueError("a share of the blocks in (0, 1], such as 0.5, or a number of them, 1 or more")
        return depth

    @field_validator("keep")
    @classmethod
    def _keep_fits(cls, keep: Any, info: ValidationInfo) -> Any:
        depth = info.data.get("depth", 1.0)  # absent when it is itself a mistake
        if isinstance(keep, str) and depth is None:
            raise ValueError(f"{keep} of how many blocks? give student.shrink.depth too")
        for places in [keep] if isinstance(keep, list) else keep.values() if isinstance(keep, dict) else []:
            if not places:
                raise ValueError("leaves no block")
            if places[0] < 0 or any(a >= b for a, b in pairwise(places)):
                raise ValueError("places of blocks must ascend from 0, each once")
        if isinstance(keep, list) and isinstance(depth, int) and len(keep) != depth:
            raise ValueError(f"{len(keep)} places do not fit student.shrink.depth = {depth}")
        return keep

    @field_validator("init")
    @classmethod
    def _has_what_is_measured(cls, init: str, info: ValidationInfo) -> str:
        if init == "random" and info.data.get("keep") == "importance":
            raise ValueError("importance is of the teacher's weights, which a random start leaves behind; set student.shrink.keep to even")
        return init

    @field_validator("calibration")
    @classmethod
    def _some_batches(cls, calibration: int, info: ValidationInfo) -> int:
        if calibration < 1 and info.data.get("keep") == "importance":
            raise ValueError("importance is measured on 1 batch or more; for none, set student.shrink.keep to even, first or ends")
        return calibration


def _default(block: type[Block], key: str) -> Any:
    return block.model_fields[key].default


class GroupsBlock(Block):
    """of: the name of a list of blocks in the teacher's network; all lists where it has none. size: consecutive blocks in a group. kept: how many of
    them a sample passes through. alpha: the weight of tokens, beside the modulation's vector, in the router's scores."""

    of: str = ""
    size: int = Field(ge=2, le=1000)
    kept: int = Field(ge=1, le=1000)
    alpha: float = Field(0.5, ge=0, le=1)

    @field_validator("kept")
    @classmethod
    def _no_more_than_there_are(cls, kept: int, info: ValidationInfo) -> int:
        if kept > info.data.get("size", kept):
            raise ValueError(f"{kept} of groups of {info.data['size']} blocks")
        return kept


class ModulationBlock(Block):
    """rank: of each block's own part of its modulation layers. shared: beside one layer for each list of blocks; then rank may be 0."""

    rank: int = Field(ge=0, le=2**16)
    shared: bool = Field(default=False, strict=True)


class CapacityBlock(Block):
    """Experts that a token uses on average at the noise end and at the data end."""

    noise: float = Field(ge=0, le=4096)
    data: float = Field(ge=0, le=4096)


class UpcycleBlock(Block):
    """Copies of a trained student's most useful experts. factor: times as many experts in each layer. most: of one, itself included. utility: the
    square of the gradient of the denoising loss, or the norm of the weights. noise: of what copies' choice sees, so that copies part."""

    factor: int = Field(2, ge=2, le=64)
    most: int = Field(3, ge=2, le=64)
    utility: Literal["gradient", "weight"] = "gradient"
    noise: float = Field(1e-3, ge=0, le=1)

    @model_validator(mode="after")
    def _enough(self) -> UpcycleBlock:
        if self.most < self.factor:
            raise ValueError(f"most: at most {self.most} of each do not make {self.factor} times as many experts")
        return self


class MoEBlock(Block):
    """experts, shared, routed: how many routed experts each feed-forward layer is split into, beside a shared one, and how wide either is, in one
    unit: of a layer's hidden size H the shared one takes H shared / (shared + experts routed). active: routed experts that a token uses, on
    average where router is `expert`, and then it may be a fraction. router: whether tokens choose experts or, within a sample, experts choose
    tokens. blocks: places of those whose layers are split. leave: ends of names of layers that stay dense. importance: what neurons are dealt
    by; calibration: of `taylor`, how many batches it is measured on. router_std: of the router's logits at the start, for inputs of unit
    variance; 0 lets every token choose the same experts at first. balance: weight of the balance loss. bias_rate: how far each step moves the
    bias that experts' choice sees against their load; 0: none. groups: blocks of which a sample passes through some. modulation: the blocks'
    modulation layers made small. capacity: where experts choose, how `active`, then the mean, follows the time. Of a student that
    `student.init` names: remove_dead: the share of an even load below which an expert is removed, 0 for none; upcycle: copies of useful ones, after
    that; both are measured on `calibration` batches."""

    experts: int = Field(12, ge=1, le=4096)
    shared: float = Field(1.0, gt=0, le=4096)
    routed: float = Field(0.25, gt=0, le=4096)
    active: float = Field(2, ge=0, le=4096)
    router: Literal["token", "expert"] = "token"
    blocks: Literal["all"] | Annotated[list[Annotated[int, Field(ge=0, le=1000)]], Field(min_length=1)] = "all"
    leave: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    importance: Literal["taylor", "magnitude", "random"] = "taylor"
    calibration: int = Field(8, ge=0, le=10**6)
    router_std: float = Field(0.02, ge=0, le=1e3)
    balance: float = Field(0.01, ge=0, le=1e6)
    bias_rate: float = Field(0.0, ge=0, le=1)
    groups: list[GroupsBlock] = Field(default_factory=list, max_length=100)
    modulation: ModulationBlock | None = None
    capacity: CapacityBlock | None = None
    remove_dead: float = Field(0.0, ge=0, le=1)
    upcycle: UpcycleBlock | None = None

    @property
    def alters(self) -> bool:
        """Whether experts are removed from or added to a trained student."""
        return self.remove_dead > 0 or self.upcycle is not None

    @field_validator("capacity")
    @classmethod
    def _experts_choose(cls, capacity: CapacityBlock | None, info: ValidationInfo) -> CapacityBlock | None:
        given = info.data
        if capacity is None or not {"router", "active", "experts"} <= given.keys():
            return capacity
        if given["router"] != "expert":
            raise ValueError("where tokens choose, each uses the same number of experts at all times; set student.moe.router to expert")
        if abs((mean := (capacity.noise + capacity.data) / 2) - given["active"]) > 1e-6:
            raise ValueError(f"from {capacity.noise:g} to {capacity.data:g} is {mean:g} on average, student.moe.active says {given['active']:g}")
        return capacity

    @field_validator("bias_rate")
    @classmethod
    def _tokens_choose(cls, bias_rate: float, info: ValidationInfo) -> float:
        if bias_rate and info.data.get("router") == "expert":
            raise ValueError("where experts choose, their load is even already; remove it")
        return bias_rate

    @field_validator("calibration")
    @classmethod
    def _some_batches(cls, calibration: int, info: ValidationInfo) -> int:
        if calibration < 1 and info.data.get("importance") == "taylor":
            raise ValueError("importance is measured on 1 batch or more; for none, set student.moe.importance to magnitude or random")
        return calibration

    @field_validator("blocks")
    @classmethod
    def _blocks_differ(cls, blocks: Literal["all"] | list[int]) -> Literal["all"] | list[int]:
        if blocks != "all" and (twice := [place for place in blocks if blocks.count(place) > 1]):
            raise ValueError(f"{twice[0]} is there twice")
        return blocks

    @field_validator("remove_dead", "upcycle")
    @classmethod
    def _tokens_chose(cls, altering: Any, info: ValidationInfo) -> Any:
        if altering and info.data.get("router") == "expert":
            alike = "their loads are alike, and none is dead" if info.field_name == "remove_dead" else "a copy takes its original's tokens for ever"
            raise ValueError(f"where experts choose, {alike}; remove it, or set student.moe.router to token")
        return altering

    @model_validator(mode="after")
    def _used(self) -> MoEBlock:
        """Numbers that nothing reads are refused, but 0, which says so."""
        nothing = "router: expert, where loads are even already" if self.router == "expert" else "active: 0" if self.active == 0 else None
        if nothing and not self.groups and self.balance not in (0, _default(MoEBlock, "balance")):
            raise ValueError(f"balance is not used with {nothing}, and without groups; remove it")
        is_measured = self.importance == "taylor" or self.alters or (self.groups and self.router_std > 0)
        if not is_measured and self.calibration not in (0, _default(MoEBlock, "calibration")):
            raise ValueError(f"calibration is not used with importance: {self.importance}, where nothing else is measured; remove it")
        return self


def _of_a_trained_student(moe: MoEBlock | None, init: str) -> None:
    """ValueError where experts are to be altered and there is no trained student, or nothing to measure them on."""
    if moe is None or not moe.alters:
        return
    key = "remove_dead" if moe.remove_dead else "upcycle"
    if init == "teacher":
        raise ValueError(f"{key}: which experts are useful shows in a trained student; name its run as student.init, or remove student.moe.{key}")
    if moe.calibration < 1 and (moe.remove_dead or (moe.upcycle is not None and moe.upcycle.utility == "gradient")):
        raise ValueError(f"calibration: {key} is measured on 1 batch or more")


class StudentBlock(Block):
    """init: `teacher`, or the folder of a finished run, whose averaged students are taken over. shrink: a student of fewer blocks than its
    teacher. moe: a student whose feed-forward layers are split into experts. steps: network evaluations at inference. grid: the export
    scheduler's own times, or explicit ones in (0, 1], descending. sampler: how a sample moves between them, keeping its own noise (`euler`) or
    drawing it anew (`stochastic`); or as only fastgen draws, going back to its first noise (`fixed_noise`, RF++) or along PeRFlow's
    `linear_windows`: such a student is exported as `euler`, and measured both ways. sizes: [height, width] in pixels of each size that it draws,
    of which a batch has one; None for the teacher's alone."""

    init: str = "teacher"
    tune: Literal["full"] | Tuning = "full"
    shrink: ShrinkBlock | None = None
    moe: MoEBlock | None = None
    steps: int = Field(ge=1, le=1000)
    grid: Literal["auto"] | list[float] = "auto"
    sampler: Literal[Sampler, OwnSampler] = "euler"
    sizes: Annotated[list[Size], Field(min_length=1, max_length=MOST_SIZES)] | None = None

    @property
    def stock_sampler(self) -> Sampler:
        """That of the exported pipeline."""
        return "stochastic" if self.sampler == "stochastic" else "euler"

    @property
    def own_sampler(self) -> OwnSampler | None:
        """`sampler` where no pipeline has it."""
        return None if self.sampler in ("euler", "stochastic") else self.sampler

    @field_validator("moe")
    @classmethod
    def _alters_a_student(cls, moe: MoEBlock | None, info: ValidationInfo) -> MoEBlock | None:
        _of_a_trained_student(moe, info.data.get("init", ""))
        return moe

    @field_validator("sizes")
    @classmethod
    def _sizes_differ(cls, sizes: list[list[int]] | None) -> list[list[int]] | None:
        if twice := [size for place, size in enumerate(sizes or ()) if size in (sizes or ())[:place]]:
            raise ValueError(f"{twice[0]} is there twice")
        return sizes

    @field_validator("grid")
    @classmethod
    def _grid_fits(cls, grid: Literal["auto"] | list[float], info: ValidationInfo) -> Literal["auto"] | list[float]:
        if isinstance(grid, list):
            steps = info.data.get("steps", len(grid))  # absent when it is itself a mistake
            if len(grid) != steps:
                raise ValueError(f"{len(grid)} times do not fit student.steps = {steps}")
            if any(not 0 < t <= 1 for t in grid) or any(a <= b for a, b in pairwise(grid)):
                raise ValueError("times must descend within (0, 1]")
        return grid


class MethodBlock(BaseModel):
    """The method's name; its other keys are checked by the method's own Config."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str


class PairsBlock(Block):
    """from: `teacher`, which draws the pairs when the run starts, or a folder made by `fastgen cache pairs`. count: of a folder the first so many,
    None for all. solver, steps: of the teacher's sampler, None for euler and its own number of steps, or for what a folder was drawn with."""

    model_config = ConfigDict(validate_by_name=False)
    source: str = Field("teacher", alias="from", min_length=1)
    count: int | None = Field(None, ge=1, le=10**9)
    solver: Literal["euler", "heun"] | None = None
    steps: int | None = Field(None, ge=1, le=1000)

    @model_validator(mode="after")
    def _counted(self) -> PairsBlock:
        if self.folder is None and self.count is None:
            raise ValueError("count: missing; it says how many pairs the teacher draws")
        return self

    @property
    def folder(self) -> str | None:
        return None if self.source == "teacher" else self.source


def _kind_of_pairs(given: Any) -> str:
    return "int" if isinstance(given, int) else "str" if isinstance(given, str) else "PairsBlock"


class DataBlock(Block):
    """background: what transparent pixels of the images lie on, a colour as CSS writes it. caption_key: of their metadata, the key or column
    with the captions. skip_broken: leave out images without caption or that cannot be read. crop: which part of an image of another aspect is
    taken, the middle or a random one. buckets: `auto` fills student.sizes with those that the images come nearest to. store: a folder that encoded
    prompts and images are kept in and read from, None for memory. dtype: of what is kept. keep: whether a store's rows are read into memory at the
    start, or each batch when it is needed; `auto`: what fits. encode: all before training, or each batch when it is drawn, by encoders that stay in
    memory. pairs: noise-sample pairs of the teacher: how many it draws when the run starts, or a folder made by `fastgen cache pairs`, or both with
    how they are drawn. prompts: where a method trains on a folder of pairs, by default those of the pairs."""

    prompts: str | None = None
    images: str | None = None
    background: str = "white"
    caption_key: str = Field(default="text", min_length=1)
    skip_broken: bool = Field(default=False, strict=True)
    crop: Literal["center", "random"] = "center"
    buckets: Literal["auto"] | None = None
    store: str | None = Field(default=None, min_length=1)
    dtype: Literal["fp32", "bf16"] = "fp32"
    keep: Literal["auto", "memory", "disk"] = "auto"
    encode: Literal["ahead", "online"] = "ahead"
    pairs: (
        Annotated[Annotated[int, Tag("int")] | Annotated[str, Tag("str")] | Annotated[PairsBlock, Tag("PairsBlock")], Discriminator(_kind_of_pairs)]
        | None
    ) = None

    @field_validator("background", mode="before")
    @classmethod
    def _opaque_colour(cls, background: Any) -> Any:
        from PIL import ImageColor

        try:
            channels = ImageColor.getrgb(background) if isinstance(background, str) else ()
        except ValueError:
            channels = ()
        if len(channels) < 3 or max(channels) > 255 or channels[3:] not in ((), (255,)):
            raise ValueError("no opaque colour; allowed: a name such as white, or hex digits in quotes such as '#ff8800'")
        return background

    @field_validator("pairs", mode="before")
    @classmethod
    def _number_or_folder(cls, pairs: Any) -> Any:
        number = isinstance(pairs, int) and not isinstance(pairs, bool) and pairs >= 1
        if not (pairs is None or number or isinstance(pairs, (Mapping, PairsBlock)) or (isinstance(pairs, str) and pairs)):
            raise ValueError(
                "a number of pairs, 1 or more, or a folder made by `fastgen cache pairs`, or a block with keys from, count, solver, steps"
            )
        return pairs

    @property
    def pairs_asked(self) -> PairsBlock | None:
        """What `pairs` comes to."""
        if self.pairs is None or isinstance(self.pairs, PairsBlock):
            return self.pairs
        return PairsBlock.model_validate({"count": self.pairs} if isinstance(self.pairs, int) else {"from": self.pairs})


class OptimizerBlock(Block):
    """One role's optimizer; betas: of sgd the first is its momentum; warmup in student steps; clip: largest gradient norm, null for any."""

    used_with: ClassVar[UsedWith] = {"eps": ("name", ("adamw", "adam", "adamw8bit"))}
    name: Literal["adamw", "adam", "sgd", "adamw8bit"] = "adamw"
    lr: float = Field(gt=0, le=1e30)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0, le=1e3)
    weight_decay: float = Field(0.0, ge=0, le=1e3)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(0, ge=0, le=MOST_STEPS)
    clip: float | None = Field(10.0, gt=0)

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if any(not 0 <= beta < 1 for beta in betas):
            raise ValueError("betas must be in [0, 1)")
        return betas


class TrainBlock(Block):
    """steps: student updates. batch_size: global. micro_batch: samples in memory at once on one process, None for all. checkpointing: blocks keep
    their inputs alone and are computed again in the backward pass: less memory, more time. ema_device: where averages lie, with the weights or
    on the CPU; offload_optimizers: states lie on the CPU but for their role's own step. shard: how a launcher's processes share the work, `ddp`
    with every network on each, `fsdp` with a part of each; auto: ddp under a launcher, none without. mesh: of fsdp, (copies, parts of a copy).
    timeout: seconds after which processes give up one that does not answer. save_beside: checkpoints are written while training goes on, from
    copies in the CPU's memory. compile: torch.compile of each of a network's blocks; results change by rounding."""

    steps: int = Field(ge=1, le=MOST_STEPS)
    batch_size: int = Field(ge=1, le=2**20)
    micro_batch: int | None = Field(None, ge=1, le=2**20)
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    checkpointing: bool = Field(default=False, strict=True)
    ema: float = Field(0.999, ge=0, lt=1)
    ema_device: Literal["same", "cpu"] = "same"
    offload_optimizers: bool = Field(default=False, strict=True)
    shard: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    mesh: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    timeout: int = Field(1800, ge=1, le=10**6)
    device: str = "auto"
    checkpoint_every: int = Field(500, ge=0, le=MOST_STEPS)
    keep: int = Field(2, ge=1, le=MOST_STEPS)
    save_beside: bool = Field(default=False, strict=True)
    compile: Literal["none", "blocks"] = "none"
    sample_every: int = Field(500, ge=0, le=MOST_STEPS)

    @property
    def at_once(self) -> int:
        """Samples that one process handles at a time: in training, encoders and decoder alike."""
        return self.micro_batch or self.batch_size

    @field_validator("precision")
    @classmethod
    def _no_fp16(cls, precision: str) -> str:
        if precision == "fp16":
            raise ValueError("fp16 training overflows in score differences; use bf16 or fp32")
        return precision

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError("not a device; allowed: auto, cpu, cuda, cuda:N")
        return device


class EvaluateBlock(Block):
    """protocol: how the student is measured, a shipped protocol's name or a .yaml file; null for not at all. every: also measure each so many
    training steps; 0 is never. data_dir, weights_dir: where a protocol's prompts and references, and its extractors' weights, lie."""

    protocol: str | None = None
    every: int = Field(default=0, ge=0, le=MOST_STEPS)
    data_dir: str | None = None
    weights_dir: str | None = None


class ExportBlock(Block):
    """weights: `full` for a whole pipeline, `lora` for the adapter alone, which is always fp32. dtype: of a whole pipeline."""

    weights: Literal["full", "lora"] = "full"
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"


class Recipe(Block):
    """A whole run. Unused keys of the method's own block are its Config's to refuse."""

    teacher: TeacherBlock
    student: StudentBlock
    distiller: MethodBlock
    data: DataBlock
    optimizer: dict[str, OptimizerBlock]
    train: TrainBlock
    evaluate: EvaluateBlock = EvaluateBlock()
    export: ExportBlock = ExportBlock()

    @model_validator(mode="after")
    def _nothing_unused(self) -> Recipe:
        check(self)
        for role, block in self.optimizer.items():
            check(block, above=("optimizer", role))
        return self

    @classmethod
    def load(cls, source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """A recipe from a YAML file or the bare name of a shipped one, with `a.b=value` overrides. UserError for any mistake."""
        data = read_yaml(find_recipe(source))
        for override in overrides:
            apply_override(data, override)
        return validate(cls, data)

    def dump(self) -> dict[str, Any]:
        """Plain data that `validate(Recipe, ...)` reads back to an equal recipe."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.dump(), sort_keys=False, width=120)


M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], data: Any, prefix: str = "", *, of: str = "recipe") -> M:
    """`data` as a `model`; the first mistake becomes a UserError naming its key under `prefix`. of: what has these keys."""
    try:
        read = model.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{of} {_explain(model, error, prefix)}") from error
    _check_numbers(data, read.model_dump(), prefix, of)
    return read


def _check_numbers(given: Any, read: Any, key: str, of: str) -> None:
    """Refuse what pydantic takes for numbers: booleans, and, in blocks that do not forbid them, NaN and infinity; and what torch cannot square."""
    if isinstance(given, dict) and isinstance(read, dict):
        for name in given.keys() & read.keys():
            _check_numbers(given[name], read[name], f"{key}.{name}" if key else name, of)
    elif isinstance(given, (list, tuple)) and isinstance(read, (list, tuple)):
        for i, (one, number) in enumerate(zip(given, read, strict=True)):
            _check_numbers(one, number, f"{key}.{i}", of)
    elif isinstance(given, bool) and not isinstance(read, bool):
        raise UserError(f"{of} key {key}: a number is needed, not a boolean (given: {shown(given)})")
    elif isinstance(read, float) and not math.isfinite(read):
        raise UserError(f"{of} key {key}: a finite number is needed (given: {shown(given)})")
    elif isinstance(read, float) and abs(read) > LARGEST:
        raise UserError(f"{of} key {key}: a number of at most {LARGEST:g} is needed (given: {shown(given)})")


def _explain(model: type[BaseModel], error: ValidationError, prefix: str) -> str:
    # An unknown key explains the missing one beside it, and the most deeply nested message of a union is the specific one.
    mistakes = sorted(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", -len(e["loc"])))
    found, loc = mistakes[0], [str(part) for part in mistakes[0]["loc"]]
    path, given = _without_union_tags(loc), found["input"]
    if isinstance(cause := found.get("ctx", {}).get("error"), InKey):
        path, given = [*path, *cause.keys], cause.given
    key = one_line(".".join(([prefix] if prefix else []) + path), 200) or "(top level)"
    if found["type"] == "extra_forbidden":
        return f"key {key}: unknown key; {nearest(loc[-1], _fields_at(model, loc[:-1]))}"
    if found["type"] == "missing" and isinstance(found["loc"][-1], str):
        return f"key {key}: missing, and it has no default"
    same = [e for e in mistakes if _without_union_tags(e["loc"]) == _without_union_tags(loc)]  # one for each member of a union
    message = " or ".join(dict.fromkeys(_message(model, e) for e in same))
    return f"key {key}: {message} (given: {shown(given)})"


def _message(model: type[BaseModel], mistake: Any) -> str:
    if mistake["type"] == "model_type":
        fields = _fields_at(model, [str(part) for part in mistake["loc"]])
        return f"a block with keys among {', '.join(fields)}"
    if mistake["type"] == "list_type":
        return "a list in brackets" + (", such as [{path: style.safetensors, weight: 0.8}]" if mistake["loc"][-2:] == ("teacher", "lora") else "")
    if mistake["type"] in ("too_short", "too_long"):
        limits, few = mistake["ctx"], mistake["type"] == "too_short"
        return f"a list of {'at least' if few else 'at most'} {limits['min_length' if few else 'max_length']} is needed"
    return mistake["msg"].removeprefix("Value error, ")


def _without_union_tags(loc: Iterable[Any]) -> list[str]:
    return [str(part) for part in loc if not _is_union_tag(str(part))]


def _is_union_tag(part: str) -> bool:
    tags = {"Tuning", "PairsBlock", "int", "str", "constrained-float", "constrained-int"}
    return part.startswith(("literal[", "list[", "tuple[", "dict[")) or part in tags


def _fields_at(model: Any, loc: list[str]) -> list[str]:
    """Field names of the block at `loc` below `model`."""
    for part in loc:
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        blocks = [a for a in _within(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        if blocks:
            model = blocks[-1]
    return [field.alias or name for name, field in model.model_fields.items()]


def _within(annotation: Any) -> list[Any]:
    """An annotation and all that it is made of."""
    return [annotation, *(each for part in get_args(annotation) for each in _within(part))]


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings."""
    if not isinstance(data, dict):
        return {prefix: data}
    return {key: value for name, below in data.items() for key, value in flatten(below, f"{prefix}.{name}" if prefix else name).items()}


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in nested data; the value is read as YAML and typed by the schema afterwards."""
    key, equals, text = override.partition("=")
    parts, said = key.strip().split("."), f"override {shown(override)}"
    if not equals or not all(parts):
        raise UserError(f"{said} is not of the form key=value, such as train.steps=10")
    if len(parts) > MOST_DEPTH:
        raise UserError(f"{said}: no recipe key has {len(parts)} parts")
    try:
        value = parse(text)
    except ValueError as error:
        raise UserError(f"{said}: the value is not valid YAML: {error}") from error
    for depth, part in enumerate(parts[:-1]):
        below = data.setdefault(part, {})
        if not isinstance(below, dict):
            if parts[: depth + 1] == ["student", "tune"]:
                below = data[part] = {}  # `full` gives way to `student.tune.lora.rank=8`
            else:
                raise UserError(f"{said}: recipe key {'.'.join(parts[: depth + 1])} is {shown(below)}, which has no keys below it")
        data = below
    data[parts[-1]] = value


def recipe_folder() -> Path:
    """Where shipped recipes live: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def shipped_recipes() -> Mapping[str, Path]:
    """Shipped recipes by bare name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def find_recipe(source: str | Path) -> Path:
    """The file behind a path or a shipped recipe's bare name; a shipped recipe is also found as `recipes/NAME.yaml` anywhere."""
    path = expanded(source)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    bare = path.name.removesuffix(".yaml")
    if bare in shipped and str(path.parent) in (".", "recipes"):
        return shipped[bare]
    if path.is_dir():
        raise UserError(f"{shown(str(source))} is a folder, not a recipe")
    if path.exists():
        raise UserError(f"{shown(str(source))} is a device or a pipe; a recipe is read from a file")
    raise UserError(f"no recipe {shown(str(source))}; {nearest(bare, shipped)}")
