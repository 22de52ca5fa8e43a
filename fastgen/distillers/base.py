"""What a distillation method is: roles it needs, and updates made of terms. It owns no network and no optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from fastgen import timesteps, unused
from fastgen.conditioning import Conditioning
from fastgen.data.training import Batch
from fastgen.denoiser import Predictor, guided
from fastgen.distillers import running
from fastgen.guidance import GuidanceRule, linear
from fastgen.manifest import OwnSampler, Sampler
from fastgen.path import Flow, Kind, Path
from fastgen.rng import SampleRng
from fastgen.roles import RoleSpec
from fastgen.sampling import Experts, Predict
from fastgen.unused import UsedWith


@dataclass(frozen=True)
class Loss:
    """A scalar fp32 loss, and detached numbers to log: scalars, or one value a sample (B,), of which NaN stay out of the mean."""

    value: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


Models = Mapping[str, Predictor]
Term = Callable[[Models, Batch, SampleRng, int], Loss]

__all__ = ["Batch", "Blend", "Distiller", "Facts", "Loss", "MethodConfig", "Models", "Options", "Origin", "Setting", "Term", "Update"]


@dataclass(frozen=True)
class Blend:
    """Move the weights of role `target` towards those of role `source`: (1 - weight) target + weight source."""

    target: str
    source: str
    weight: float


@dataclass(frozen=True)
class Update:
    """One optimizer step of the roles `trains`, on the sum of `terms`; each term's graph is freed before the next is built.

    Before it, roles in `settles` take their average for their weights, and then `blends` are made. only: of their parameters it trains those
    whose names (`Role.parameters`) it accepts; the others stay as they are.
    """

    trains: tuple[str, ...]
    terms: tuple[Term, ...]
    blends: tuple[Blend, ...] = ()
    settles: tuple[str, ...] = ()
    only: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Setting:
    """What a method may know of the run, all of it independent of the pipeline family."""

    path: Path
    shape: tuple[int, ...]  # of one latent sample
    grid: Tensor  # (N,) fp64 path times the student is sampled at
    guidance: float  # classifier-free guidance of the teacher, diffusers' convention
    negative: Conditioning  # one sample
    shift: float  # the teacher's time shift
    train_steps: int = 1  # student steps of the whole run
    decode: Callable[[Tensor], Tensor] | None = None  # latents (B, *shape) -> pixels (B, 3, H, W) in [0, 1], with gradients; None: no pixels
    rule: GuidanceRule = linear  # the pipeline's
    rule_kind: Kind | None = None  # the prediction on the teacher's own path that the rule is for; None: any
    groups: tuple[tuple[tuple[str, int], ...], ...] = ()  # of the student's blocks: names in its network, and places
    slimmed: tuple[str, ...] = ()  # names of the student's modulation layers that were made small, and of what they share

    def last_time(self, other: Path) -> float:
        """The time on `other` of the noisiest level that the teacher's own path reaches."""
        return other.time(self.path.ratio(torch.tensor(self.path.t_max, dtype=torch.float64))).item()

    def guide(self, predict: Predict, scale: Tensor | None = None) -> Predict:
        """A predictor with the teacher's guidance; scale: one a sample (B,) instead of the teacher's."""
        return guided(predict, self.guidance if scale is None else scale, self.negative, self.rule, self.rule_kind)

    def draw_times(self, sampling: timesteps.TimeSampling, uniform: Tensor) -> Tensor:
        """Path times (B,) fp32 from uniform numbers (B,)."""
        return sampling.quantile(uniform, teacher_shift=self.shift) * self.path.t_max


@dataclass(frozen=True)
class Origin:
    """The run that student.init names."""

    folder: str
    trained: tuple[str, ...]  # its students whose training is over
    method: Mapping[str, Any]  # its distiller block
    differs: tuple[str, ...] = ()  # keys of teacher and student with other values than this recipe's, each with both


@dataclass(frozen=True)
class Facts:
    """What the rest of a recipe tells a method before anything is loaded."""

    steps: int  # student.steps
    guidance: float  # teacher.guidance
    grid: tuple[float, ...]  # descending path times that the student is sampled at
    end: float  # the path's largest time
    train_steps: int = 1
    origin: Origin | None = None  # of student.init
    started: bool = False  # a run that goes on from its own checkpoint, whatever student.init was
    images: bool = True  # whether data.images is given
    picture: tuple[int, ...] | None = None  # shape of what a sample decodes to, (3, H, W) unless the teacher makes vectors
    exported: bool = False  # whether the student becomes a pipeline, which moves between its steps as its sampler does
    sampler: Sampler = "euler"  # that student.sampler is exported as
    own_sampler: OwnSampler | None = None  # student.sampler where no pipeline has it
    adapters: bool = False  # whether these are all of networks that trains
    reshaped: str | None = None  # the recipe key by which the student's network is of another shape than roles that start as the teacher does
    experts: float | None = None  # student.moe.active; None: a dense student
    grouped: bool = False  # whether its blocks are in groups (student.moe.groups)
    num_blocks: int | None = None  # of the teacher's network; known where its layers are split
    path: Path = field(default_factory=Flow)  # the teacher's
    linear_guidance: bool = True  # whether the pipeline's guidance is n + w (c - n), of predictions of any kind


