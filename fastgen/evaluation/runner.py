"""An evaluation: what a protocol asks for is drawn by each subject in turn, and measured on the features that are kept of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastgen.errors import UserError
from fastgen.evaluation.dumps import Dump, DumpFolder, PngFolder
from fastgen.evaluation.extraction import Drawing, Extractors, by_set, drawn, fill, lacking, shared
from fastgen.evaluation.extractors.base import Feature, Pictures, Resources
from fastgen.evaluation.metrics.base import NO_REFERENCE, Measured, Metric, Needs, Value
from fastgen.evaluation.metrics.external_process import further_metrics
from fastgen.evaluation.preparation import prepared
from fastgen.evaluation.protocol import Protocol, SampleSet
from fastgen.evaluation.references import OpenReference, load_reference
from fastgen.evaluation.results import Missing, Row, cached, model_key, reasons
from fastgen.evaluation.settings import Settings
from fastgen.evaluation.store import Store, total
from fastgen.evaluation.subjects import Subject
from fastgen.evaluation.weights import Unavailable
from fastgen.fingerprints import digest
from fastgen.progress import Progress


@dataclass(frozen=True)
class Drawn:
    """A subject whose pictures are in its stores, by set; it may have left memory. dumps: folders of its pictures, by set."""

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
        self._require_some()
        for line in reasons(self.missing):
            self.progress.warn(f"warning: {line}")
        if not dry:
            self._gather()
        self.drawn: list[Drawn] = []
        self.left = 0  # chunks that other parts have still to draw

    def _reference(self) -> OpenReference | None:
        spec = self.protocol.spec
        if spec.reference is None:
            return None
        return load_reference(
            spec.reference,
            self.extractors,
            self.settings.stores,
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

    def _gather(self) -> None:
        """The reference's features; where its pictures or an extractor's weights cannot be read, what needs them is missing."""
        features = shared(need.reference for need in self.needs.values())
        if self.reference is None or not features:
            return
        for warning in self.reference.warnings:
            self.progress.warn(f"warning: {warning}")
        try:
            self.reference.gather(features, part=self.settings.part, progress=self.progress)
        except Unavailable as error:
            self._give_up([name for name, need in self.needs.items() if need.reference], error)
        except UserError:  # of one extractor, and it does not say of which
            for name, need in [each for each in self.needs.items() if each[1].reference]:
                try:
                    self.reference.gather(need.reference, part=self.settings.part, progress=self.progress)
                except UserError as error:
                    self._give_up([name], error)

    def _give_up(self, names: Sequence[str], error: UserError) -> None:
        """Metrics that turn out not to be possible: said once that something is left, for a refusal says it all."""
        found = [Missing(name=name, model="", reason=str(error)) for name in names]
        self.missing += found
        for name in names:
            del self.metrics[name], self.needs[name]
        self._require_some()
        for line in reasons(found):
            self.progress.warn(f"warning: {line}")

    def _require_some(self) -> None:
        if not self.metrics:
            raise UserError(f"protocol {self.protocol.name}: nothing can be measured: {'; '.join(reasons(self.missing, ': '))}")

    def _lacks(self, name: str, model: str, error: UserError) -> None:
        found = Missing(name=name, model=model, reason=str(error))
        self.missing.append(found)
        self.progress.warn(f"warning: {reasons([found])[0]}")

    def draw(self, subject: Subject) -> bool:
        """Draw what is not in the subject's stores yet, or this part of it; whether everything is there now.

        UserError for pictures of a size that the protocol does not measure, NotFinite for pictures that are none. What was drawn before a
        mistake or a kill stays.
        """
        for warning in subject.check(self.sets, whole=self.settings.stop_after is None):
            self.progress.warn(f"warning: {warning}")
        stores = {name: self._store(subject, each) for name, each in self._used().items()}
        dumps = {name: self._dumps(subject, name, store) for name, store in stores.items()}
        if any(lacking(store, self._names(name), dumps[name], self.settings.part) for name, store in stores.items()):
            self._draw(subject, stores, dumps)
        left = sum(len(lacking(store, self._names(name), dumps[name])) for name, store in stores.items())
        self.left += left
        if not left:
            folders = {name: each.folder for name, found in dumps.items() for each in found if isinstance(each, PngFolder)}
            self.drawn.append(
                Drawn(subject.name, subject.steps, subject.guidance, subject.content, subject.record, stores, folders, subject.taught_by)
            )
        return not left

    def _used(self) -> dict[str, SampleSet]:
        """The sets that something is measured on."""
        return {name: each for name, each in self.sets.items() if name in self._features or name in self._with_pictures}

    @property
    def _features(self) -> dict[str, list[Feature]]:
        """What is extracted from each set."""
        return by_set(need.generated for need in self.needs.values())

    @property
    def _with_pictures(self) -> set[str]:
        """Sets whose pictures must lie in a folder."""
        return {name for need in self.needs.values() for name in need.pictures}

    def _names(self, where: str) -> list[str]:
        return [self.extractors.name(each) for each in self._features.get(where, ())]

    def _store(self, subject: Subject, samples: SampleSet) -> Store:
        spec = self.protocol.spec
        key = digest([subject.identity, samples.hash, spec.quantisation, spec.prepare.model_dump()])
        return Store(self.settings.stores / key[:32], len(samples), samples.chunk)

    def _dumps(self, subject: Subject, where: str, store: Store) -> list[Dump]:
        """Where the pictures of a set go: as the user wants, and as external metrics do."""
        samples, model = self.sets[where], digest([subject.identity, self.protocol.spec.quantisation])
        found = [] if self.dump is None else [self.dump.of(samples, subject.name, subject.steps, model)]
        if where in self._with_pictures and not any(isinstance(each, PngFolder) for each in found):
            found.append(PngFolder(store.folder / "pictures", samples, model))
        return found

    def _draw(self, subject: Subject, stores: Mapping[str, Store], dumps: Mapping[str, Sequence[Dump]]) -> None:
        spec = self.protocol.spec
        batch_size = self.settings.batch_size or spec.batch_size
        drawing = Drawing(subject.draw, batch_size, spec.quantisation, spec.prepare, check=self._size_check())
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
                features = self._features.get(where, [])
                fill(store, self.sets[where], todo[where], replace(drawing, dumps=dumps[where]), self.extractors, features, tick=tick)
        finally:  # a bar left running hides the terminal's cursor
            self.progress.finish()

    def _warm_up(self, subject: Subject, drawing: Drawing) -> None:
        """One batch, so that the clock sees no compilation, and a wrong image size is refused before thousands are drawn; and its first
        picture through every extractor, so that damaged weights cost their own metrics alone."""
        samples = next(iter(self._used().values()))
        pixels, _ = drawn(samples, range(1 if subject.steps is None else min(drawing.batch_size, len(samples))), drawing)
        shown = prepared(pixels[0][None], drawing.prepare)
        for name, need in list(self.needs.items()):
            try:
                for where, features in need.generated.items():
                    times, prompts = self.sets[where].per_prompt, self.sets[where].prompts
                    self.extractors(Pictures(shown.repeat(times, 1, 1, 1), prompts[:times], times, [pixels[0]] * times), features)
            except UserError as error:
                self._give_up([name], error)

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

    def rows(self) -> list[Row]:
        """Every metric of every subject that has been drawn, in that order, with what drawing cost."""
        teacher = next((self.measured(each) for each in self.drawn if each.name == "teacher"), None)
        rows: list[Row] = []
        for each in self.drawn:
            self.progress.start(f"metrics of the {model_key(each.name, each.steps)}", len(self.metrics))
            try:
                values = self._values(each.name, self.measured(each, None if each.name == "teacher" else teacher))
            finally:
                self.progress.finish()
            rows += [_row(value, each) for value in [*values, *_costs(each)]]
        return rows

    def _values(self, model: str, measured: Measured) -> list[Value]:
        values: list[Value] = []
        for index, (name, metric) in enumerate(self.metrics.items(), 1):
            by_teacher = self.needs[name].teacher
            try:
                if by_teacher and model != "teacher" and measured.teacher is None:
                    raise Unavailable("needs the teacher's pictures, which are not measured here")
                if not (by_teacher and model == "teacher"):
                    values += metric.measure(measured)
            except Unavailable as error:
                self._lacks(name, model, error)
            self.progress.update(index, {})
        return values

    def measured(self, each: Drawn, teacher: Measured | None = None) -> Measured:
        """What metrics see of a subject's pictures."""
        tables = {
            (where, one): store.table(self.extractors.name(one)) for where, store in each.stores.items() for one in self._features.get(where, ())
        }
        return Measured(self.sets, tables, self.reference, teacher, each.pictures, self.resources, self.protocol.spec.seed, each.taught_by)

    def floors(self) -> list[Row]:
        """What real images score, by each metric that says so; computed once for each protocol and set of weights."""
        hashes, shown = sorted(self.extractors.hashes.items()), sorted(name for metric in self.metrics.values() for name in metric.shows)
        key = f"floors/{self.protocol.hash()}/{hashes}/{shown}"
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
