"""An evaluation: what a protocol asks for is drawn by each subject in turn, and measured on the features that are kept of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastgen.errors import UserError, one_line
from fastgen.evaluation.dumps import Dump, DumpFolder, PngFolder
from fastgen.evaluation.extraction import WHOLE, Drawing, ExtractorFailed, Extractors, Part, by_set, drawn, fill, lacking, shared
from fastgen.evaluation.extractors.base import Feature, Pictures, Resources
from fastgen.evaluation.metrics import refuse_shared_rows
from fastgen.evaluation.metrics.base import NO_REFERENCE, Measured, Metric, Needs, Value
from fastgen.evaluation.metrics.external_process import further_metrics
from fastgen.evaluation.preparation import prepared
from fastgen.evaluation.protocol import Protocol, SampleSet
from fastgen.evaluation.references import OpenReference, load_reference
from fastgen.evaluation.results import Missing, Row, cached, model_key, reasons
from fastgen.evaluation.settings import Settings
from fastgen.evaluation.store import Store, total
from fastgen.evaluation.subjects import Subject
from fastgen.evaluation.versions import made_by
from fastgen.evaluation.weights import Unavailable
from fastgen.fingerprints import digest
from fastgen.progress import Progress


@dataclass(frozen=True)
class Drawn:
    """A subject whose pictures are in its stores, by set; it may have left memory. pictures: folders of them for external metrics, by set."""

    name: str
    steps: int | None
    guidance: float | None
    content: str
    record: dict[str, Any]
    stores: Mapping[str, Store]
    pictures: Mapping[str, Path]
    taught_by: str | None = None


class Evaluation:
    """One protocol, measured on one subject after the other: `draw` each, then ask for `rows`.

    missing: what could not be measured, and why. UserError, before anything is drawn, where nothing of the protocol can be measured.
    """

    def __init__(
        self,
        protocol: Protocol,
        resources: Resources,
        settings: Settings,
        *,
        dump: DumpFolder | None = None,
        progress: Progress | None = None,
        teacher: bool = True,
        dry: bool = False,
    ) -> None:
        """dump: where pictures are kept too. teacher: whether one will be drawn too. dry: only to find out what can be measured."""
        self.protocol, self.resources, self.settings, self.dump, self.progress = protocol, resources, settings, dump, progress or Progress()
        count = settings.stop_after
        self.sets = {name: each if count is None else each.head(count) for name, each in protocol.sets.items()}
        self.extractors = Extractors(resources)
        self.reference = self._reference()
        self.missing: list[Missing] = []
        self.metrics, self.needs = self._possible(teacher=teacher)
        # What is extracted stays the same where the reference costs a metric: another part may not know of it.
        self._extracted = dict(self.needs)
        self._require_some()
        for line in reasons(self.missing):
            self.progress.warn(f"warning: {line}")
        if not dry:
            if self.reference is not None and any(need.reference for need in self.needs.values()):
                for warning in self.reference.warnings:
                    self.progress.warn(f"warning: {warning}")
            self._gather(settings.part)
        self.drawn: list[Drawn] = []
        self._lost: dict[int | None, str] = {}  # teachers that could not be drawn, by their steps: why
        self.left = 0  # chunks that other parts have still to draw

    def _reference(self) -> OpenReference | None:
        spec = self.protocol.spec
        if spec.reference is None:
            return None
        return load_reference(
            spec.reference,
            self.extractors,
            self.settings.reference_stores,
            data_dir=self.resources.data_dir,
            prepare=spec.prepare,
            chunk=spec.chunk,
            where=self.protocol.where,
            allow_pickle=self.settings.allow_pickle,
        )

    def _possible(self, *, teacher: bool) -> tuple[dict[str, Metric], dict[str, Needs]]:
        """The metrics for which everything is here, and what they need; the others are `missing`."""
        metrics, needed = {}, {}
        asked = {**self.protocol.metrics(self.resources), **further_metrics(list(self.sets), self.resources)}
        refuse_shared_rows(asked, self.protocol.where)
        for name, metric in asked.items():
            try:
                needs = metric.needs()
                if needs.teacher and not teacher:
                    raise Unavailable("needs the teacher's pictures, and no teacher is measured here")
                self.extractors.require([*(each for features in needs.generated.values() for each in features), *needs.reference])
                if needs.reference and self.reference is None:
                    raise Unavailable(NO_REFERENCE)
                if needs.reference and self.reference is not None:
                    self.reference.check(needs.reference)
            except Unavailable as error:
                self.missing.append(Missing(name=name, model="", reason=str(error)))
            else:
                metrics[name], needed[name] = metric, needs
        return metrics, needed

    def _gather(self, part: Part) -> None:
        """A part of the reference's features; where its pictures cannot be read or an extractor fails, what needs them is missing."""
        while self.reference is not None and (features := shared(need.reference for need in self.needs.values())):
            try:
                self.reference.gather(features, part=part, progress=self.progress)
                return
            except ExtractorFailed as error:
                self._give_up([name for name, need in self.needs.items() if error.features.intersection(need.reference)], error)
            except Unavailable as error:
                self._give_up([name for name, need in self.needs.items() if need.reference], error)

    def _give_up(self, names: Sequence[str], error: UserError) -> None:
        """Metrics that turn out not to be possible: said once that something is left, for a refusal says it all."""
        found = [Missing(name=name, model="", reason=str(error)) for name in names]
        self.missing += found
        for name in names:
            del self.metrics[name], self.needs[name]
        self._require_some()
        for line in reasons(found):
            self.progress.warn(f"warning: {line}")

    def _lose(self, where: str, error: ExtractorFailed) -> None:
        """Features of a set that cannot be extracted, and the metrics that read them."""
        lost = [name for name, need in self._extracted.items() if error.features.intersection(need.generated.get(where, ()))]
        for name in lost:
            del self._extracted[name]
        self._give_up([name for name in lost if name in self.metrics], error)

    def _require_some(self) -> None:
        if not self.metrics:
            raise UserError(f"protocol {self.protocol.name}: nothing can be measured: {'; '.join(reasons(self.missing, ': '))}")

    def _lack(self, names: Sequence[str], model: str, reason: str) -> None:
        """Metrics of one model that could not be measured: said once, at however many step counts."""
        found = [each for name in names if (each := Missing(name=name, model=model, reason=reason)) not in self.missing]
        self.missing += found
        for line in reasons(found):
            self.progress.warn(f"warning: {line}")

    def lose_teacher(self, steps: int | None, error: Exception) -> None:
        """The teacher could not be drawn at so many steps: its own rows are missing, and so is what is measured against the teacher, unless
        that is one of more steps. All else is measured."""
        self._lost[steps] = f"drawing by the {model_key('teacher', steps)}: {one_line(str(error))}"
        self._lack([name for name, need in self.needs.items() if not need.teacher], "teacher", self._lost[steps])

    def draw(self, subject: Subject) -> bool:
        """Draw what is not in the subject's stores yet, or this part of it; whether everything is there now.

        UserError for pictures of a size that the protocol does not measure, NotFinite for pictures that are none. What was drawn before a
        mistake or a kill stays.
        """
        for warning in subject.check(self.sets, whole=self.settings.stop_after is None):
            self.progress.warn(f"warning: {warning}")
        stores = {name: self._store(subject, each) for name, each in self._used().items()}
        folders = {name: self._folders(subject, name, store) for name, store in stores.items()}
        dumps = {name: [*found, *self._dumps(subject, name)] for name, found in folders.items()}
        if any(lacking(store, self._names(name), dumps[name], self.settings.part) for name, store in stores.items()):
            self._draw(subject, stores, dumps)
        # What the user dumps is this part's alone: the other parts' may lie on other machines.
        left = sum(len(lacking(store, self._names(name), folders[name])) for name, store in stores.items())
        self.left += left
        if not left:
            pictures = {name: each.folder for name, found in folders.items() for each in found}
            self.drawn.append(
                Drawn(subject.name, subject.steps, subject.guidance, subject.content, subject.record, stores, pictures, subject.taught_by)
            )
        return not left

    def _used(self) -> dict[str, SampleSet]:
        """The sets that something is measured on."""
        return {name: each for name, each in self.sets.items() if name in self._features or name in self._with_pictures}

    @property
    def _features(self) -> dict[str, list[Feature]]:
        """What is extracted from each set."""
        return by_set(need.generated for need in self._extracted.values())

    @property
    def _with_pictures(self) -> set[str]:
        """Sets whose pictures must lie in a folder."""
        return {name for need in self._extracted.values() for name in need.pictures}

    def _names(self, where: str) -> list[str]:
        return [self.extractors.name(each) for each in self._features.get(where, ())]

    def _store(self, subject: Subject, samples: SampleSet) -> Store:
        spec = self.protocol.spec
        key = digest([subject.identity, samples.hash, spec.quantisation, spec.prepare.model_dump(), made_by(self.resources.device)])
        return Store(self.settings.stores / key[:32], len(samples), samples.chunk)

    def _folders(self, subject: Subject, where: str, store: Store) -> list[Dump]:
        """Where the pictures of a set go for external metrics: to the store, which parts share and nobody else writes to."""
        if where not in self._with_pictures:
            return []
        return [PngFolder(store.folder / "pictures", self.sets[where], self._drawn_as(subject), "--store")]

    def _dumps(self, subject: Subject, where: str) -> list[Dump]:
        """Where the user wants them."""
        return [] if self.dump is None else [self.dump.of(self.sets[where], subject.name, subject.steps, self._drawn_as(subject))]

    def _drawn_as(self, subject: Subject) -> str:
        """A digest of what 8-bit pictures depend on beside their set."""
        return digest([subject.identity, self.protocol.spec.quantisation, made_by(self.resources.device)])

    def _draw(self, subject: Subject, stores: Mapping[str, Store], dumps: Mapping[str, Sequence[Dump]]) -> None:
        spec = self.protocol.spec
        drawing = Drawing(subject.draw, self.batch_size, spec.quantisation, spec.prepare, check=self._size_check())
        self._warm_up(subject, drawing)
        todo = {name: lacking(store, self._names(name), dumps[name], self.settings.part) for name, store in stores.items()}
        part = self.settings.part
        total = sum(len(store.ids(chunk)) for store in stores.values() for chunk in store.chunks if chunk % part.of == part.index)
        done = total - sum(len(stores[where].ids(chunk)) for where, chunks in todo.items() for chunk in chunks)
        self.progress.start(_pictures_of(subject), total, done)

        def tick(count: int) -> None:
            nonlocal done
            done += count
            self.progress.update(done, {})

        try:
            for where, store in stores.items():
                features, lost = self._features.get(where, []), partial(self._lose, where)
                if features or dumps[where]:
                    to = replace(drawing, dumps=dumps[where])
                    fill(store, self.sets[where], todo[where], to, self.extractors, features, tick=tick, lost=lost)
        finally:  # a bar left running hides the terminal's cursor
            self.progress.finish()

    def _warm_up(self, subject: Subject, drawing: Drawing) -> None:
        """One batch, so that the clock sees no compilation, and a wrong image size is refused before thousands are drawn; and its first
        picture through every extractor, so that an extractor that fails costs its own metrics alone."""
        samples = next(iter(self._used().values()))
        pixels, _ = drawn(samples, range(1 if subject.steps is None else min(drawing.batch_size, len(samples))), drawing)
        shown = prepared(pixels[0][None], drawing.prepare)
        for name, need in list(self._extracted.items()):
            for where, features in need.generated.items() if name in self._extracted else ():
                times, prompts = self.sets[where].per_prompt, self.sets[where].prompts
                try:
                    self.extractors(Pictures(shown.repeat(times, 1, 1, 1), prompts[:times], times, [pixels[0]] * times), features)
                except ExtractorFailed as error:
                    self._lose(where, error)

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

    @property
    def batch_size(self) -> int:
        """Pictures drawn at once."""
        return self.settings.batch_size or self.protocol.spec.batch_size

    def rows(self) -> list[Row]:
        """Every metric of every subject that has been drawn, in that order, with what drawing cost. What other parts have not gathered of the
        reference is gathered first. Where there are several teachers, what compares with the teacher's pictures compares with those of the most
        steps."""
        self._gather(WHOLE)
        teacher = self._teacher()
        rows: list[Row] = []
        for each in self.drawn:
            self.progress.start(f"metrics of the {model_key(each.name, each.steps)}", len(self.metrics))
            try:
                values = self._values(each, None if each.name == "teacher" else teacher)
            finally:
                self.progress.finish()
            rows += [_row(value, each) for value in [*values, *_costs(each)]]
        return rows

    def _teacher(self) -> Drawn | None:
        """The one of the most steps; None where it could not be drawn."""
        found = max((each for each in self.drawn if each.name == "teacher"), key=lambda each: each.steps or 0, default=None)
        return None if found is not None and any((steps or 0) > (found.steps or 0) for steps in self._lost) else found

    def _values(self, each: Drawn, teacher: Drawn | None) -> list[Value]:
        values: list[Value] = []
        measured = self.measured(each, None if teacher is None else self.measured(teacher))
        for index, (name, metric) in enumerate(self.metrics.items(), 1):
            by_teacher = self.needs[name].teacher
            try:
                if by_teacher and each.name != "teacher" and teacher is None:
                    raise Unavailable(self._why_no_teacher())
                if not (by_teacher and each.name == "teacher"):
                    against = model_key(teacher.name, teacher.steps) if by_teacher and teacher is not None else None
                    values += [value._replace(against=against) for value in metric.measure(measured)]
            except Unavailable as error:
                self._lack([name], each.name, str(error))
            self.progress.update(index, {})
        return values

    def _why_no_teacher(self) -> str:
        most = max(self._lost, key=lambda steps: steps or 0, default=None)
        return self._lost.get(most, "needs the teacher's pictures, which are not measured here")

    def measured(self, each: Drawn, teacher: Measured | None = None) -> Measured:
        """What metrics see of a subject's pictures."""
        tables = {
            (where, one): store.table(self.extractors.name(one)) for where, store in each.stores.items() for one in self._features.get(where, ())
        }
        return Measured(self.sets, tables, self.reference, teacher, each.pictures, self.resources, self.protocol.spec.seed, each.taught_by)

    def floors(self) -> list[Row]:
        """What real images score, by each metric that says so; computed once for each protocol, set of weights and what it is computed by."""
        hashes, shown = sorted(self.extractors.hashes.items()), sorted(name for metric in self.metrics.values() for name in metric.shows)
        key = f"floors/{self.protocol.hash()}/{hashes}/{shown}/{made_by(self.resources.device)}"
        return cached(key, lambda: [row for metric in self.metrics.values() for row in metric.floors()])

    @property
    def extractor_hashes(self) -> dict[str, str]:
        return self.extractors.hashes


