"""Two results files beside each other: refused where they do not measure the same, with an interval of what differs.

Where both files' features are still in their stores, both models are measured again on the same resampled ids (`resampling`). Where they are not,
the interval comes from what the two rows say of themselves, as of independent pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgen.errors import UserError
from fastgen.evaluation.extraction import Extractors, stored_name
from fastgen.evaluation.extractors.base import Feature, Resources
from fastgen.evaluation.headings import COSTS, ordered
from fastgen.evaluation.intervals import NORMAL
from fastgen.evaluation.likeness import joined, other_circumstances, other_counts, other_teachers, unlike
from fastgen.evaluation.metrics.base import Measured, Metric, Reference
from fastgen.evaluation.protocol import Protocol, load_protocol
from fastgen.evaluation.references import OpenReference, load_reference
from fastgen.evaluation.resampling import Difference, differences
from fastgen.evaluation.results import Row, model_key, read_results
from fastgen.evaluation.settings import Settings
from fastgen.evaluation.store import Store
from fastgen.evaluation.tables import Table
from fastgen.evaluation.weights import Unavailable
from fastgen.files import write_atomically
from fastgen.portable import portable_text
from fastgen.progress import Progress

UNPAIRED = "unpaired"
_CLOSE = 1e-4  # relative, by which a value that is measured again may differ from the row's: other processors round otherwise
_ERRORS = ("seeds", "bootstrap", "subsets", "splits")  # standard deviations over these are errors of the value, or more than that


@dataclass(frozen=True)
class Side:
    """One model of one file. rows: by name."""

    path: Path
    results: Mapping[str, Any]
    model: str
    steps: int | None
    rows: Mapping[str, Row]

    @property
    def key(self) -> str:
        return model_key(self.model, self.steps)

    @property
    def teacher(self) -> str | None:
        """The teacher that some of its rows are measured against, as `provenance.models` calls it."""
        return next((row["against"] for row in self.rows.values() if "against" in row), None)

    @property
    def record(self) -> dict[str, Any]:
        return {"file": str(self.path), "model": self.model, **({} if self.steps is None else {"steps": self.steps})}


@dataclass
class Sources:
    """What pairing needs besides the files: the protocol, None where it is not at hand, for `reason`; the folder of stores."""

    protocol: Protocol | None
    settings: Settings
    resources: Resources = field(default_factory=Resources)
    reason: str = ""
    _references: dict[str | None, OpenReference | None] = field(default_factory=dict)  # by the folder of their features

    @classmethod
    def of(cls, load: Callable[[], Protocol], settings: Settings, resources: Resources) -> Sources:
        """With a protocol that may not load."""
        try:
            return cls(load(), settings, resources)
        except UserError as error:
            return cls(None, settings, resources, str(error))

    def reference(self, side: Side) -> Reference | None:
        """The protocol's, opened when something asks for it, with the features that an evaluation has left of it. Unavailable where a side was
        measured with another."""
        recorded = side.results["provenance"].get("reference")
        store, sha256 = _entry(recorded, "store"), _entry(recorded, "sha256")
        store = Path(store).name if isinstance(store, str) else None
        if store not in self._references:
            self._references[store] = self._opened(store)
        reference = self._references[store]
        found = None if reference is None else reference.record.get("sha256")
        if sha256 is not None and found is not None and sha256 != found:
            raise Unavailable(f"the protocol's reference is not the one that {str(side.path)!r} was measured with: its SHA-256 differs")
        return reference

    def _opened(self, kept: str | None) -> OpenReference | None:
        assert self.protocol is not None
        spec = self.protocol.spec
        if spec.reference is None:
            return None
        options: dict[str, Any] = {"where": self.protocol.where, "allow_pickle": self.settings.allow_pickle, "kept": kept}
        options |= {"data_dir": self.resources.data_dir, "prepare": spec.prepare, "chunk": spec.chunk}
        return load_reference(spec.reference, Extractors(self.resources), self.settings.stores, **options)


def compare_files(
    first: Path,
    second: Path,
    *,
    settings: Settings,
    resources: Resources,
    protocol: Protocol | None = None,
    output: Path | None = None,
    resamples: int = 100,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`compare`, written to `output` as JSON. protocol: the files', by default the one of the name that they say, where there is one."""
    named = read_results(first)["protocol"]
    if protocol is not None:
        sources = Sources(protocol, settings, resources)
    else:
        sources = Sources.of(lambda: load_protocol(named, data_dir=resources.data_dir, key="--protocol"), settings, resources)
    comparison = compare(first, second, sources, resamples=resamples, progress=progress)
    if output is not None:
        write_atomically(output, json.dumps(comparison, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return comparison


def compare(first: Path, second: Path, sources: Sources, *, resamples: int = 100, progress: Progress | None = None) -> dict[str, Any]:
    """The comparison as plain JSON: `pairs`, one for each step count that both files have, each with `differences` (name, a, b, difference =
    b - a, n, and, where there is one, a 95 % interval and interval_over: bootstrap, jackknife, subsets or unpaired), `notes` and `warnings`.

    Rows that are measured against teachers' pictures are left out, with a note, where the files' teachers differ: they say nothing of the models,
    and the other rows do. UserError where a file cannot be read, where the two do not measure the same, be it because nothing but such rows is
    left, and where they have no model in common to compare.
    """
    progress = progress or Progress()
    files = {path: read_results(path) for path in (first, second)}
    a, b = files[first], files[second]
    if differing := unlike(a, b):
        raise UserError(f"{str(first)!r} and {str(second)!r} do not measure the same: {joined(differing)}")
    pairs = _pairs(first, a, second, b)
    if differing := dict.fromkeys(each for one, other in pairs for each in other_counts(_quality(one), _quality(other))):
        raise UserError(f"{str(first)!r} and {str(second)!r} do not measure the same: {joined(list(differing))}")
    if differing := next((apart for pair in pairs if (apart := _teachers_apart(*pair)) and not _comparable(*pair, by_teacher=False)), None):
        raise UserError(f"{str(first)!r} and {str(second)!r} do not measure the same: {joined(differing)}")
    warnings = other_circumstances(a, b)
    for each in warnings:
        progress.warn(f"the two were measured with another {each}")
    return {
        "protocol": a["protocol"],
        "resamples": resamples,
        "pairs": [_compared(one, other, sources, resamples, progress) for one, other in pairs],
        "warnings": warnings,
    }


def _pairs(first: Path, a: Mapping[str, Any], second: Path, b: Mapping[str, Any]) -> list[tuple[Side, Side]]:
    """The models to compare: the only one of each file, or those with the same steps."""
    ours, theirs = _sides(first, a), _sides(second, b)
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    pairs = [(one, other) for one in ours for other in theirs if one.steps == other.steps]
    if not pairs or len({one.steps for one, _ in pairs}) < len(pairs):
        told = " and ".join(
            f"{str(path)!r} has {', '.join(side.key for side in sides) or 'none'}" for path, sides in ((first, ours), (second, theirs))
        )
        raise UserError(f"no model of the one file goes with one of the other: {told}; measure both with the same --steps")
    return pairs


def _sides(path: Path, results: Mapping[str, Any]) -> list[Side]:
    """What the file is about: its student, pipeline or pictures at each step count; its teacher where there is nothing else."""
    groups: dict[tuple[str, int | None, float | None], dict[str, Row]] = {}
    for row in results["metrics"]:
        if row["model"] != "real" and "seed" not in row and "floor" not in row:
            groups.setdefault((row["model"], row.get("steps"), row.get("guidance")), {})[row["name"]] = row
    about = {key: rows for key, rows in groups.items() if key[0] != "teacher"} or groups
    return [Side(path, results, model, steps, rows) for (model, steps, _), rows in about.items()]


def _quality(side: Side) -> dict[str, Row]:
    """All but what drawing cost, of which the number of pictures is no matter."""
    return {name: row for name, row in side.rows.items() if name not in COSTS}


def _teachers_apart(a: Side, b: Side) -> list[str]:
    """In what the teachers differ that rows of both sides are measured against."""
    records = [_entry(side.results["provenance"], "models", side.teacher) for side in (a, b) if side.teacher is not None]
    return other_teachers(*records) if len(records) == 2 and all(isinstance(each, dict) for each in records) else []


def _comparable(a: Side, b: Side, *, by_teacher: bool) -> list[str]:
    """Rows of quality that both sides have, those measured against teachers' pictures or the others."""
    ours, theirs = _quality(a), _quality(b)
    return [name for name in ours if name in theirs and ("against" in ours[name] and "against" in theirs[name]) == by_teacher]


def _compared(a: Side, b: Side, sources: Sources, resamples: int, progress: Progress) -> dict[str, Any]:
    apart = _teachers_apart(a, b)
    left_out = _comparable(a, b, by_teacher=True) if apart else []
    names = [name for name in ordered([*a.rows, *b.rows]) if name in a.rows and name in b.rows and name not in left_out]
    paired, notes = _paired(a, b, names, sources, resamples, progress)
    notes += [f"{', '.join(left_out)}: not compared, for the teachers differ: {joined(apart)}"] if left_out else []
    lines = []
    for name in names:
        one, other = a.rows[name], b.rows[name]
        found = paired.get(name) or unpaired(one, other)
        line: dict[str, Any] = {"name": name, "a": one["value"], "b": other["value"], "difference": found.value, "n": one.get("n", 1)}
        if found.interval is not None:
            line |= {"interval": list(found.interval), "interval_over": found.over}
        lines.append(line)
    return {"a": a.record, "b": b.record, "differences": lines, "notes": [*notes, *_alone(a, b)]}


def unpaired(a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference:
    """b - a of two rows, with the interval that their own intervals give, as of independent pictures (Zou & Donner 2008, eq. 4)."""
    value, (low, high), (other_low, other_high) = b["value"] - a["value"], _below_and_above(a), _below_and_above(b)
    if low is None or other_low is None or high is None or other_high is None:
        return Difference(value, None, UNPAIRED)
    return Difference(value, (value - (high**2 + other_low**2) ** 0.5, value + (low**2 + other_high**2) ** 0.5), UNPAIRED)


def _below_and_above(row: Mapping[str, Any]) -> tuple[float, float] | tuple[None, None]:
    """How far a row's 95 % interval reaches below and above its value."""
    if row.get("interval"):
        return row["value"] - row["interval"][0], row["interval"][1] - row["value"]
    if row.get("std") is not None and row.get("std_over") in _ERRORS:
        return NORMAL * row["std"], NORMAL * row["std"]
    return None, None


def _alone(a: Side, b: Side) -> list[str]:
    """Which rows one of the two alone has, and why the other has none where it says so."""
    notes = []
    for one, other, label in ((a, b, "b"), (b, a, "a")):
        reasons = {each["name"]: f" ({each['reason']})" for each in other.results.get("missing") or []}
        lacking = [f"{name}{reasons.get(name, '')}" for name in ordered(one.rows) if name not in other.rows]
        notes += [f"{label} has no {', '.join(lacking)}"] if lacking else []
    return notes


def _paired(a: Side, b: Side, names: Iterable[str], sources: Sources, resamples: int, progress: Progress) -> tuple[dict[str, Difference], list[str]]:
    """Differences of the rows whose features are at hand, and why those of others are not paired."""
    protocol = sources.protocol
    if protocol is None or protocol.hash() != a.results["provenance"].get("protocol_hash"):
        reason = sources.reason if protocol is None else f"{protocol.name} is not the protocol that the files are of: its hash is another"
        return {}, [f"nothing is paired: {reason}"]
    found: dict[str, Difference] = {}
    reasons: dict[str, list[str]] = {}
    lacking = {each["name"] for side in (a, b) for each in side.results.get("missing") or [] if each["model"] in ("", side.model)}
    opened = [Opened(side, protocol, sources) for side in (a, b)]
    for name, metric in protocol.metrics(sources.resources).items():
        if name in lacking:
            continue
        try:
            found |= _resampled(name, metric, opened, resamples, progress)
        except UserError as error:
            reasons.setdefault(str(error), []).append(name)
    notes = [f"{', '.join(metrics)}: not paired: {reason}" for reason, metrics in reasons.items()]
    return {name: each for name, each in found.items() if name in names}, notes


def _resampled(name: str, metric: Metric, opened: list[Opened], resamples: int, progress: Progress) -> dict[str, Difference]:
    a, b = (each.measured(metric) for each in opened)
    begun = False

    def tick(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            progress.start(f"resampling {name}", total)
            begun = True
        progress.update(done, {})

    try:
        found = differences(metric, a, b, resamples=resamples, tick=tick)
    finally:
        if begun:
            progress.finish()
    first, second = (each.side.rows for each in opened)
    found = {each: value for each, value in found.items() if each in first and each in second}
    for each, (value, _, _) in found.items():
        values = first[each]["value"], second[each]["value"]
        if abs(value - (values[1] - values[0])) > _CLOSE * max(map(abs, values)):
            raise Unavailable(f"what the stores hold gives {each} other values than the files: they are of other pictures, or another version's")
    return found


class Opened:
    """A side's features as metrics read them."""

    def __init__(self, side: Side, protocol: Protocol, sources: Sources) -> None:
        self.side, self._protocol, self._sources = side, protocol, sources
        count = (side.results.get("partial") or {}).get("stop_after")
        self._sets = {name: each if count is None else each.head(count) for name, each in protocol.sets.items()}
        self._stores: dict[tuple[str, str], Store] = {}

    def measured(self, metric: Metric) -> Measured:
        """UserError for what is not there any more."""
        needs = metric.needs()
        teacher = self._measured(metric, self._teacher()) if needs.teacher else None
        reference = self._sources.reference(self.side) if needs.reference else None
        return self._measured(metric, self._recorded(self.side.model, self.side.steps), reference, teacher)

    def _measured(self, metric: Metric, key: str, reference: Reference | None = None, teacher: Measured | None = None) -> Measured:
        wanted = metric.needs().generated
        tables = {(name, each): self._table(key, name, each) for name, features in wanted.items() for each in features}
        sets = {name: self._sets[name] for name in wanted}
        return Measured(sets, tables, reference, teacher, None, self._sources.resources, self._protocol.spec.seed)

    @property
    def _models(self) -> Any:
        return self.side.results["provenance"].get("models")

    def _recorded(self, model: str, steps: int | None) -> str:
        """What the file's record of models calls one; older files leave out its steps where there is one of that name."""
        key = model_key(model, steps)
        return key if isinstance(self._models, dict) and key in self._models else model

    def _teacher(self) -> str:
        """The one that it was measured against."""
        if self.side.teacher is None:
            raise Unavailable(f"{str(self.side.path)!r} records no teacher")
        return self.side.teacher

    def _table(self, key: str, name: str, each: Feature) -> Table:
        """A feature of one set of a model's pictures."""
        provenance, samples = self.side.results["provenance"], self._sets[name]
        folder = _entry(provenance, "models", key, "stores", name)
        sha256 = _entry(provenance, "extractors", portable_text(each.source))
        if not isinstance(folder, str) or not isinstance(sha256, str):
            raise Unavailable(f"{str(self.side.path)!r} does not say where the features of its pictures are")
        place = self._sources.settings.stores / Path(folder).name
        if not place.is_dir():
            raise Unavailable(f"the features of {str(self.side.path)!r} are not in {str(place)!r} (--store)")
        store = self._stores.setdefault((key, name), Store(place, len(samples), samples.chunk))
        return store.table(stored_name(each, sha256))


def _entry(record: Any, *keys: str) -> Any:
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record
