"""An evaluation: what a protocol asks for is drawn by each subject in turn, and measured on the features that are kept of it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgen.errors import UserError
from fastgen.evaluation.extraction import WHOLE, Drawing, Extractors, Keep, Part, by_set, drawn, fill
from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.metrics.base import NO_REFERENCE, Measured, Metric, Needs, Reference, Value
from fastgen.evaluation.protocol import Protocol, SampleSet
from fastgen.evaluation.results import Missing, Row, cached
from fastgen.evaluation.store import Store, total
from fastgen.evaluation.subjects import Subject
from fastgen.evaluation.weights import Unavailable
from fastgen.fingerprints import digest
from fastgen.progress import Progress

STORES = Path(".cache/fastgen/evaluations")  # below the home folder


@dataclass(frozen=True)
class Settings:
    """How an evaluation is done. root: the folder of stores. part: draws only these chunks. stop_after: only the first pictures of each set,
    for a quick look. batch_size: pictures drawn at once, None for the protocol's own; it changes rounding alone."""

    root: Path
    part: Part = WHOLE
    stop_after: int | None = None
    batch_size: int | None = None


@dataclass
class Drawn:
    """A subject whose pictures are in its stores, by set."""

    subject: Subject
    stores: Mapping[str, Store]


@dataclass
class Evaluation:
    """One protocol, measured on one subject after the other: `draw` each, then ask for `rows`.

    missing: what could not be measured, and why. UserError, before anything is drawn, where nothing of the protocol can be measured.
    """

    protocol: Protocol
    resources: Resources
    settings: Settings
    reference: Reference | None = None
    keep: Keep | None = None
    progress: Progress = field(default_factory=Progress)
    missing: list[Missing] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = self.settings.stop_after
        self.sets = {name: each if count is None else each.head(count) for name, each in self.protocol.sets.items()}
        self.extractors = Extractors(self.resources)
        self.metrics, self.needs = self._possible()
        if not self.metrics:
            reasons = "; ".join(f"{each['name']} {each['reason']}" for each in self.missing)
            raise UserError(f"protocol {self.protocol.name}: nothing can be measured: {reasons}")
        self._features = by_set(need.generated for need in self.needs.values())
        self._drawn: list[Drawn] = []

    def _possible(self) -> tuple[dict[str, Metric], dict[str, Needs]]:
        """The metrics for which everything is here, and what they need; the others are `missing`."""
        metrics, needed = {}, {}
        for name, metric in self.protocol.metrics(self.resources).items():
            try:
                needs = metric.needs()
                if needs.reference and self.reference is None:
                    raise Unavailable(NO_REFERENCE)
                self.extractors.require([*(each for features in needs.generated.values() for each in features), *needs.reference])
            except Unavailable as error:
                self._lacks(name, None, error)
            else:
                metrics[name], needed[name] = metric, needs
        return metrics, needed

    def _lacks(self, name: str, model: str | None, error: Unavailable) -> None:
        self.missing.append(Missing(name=name, model=model or "", reason=str(error)))
        self.progress.warn(f"{name}{f' of the {model}' if model else ''} is not measured: {error}")

    def draw(self, subject: Subject) -> bool:
        """Draw what is not in the subject's stores yet, or this part of it; whether everything is there now.

        UserError for pictures of a size that the protocol does not measure, NotFinite for pictures that are none. What was drawn before a
        mistake or a kill stays.
        """
        subject.check(self.sets, whole=self.settings.stop_after is None)
        stores = {name: self._store(subject, each) for name, each in self._used().items()}
        names = {where: [self.extractors.name(each) for each in self._features[where]] for where in stores}
        left = {where: [chunk for chunk in store.missing(names[where]) if self._is_ours(chunk)] for where, store in stores.items()}
        pictures = sum(len(stores[where].ids(chunk)) for where, chunks in left.items() for chunk in chunks)
        if pictures:
            self._draw(subject, stores, pictures)
        done = not any(store.missing(names[where]) for where, store in stores.items())
        if done:
            self._drawn.append(Drawn(subject, stores))
        return done

    def _used(self) -> dict[str, SampleSet]:
        """The sets that something is measured on."""
        return {name: each for name, each in self.sets.items() if name in self._features}

    def _is_ours(self, chunk: int) -> bool:
        return chunk % self.settings.part.of == self.settings.part.index

    def _draw(self, subject: Subject, stores: Mapping[str, Store], pictures: int) -> None:
        spec, done = self.protocol.spec, 0
        batch_size = self.settings.batch_size or spec.batch_size
        drawing = Drawing(subject.draw, batch_size, spec.quantisation, spec.prepare, self._size_check(), self.keep)
        self._warm_up(drawing)
        steps = "" if subject.steps is None else f", {subject.steps} step{'s' * (subject.steps != 1)}"
        self.progress.start(f"pictures of the {subject.name}{steps}", pictures)

        def tick(count: int) -> None:
            nonlocal done
            done += count
            self.progress.update(done, {})

        try:
            for name, store in stores.items():
                fill(store, self.sets[name], drawing, self.extractors, self._features[name], part=self.settings.part, tick=tick)
        finally:  # a bar left running hides the terminal's cursor
            self.progress.finish()

    def _warm_up(self, drawing: Drawing) -> None:
        """One batch, so that the clock sees no compilation, and a wrong image size is refused before thousands are drawn."""
        samples = next(iter(self._used().values()))
        drawn(samples, range(min(drawing.batch_size, len(samples))), drawing)

    def _size_check(self) -> Callable[[tuple[int, ...]], None]:
        """Refuses shapes of pictures that the protocol does not measure, or that are not those of the first, unless they are resized."""
        first: tuple[int, ...] | None = None

        def check(shape: tuple[int, ...]) -> None:
            nonlocal first
            self.protocol.check_image(shape)
            first = first or shape
            if shape != first and self.protocol.spec.prepare.resize is None:
                raise UserError(f"pictures of one model have different sizes: {first} and {shape}; a protocol with prepare.resize measures them")

        return check

    def _store(self, subject: Subject, samples: SampleSet) -> Store:
        spec = self.protocol.spec
        key = digest([subject.identity, samples.hash, spec.quantisation, spec.prepare.model_dump()])
        return Store(self.settings.root / key[:32], len(samples), samples.chunk)

    def rows(self) -> list[Row]:
        """Every metric of every subject that has been drawn, in that order, with what drawing cost."""
        teacher = next((self.measured(each) for each in self._drawn if each.subject.name == "teacher"), None)
        rows: list[Row] = []
        for each in self._drawn:
            subject = each.subject
            self.progress.start(f"metrics of the {subject.name}", len(self.metrics))
            try:
                values = self._values(subject.name, self.measured(each, None if subject.name == "teacher" else teacher))
            finally:
                self.progress.finish()
            rows += [_row(value, subject) for value in [*values, *_costs(each)]]
        return rows

    def _values(self, model: str, measured: Measured) -> list[Value]:
        values: list[Value] = []
        for index, (name, metric) in enumerate(self.metrics.items(), 1):
            try:
                if self.needs[name].teacher and measured.teacher is None and model != "teacher":
                    raise Unavailable("needs the teacher's pictures")
                if not (self.needs[name].teacher and model == "teacher"):
                    values += metric.measure(measured)
            except Unavailable as error:
                self._lacks(name, model, error)
            self.progress.update(index, {})
        return values

    def measured(self, each: Drawn, teacher: Measured | None = None) -> Measured:
        """What metrics see of a subject's pictures."""
        tables = {(where, one): store.table(self.extractors.name(one)) for where, store in each.stores.items() for one in self._features[where]}
        return Measured(self.sets, tables, self.reference, teacher, None, self.resources, self.protocol.spec.seed)

    def floors(self) -> list[Row]:
        """What real images score, by each metric that says so; computed once for each protocol and set of weights."""
        hashes, shown = sorted(each.hash for each in self.extractors.used), sorted(name for metric in self.metrics.values() for name in metric.shows)
        key = f"floors/{self.protocol.hash()}/{hashes}/{shown}"
        return cached(key, lambda: [row for metric in self.metrics.values() for row in metric.floors()])

    def stores(self, subject: Subject) -> dict[str, str]:
        """Where a drawn subject's features lie, by set."""
        return next(({name: str(store.folder) for name, store in each.stores.items()} for each in self._drawn if each.subject is subject), {})

    @property
    def extractor_hashes(self) -> dict[str, str]:
        return {type(each).__module__.rpartition(".")[2]: each.hash for each in self.extractors.used}


