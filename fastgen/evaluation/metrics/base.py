"""What is measured on features: one file a metric, with its arithmetic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from fastgen.evaluation.extractors.base import Feature, Options, Resources, feature
from fastgen.evaluation.frechet import Gaussian
from fastgen.evaluation.results import Row
from fastgen.evaluation.tables import Table
from fastgen.evaluation.weights import Unavailable

if TYPE_CHECKING:
    from fastgen.evaluation.protocol import SampleSet

__all__ = [
    "Feature",
    "Heading",
    "Measured",
    "Metric",
    "Needs",
    "Options",
    "Reference",
    "Resources",
    "Row",
    "Subsets",
    "Table",
    "Unavailable",
    "Value",
    "feature",
]


NO_REFERENCE = "needs reference pictures or statistics: give the protocol a reference, or --images"


class Heading(NamedTuple):
    """How a row is printed: its column's heading; `better` is an arrow, or empty where more is not simply better; decimals: -1 for four
    significant digits."""

    text: str
    better: str = ""
    decimals: int = 2


class Value(NamedTuple):
    """One number. n: images it is computed from. std: over what `std_over` names. interval: 95 %, by the method `interval_over` names. remark:
    what stands beside the number, such as that it is of too few images to be compared with published ones. against: the teacher whose pictures it
    is measured against, which the evaluation says."""

    name: str
    value: float
    n: int
    std: float | None = None
    std_over: str | None = None  # seeds, bootstrap, subsets, splits, images, prompts
    interval: tuple[float, float] | None = None
    interval_over: str | None = None  # images, prompts, bootstrap, jackknife
    remark: str | None = None
    against: str | None = None  # a `results.model_key`


class Subsets(NamedTuple):
    """Values (S,) fp64 of random subsets of the pictures, whose mean a metric's value is; share: of all pictures that a subset holds."""

    values: Tensor
    share: float


class Needs(NamedTuple):
    """Features that a metric reads: of the generated pictures, by set, and of the reference's. teacher: those of the teacher's pictures too.
    pictures: sets whose pictures must lie in a folder as PNGs."""

    generated: Mapping[str, Sequence[Feature]]
    reference: Sequence[Feature] = ()
    teacher: bool = False
    pictures: Sequence[str] = ()


class Reference(Protocol):
    """Real pictures, or what is known of them. Unavailable where the reference has none of what is asked for."""

    def statistics(self, of: Feature) -> Gaussian: ...

    def table(self, of: Feature) -> Table: ...


@dataclass(frozen=True)
class Measured:
    """All that is known of one model's pictures once they are drawn. `tables[set, feature]` has a row for each picture, in the order of ids."""

    sets: Mapping[str, SampleSet]  # as far as they were drawn
    tables: Mapping[tuple[str, Feature], Table]
    reference: Reference | None = None
    teacher: Measured | None = None
    pictures: Mapping[str, Path] | None = None  # folders of PNGs with prompts.jsonl, by set
    resources: Resources = Resources()  # noqa: RUF009
    seed: int = 0  # of subsets and permutations
    taught_by: str | None = None  # SHA-256 of the teacher that the model is or was distilled from; None where nobody knows

    def real(self) -> Reference:
        """The reference; Unavailable where the protocol has none."""
        if self.reference is None:
            raise Unavailable(NO_REFERENCE)
        return self.reference


class Metric(ABC):
    """One file in `metrics/` with one such class. `shows` names the rows that `measure` returns."""

    class Config(Options):
        """Options in a protocol file; `set` is the set that is measured, by default the protocol's first."""

        set: str | None = None

    shows: ClassVar[Mapping[str, Heading]]
    convention: ClassVar[str] = ""  # a sentence for results.json: what is computed, beyond what the options say
    # How comparisons of two models resample pictures (all of a prompt together) where there are no `scores`: bootstrap, unless values suffer
    # from pictures that are drawn twice, as those of pairs and of nearest neighbours do.
    resampling: ClassVar[Literal["bootstrap", "jackknife"]] = "bootstrap"

    def __init__(self, config: Any, sets: Sequence[str], resources: Resources = Resources()) -> None:  # noqa: B008
        """config: of this class's Config. sets: names of the protocol's sets."""
        self.config, self.resources = config, resources
        self.set = config.set or sets[0]

    @property
    def rows(self) -> Sequence[str]:
        """What the rows are called that `measure` returns."""
        return tuple(self.shows)

    @abstractmethod
    def needs(self) -> Needs:
        """What `measure` will read."""

    @abstractmethod
    def measure(self, measured: Measured) -> list[Value]:
        """The values. Unavailable, in one line, where they cannot be had, e.g. of fewer images than they need."""

    def values(self, measured: Measured) -> dict[str, float]:
        """The values alone, which comparisons ask for at every resample: for metrics whose intervals take long to override."""
        return {each.name: each.value for each in self.measure(measured)}

    def scores(self, measured: Measured) -> dict[str, Tensor]:
        """Value name → (N,) fp64 scores of single images in the order of ids, whose mean the value is; {} for others. Comparisons of two
        models resample them."""
        return {}

    def subsets(self, measured: Measured) -> dict[str, Subsets]:
        """Value name → values of random subsets, of the same ids for whichever model where there are as many pictures; {} for others.
        Comparisons take them in place of resamples."""
        return {}

    def floors(self) -> list[Row]:
        """What real images score: rows with `model: real`; they are cached."""
        return []
