"""Subjects, extractors and metrics of which everything is known, in place of those that need weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fastgen.evaluation import extraction, extractors, metrics, protocol, results
from fastgen.evaluation.extractors.base import Extractor, Options, Pictures, Resources, feature
from fastgen.evaluation.metrics.base import Heading, Measured, Metric, Needs, Value
from fastgen.evaluation.protocol import Protocol, SampleSet, protocol_from
from fastgen.evaluation.results import Row
from fastgen.evaluation.runner import Evaluation
from fastgen.evaluation.settings import Settings
from fastgen.evaluation.subjects import Subject
from fastgen.evaluation.weights import Unavailable
from fastgen.progress import Progress

COSTS = ("seconds_per_1000_images", "peak_memory_bytes")


class Colours(Extractor):
    """Layers: `mean` (3,), of the 8-bit levels times `scale`; `levels` (3, H, W) uint8; `group` (1,), the mean over a prompt's pictures."""

    convention = "the mean of 8-bit levels"
    calls: ClassVar[list[tuple[int, tuple[str, ...]]]] = []  # pictures, and layers that were asked for

    class Config(Options):
        scale: float = 1.0
        weights: str = "here"

    @property
    def hash(self) -> str:
        if self.config.weights == "absent":
            raise Unavailable("needs colours.safetensors from example.org: put it into a folder and name that with --weights-dir")
        return "0" * 64

    def __call__(self, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
        self.calls.append((len(pictures.pixels), tuple(layers)))
        means = pictures.pixels.float().mean((2, 3)) * self.config.scale
        groups = means.mean(1).reshape(-1, pictures.per_prompt).mean(1, keepdim=True).repeat_interleave(pictures.per_prompt, 0)
        made = {"mean": means, "levels": pictures.pixels.clone(), "group": groups}
        return {layer: made[layer] for layer in layers}


class Level(Metric):
    """level: the mean of all levels."""

    class Config(Options):
        set: str | None = None
        scale: float = 1.0
        weights: str = "here"
        least: int = 1

    shows: ClassVar = {"level": Heading("level")}

    def needs(self) -> Needs:
        return Needs({self.set: [self.feature]})

    @property
    def feature(self) -> Any:
        return feature("colours", "mean", scale=self.config.scale, weights=self.config.weights)

    def measure(self, measured: Measured) -> list[Value]:
        table = measured.tables[self.set, self.feature]
        if len(table) < self.config.least:
            raise Unavailable(f"needs {self.config.least} pictures, {len(table)} were drawn")
        return [Value(next(iter(self.shows)), float(table.read().double().mean()), len(table))]

    def floors(self) -> list[Row]:
        return [Row(name="level", model="real", value=127.5, n=1)]


class LevelAgain(Level):
    shows: ClassVar = {"level_again": Heading("level again")}


class Darkest(Metric):
    """darkest: the lowest level of all; of another layer of the same extractor."""

    shows: ClassVar = {"darkest": Heading("darkest")}

    def needs(self) -> Needs:
        return Needs({self.set: [feature("colours", "levels", scale=1.0, weights="here")]})

    def measure(self, measured: Measured) -> list[Value]:
        ((_, features),) = self.needs().generated.items()
        table = measured.tables[self.set, features[0]]
        return [Value("darkest", float(table.read().min()), len(table))]


class ToTeacher(Level):
    """to_teacher: the mean difference of levels to the teacher's pictures of the same ids."""

    shows: ClassVar = {"to_teacher": Heading("to the teacher")}

    def needs(self) -> Needs:
        return super().needs()._replace(teacher=True)

    def measure(self, measured: Measured) -> list[Value]:
        assert measured.teacher is not None
        ours, theirs = (each.tables[self.set, self.feature].read().double() for each in (measured, measured.teacher))
        return [Value("to_teacher", float((ours - theirs).abs().mean()), len(ours))]


class ToReal(Level):
    shows: ClassVar = {"to_real": Heading("to real pictures")}

    def needs(self) -> Needs:
        return super().needs()._replace(reference=[self.feature])

    def measure(self, measured: Measured) -> list[Value]:
        return [Value(next(iter(self.shows)), float(measured.real().statistics(self.feature).mean.mean()), 1)]


class ToRealAgain(ToReal):
    shows: ClassVar = {"to_real_again": Heading("to real pictures again")}


METRICS = {
    "level": Level,
    "level_again": LevelAgain,
    "darkest": Darkest,
    "to_teacher": ToTeacher,
    "to_real": ToReal,
    "to_real_again": ToRealAgain,
}


def install(monkeypatch: pytest.MonkeyPatch, extractor: type[Extractor] = Colours) -> None:
    """Protocols know METRICS, and features of `colours` come from `extractor`."""
    find_extractor, find_metric = extractors.find_extractor, metrics.find_metric
    for module in (extraction, results):
        monkeypatch.setattr(module, "find_extractor", lambda name: extractor if name == "colours" else find_extractor(name))
    monkeypatch.setattr(protocol, "find_metric", lambda name, where="": METRICS.get(name) or find_metric(name, where))
    monkeypatch.setattr(Colours, "calls", [])


def small(metrics: Mapping[str, Any] | None = None, **more: Any) -> Protocol:
    """Sets a, of 20 pictures, and b, of 11, in chunks of 8; by default `level` of a is measured."""
    content = {
        "name": "small",
        "sets": {"a": {"prompts": None, "count": 20, "seed": 1}, "b": {"prompts": None, "count": 11, "first_seed": 5}},
        "metrics": dict(metrics or {"level": None}),
        "chunk": 8,
        "batch_size": 3,
    }
    return protocol_from(content | more)


class Painter(Subject):
    """Draws noise from each seed, and remembers the ids of every call."""

    def __init__(
        self,
        name: Any = "student",
        side: int = 8,
        steps: int | None = 1,
        spoil: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
        of: str = "f",
    ) -> None:
        """spoil: what becomes of pictures, given their ids. of: the digit that its weights' hash repeats."""
        self._of = of
        self.name, self.side, self.steps, self.guidance = name, side, steps, 1.5
        self.spoil = spoil or (lambda images, ids: images)
        self.calls: list[list[int]] = []

    @property
    def record(self) -> dict[str, Any]:
        return {"steps": self.steps, "side": self.side}

    @property
    def content(self) -> str:
        return self._of * 64

    @property
    def ids(self) -> list[int]:
        """Of every picture that was drawn, without the first batch, which is a warm-up."""
        return [each for call in self.calls[1:] for each in call]

    def draw(self, prompts: list[str], seeds: list[int], ids: Sequence[int]) -> Tensor:
        assert len(prompts) == len(seeds) == len(ids)
        self.calls.append(list(ids))
        return self.spoil(paint(seeds, self.side), ids)


def paint(seeds: Sequence[int], side: int = 8) -> Tensor:
    return torch.stack([torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def levels(samples: SampleSet) -> Tensor:
    """The 8-bit pictures of a whole set, as a Painter draws them: rounded to the nearest level."""
    return (paint(samples.seeds) * 255 + 0.5).floor().to(torch.uint8)


class Kept:
    """In place of a folder of pictures: 8-bit pictures by id."""

    def __init__(self) -> None:
        self.pictures: dict[int, Tensor] = {}

    def of(self, samples: SampleSet, name: str, steps: int | None, model: str) -> Any:
        def write(rows: range, pixels: Tensor) -> None:
            self.pictures.update(zip([samples.first + row for row in rows], pixels, strict=True))

        return SimpleNamespace(write=write, has=lambda rows: all(samples.first + row in self.pictures for row in rows))

    @property
    def pixels(self) -> Tensor:
        """In the order of ids, of which none may lack."""
        return torch.stack([self.pictures[index] for index in range(len(self.pictures))])


def evaluation(protocol: Protocol, root: Path, *, progress: Progress | None = None, kept: Any = None, **settings: Any) -> Evaluation:
    return Evaluation(protocol, Resources(), Settings(root, **settings), dump=kept, progress=progress)


def numbers(rows: Sequence[Row]) -> list[Row]:
    """Rows without what drawing cost, which is never twice the same."""
    return [row for row in rows if row["name"] not in COSTS]


def arrays(root: Path) -> dict[str, bytes]:
    """Every array of the stores in a folder, byte by byte."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.npy"))}