def _row(value: Value, subject: Subject) -> Row:
    row = Row(name=value.name, model=subject.name, value=value.value, n=value.n)
    if subject.steps is not None:
        row["steps"] = subject.steps
    if subject.guidance is not None:
        row["guidance"] = subject.guidance
    if value.std is not None and value.std_over is not None:
        row |= Row(std=value.std, std_over=value.std_over)  # type: ignore[typeddict-item]
    if value.interval is not None and value.interval_over is not None:
        row |= Row(interval=list(value.interval), interval_over=value.interval_over)  # type: ignore[typeddict-item]
    return row


def _costs(each: Drawn) -> list[Value]:
    """Time and memory of drawing: of every picture once, transfer to the CPU included, after one batch that is not counted; memory as in
    `speed.peak_memory_bytes`. None of pictures that lay there already."""
    costs = [cost for store in each.stores.values() for cost in store.costs()]
    pictures = round(total(costs, "pictures"))
    if each.subject.steps is None or not pictures:
        return []
    seconds = 1000 * total(costs, "seconds") / pictures
    return [Value("seconds_per_1000_images", seconds, pictures), Value("peak_memory_bytes", max(cost["peak"] for cost in costs), pictures)]


class _Function(Subject):
    """A function (prompts, seeds, steps) -> pictures, such as an ImageGenerator; nothing of it is known that would outlive the process."""

    def __init__(self, generate: Callable[[list[str], list[int], int], Tensor], model: Any, steps: int, guidance: float) -> None:
        self.generate, self.name, self.steps, self.guidance = generate, model, steps, guidance

    @property
    def record(self) -> dict[str, Any]:
        return {"steps": self.steps}

    @property
    def content(self) -> str:
        return ""

    def draw(self, prompts: list[str], seeds: list[int], ids: Sequence[int]) -> Tensor:
        assert self.steps is not None
        return self.generate(prompts, seeds, self.steps)