def _pictures_of(subject: Subject) -> str:
    return "the pictures" if subject.name == "pictures" else f"pictures of the {model_key(subject.name, subject.steps)}"


def _row(value: Value, each: Drawn) -> Row:
    row = Row(name=value.name, model=each.name, value=value.value, n=value.n)
    if each.steps is not None:
        row["steps"] = each.steps
    if each.guidance is not None:
        row["guidance"] = each.guidance
    if value.std is not None and value.std_over is not None:
        row["std"], row["std_over"] = value.std, value.std_over
    if value.interval is not None and value.interval_over is not None:
        row["interval"], row["interval_over"] = list(value.interval), value.interval_over
    if value.remark is not None:
        row["remark"] = value.remark
    if value.against is not None:
        row["against"] = value.against
    return row


def _costs(each: Drawn) -> list[Value]:
    """Time and memory of drawing: of every picture once, transfer to the CPU included, after one batch that is not counted; memory as in
    `speed.peak_memory_bytes`. None of pictures that lay there already."""
    costs = [cost for store in each.stores.values() for cost in store.costs()]
    pictures = round(total(costs, "pictures"))
    if each.steps is None or not pictures:
        return []
    seconds = 1000 * total(costs, "seconds") / pictures
    return [Value("seconds_per_1000_images", seconds, pictures), Value("peak_memory_bytes", max(cost["peak"] for cost in costs), pictures)]