class Options(BaseModel):
    """Base of a block of keys: unknown ones are refused, and a block that is given in part keeps the rest of its default. used_with: keys that count
    with some values of another alone, see unused.py."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    used_with: ClassVar[UsedWith] = {}

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        defaults = {name: field.default for name, field in cls.model_fields.items() if isinstance(field.default, BaseModel)}
        partly = {name: value for name, value in given.items() if name in defaults and isinstance(value, Mapping)}
        return {**given, **{name: {**defaults[name].model_dump(exclude_unset=True), **value} for name, value in partly.items()}}


class MethodConfig(Options):
    """Base of every method's Config."""

    name: str

    @model_validator(mode="after")
    def _nothing_unused(self) -> Self:
        unused.check(self)
        return self


class Distiller(ABC):
    """A method. Its `Config` holds the keys of the recipe's `distiller:` block."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    samplers: ClassVar[tuple[Sampler | OwnSampler, ...]] = ("euler", "stochastic")  # that its students are made for
    # Whether it takes the student's derivative along a trajectory, which is checked, and by differences taken, in the weights' own precision.
    differentiates: ClassVar[bool] = False
    phased: ClassVar[bool] = False  # whether the networks that make up its student divide the times of one grid
    roles: ClassVar[dict[str, RoleSpec]]  # all it can ask for; `roles_for` says which a configuration uses

    def __init__(self, config: Any, setting: Setting) -> None:
        self.config = config
        self.setting = setting
        self.statistics: dict[str, Tensor] = {}  # running numbers that its terms keep; saved and restored with the run

    @classmethod
    def roles_for(cls, config: Any) -> dict[str, RoleSpec]:
        """The roles that a run with this Config has."""
        return cls.roles

    @classmethod
    def student_is_guided(cls, config: Any) -> bool:
        """Whether the trained network is sampled with the teacher's guidance."""
        return False

    @classmethod
    def leaves_a_flow(cls, config: Any) -> bool:
        """Whether the trained network predicts at all times what leads along one flow, so that it can be sampled in any steps, and teach."""
        return False

    @classmethod
    def needs_latents(cls, config: Any) -> bool:
        """Whether this Config trains on images; otherwise it trains on prompts alone and opens no image."""
        return False

    @classmethod
    def needs_pairs(cls, config: Any) -> bool:
        """Whether this Config trains on noise-sample pairs of the teacher."""
        return False

    @classmethod
    def straightness_of(cls, config: Any) -> int:
        """Of how many samples a run logs how straight its teacher's flow and its student's are; 0: not at all."""
        return 0

    @classmethod
    def files(cls, config: Any) -> dict[str, str]:
        """The files that this Config names, by content: recipe key -> hash."""
        return {}

    @classmethod
    def check(cls, config: Any, facts: Facts) -> None:
        """UserError where the Config does not fit the rest of the recipe."""
        return

    def span(self, role: str) -> tuple[int, int] | None:
        """(first, count) of the student steps in which a role trains, over which its learning rate's schedule runs; None: the whole run.
        It agrees with `updates`: those of `first` are the first to train the role, those of `first + count - 1` the last."""
        return None

    def finished(self, role: str, step: int) -> bool:
        """Whether a student's training, here or before this run, is over after `step` student steps; one that trains all along is always good."""
        first, count = self.span(role) or (0, 1)
        return step >= first + count

    def needed(self, role: str, step: int) -> bool:
        """Whether any student step from `step` on trains or asks the role; where not, a run drops it from memory and from its checkpoints."""
        return True

    def trained(self, role: str, step: int) -> tuple[int, int]:
        """(done, count): how many of the student steps in which a student trains are over after `step` of the run; (0, 0) for one that was
        trained before this run."""
        first, count = self.span(role) or (0, self.setting.train_steps)
        return min(max(step - first, 0), count), count

    def period(self, role: str) -> str:
        """What people call the student steps in which a student trains."""
        return "training"

    @classmethod
    def inherited(cls, config: Any) -> list[str]:
        """The students that `student.init` replaces."""
        return [name for name, spec in cls.roles_for(config).items() if spec.averaged]

    def students(self) -> list[tuple[str, float]]:
        """The roles that make up the student, each with the path time that its share of sampling ends at; the last ends at 0."""
        return [("student", 0.0)]

    def sampler(self, models: Models) -> Predict:
        """What the student is sampled with."""
        roles, ends = zip(*self.students(), strict=True)
        return models[roles[0]] if len(roles) == 1 else Experts([models[role] for role in roles], ends)

    def windows(self) -> list[float]:
        """Path times at which the student's windows begin, descending, and 0, for those that are made for `linear_windows`."""
        return []

    @classmethod
    def load(cls, config: Any) -> None:
        """Load what a recipe names of other people's code: when a run is built, for a plan runs none. UserError where that fails."""
        return

    def take_together(self, step: int, gather: Callable[[Tensor], Tensor]) -> None:
        """After student step `step`: make its running numbers those of all processes' samples; gather: (processes, ...) of a tensor (...)."""
        for state in self.statistics.values():
            running.take_together(state, step, gather)

    @abstractmethod
    def updates(self, step: int) -> list[Update]:
        """The updates of student step `step`, in order."""