def run_protocol(
    protocol: Protocol,
    generate: Callable[[list[str], list[int], int], Tensor],
    *,
    model: str,
    steps: Sequence[int],
    guidance: float,
    batch_size: int | None = None,
    resources: Resources | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """One row for each metric and step count, with seconds_per_1000_images and peak_memory_bytes; nothing is kept.

    generate: prompts, seeds, steps -> pictures (B, 3, H, W), float in [0, 1]. `model` and `guidance` are only recorded: `generate` applies
    its own guidance. Raises UserError for step counts or batch sizes below 1 and for images of a shape that the protocol does not measure,
    NotFinite for images that are none, ValueError when `generate` returns another number of images than asked for.
    """
    if not steps or min(steps) < 1 or (batch_size is not None and batch_size < 1):
        raise UserError(f"step counts and the batch size must be at least 1, got steps {list(steps)} and batch size {batch_size}")
    with _temporary() as root:
        evaluation = Evaluation(protocol, resources or Resources(), Settings(root, batch_size=batch_size), progress=progress or Progress())
        for count in steps:
            evaluation.draw(_Function(generate, model, count, guidance))
        return evaluation.rows()


def missing_at_start(protocol: Protocol, resources: Resources) -> list[Missing]:
    """What of a protocol cannot be measured here, before anything is drawn. UserError where nothing can."""
    with _temporary() as root:
        return Evaluation(protocol, resources, Settings(root)).missing


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fastgen-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stores_folder(given: Path | None = None) -> Path:
    """Where features are kept: the given folder, or ~/.cache/fastgen/evaluations. UserError where there is no home."""
    if given is not None:
        return given
    try:
        return Path.home() / STORES
    except RuntimeError as error:
        raise UserError(f"--store: needed, for there is no home folder ({error})") from error
