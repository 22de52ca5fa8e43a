"""Real pictures, or what is known of them: a folder, an array of pictures, or statistics that somebody has computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastgen.data.texts import missing
from fastgen.errors import UserError
from fastgen.evaluation.archives import Archive
from fastgen.evaluation.extraction import WHOLE, Extractors, Part
from fastgen.evaluation.extractors.base import Feature, Pictures
from fastgen.evaluation.frechet import Gaussian, GaussianFit, table_statistics
from fastgen.evaluation.picture_array import PictureArray, has_pictures
from fastgen.evaluation.picture_folder import PictureFolder
from fastgen.evaluation.picture_source import PictureSource, ready
from fastgen.evaluation.protocol import PrepareBlock, ReferenceBlock
from fastgen.evaluation.statistics_file import StatisticsFile, write_statistics
from fastgen.evaluation.store import Store
from fastgen.evaluation.tables import Table
from fastgen.evaluation.versions import made_by
from fastgen.evaluation.weights import Unavailable
from fastgen.files import expanded
from fastgen.fingerprints import digest, known_hash
from fastgen.progress import Progress

_PROBE = 299  # pixels a side of the picture that tells a feature's width: no extractor needs more


class OpenReference(ABC):
    """A `Reference` of metrics, with what an evaluation asks of it before it draws. warnings: lines to show."""

    warnings: tuple[str, ...] = ()

    @property
    @abstractmethod
    def record(self) -> dict[str, Any]:
        """For results.json, plain JSON without paths: what the reference is, and what was checked of it."""

    @abstractmethod
    def check(self, features: Sequence[Feature]) -> None:
        """Unavailable where nothing is known of one of these features; reads no pictures."""

    @abstractmethod
    def gather(self, features: Sequence[Feature], *, part: Part = WHOLE, progress: Progress | None = None) -> bool:
        """Extract what is not there yet, or this part of it; whether everything is there now. Unavailable for pictures that cannot be read,
        ExtractorFailed for features that cannot be had of them."""

    @abstractmethod
    def statistics(self, of: Feature) -> Gaussian: ...

    @abstractmethod
    def table(self, of: Feature) -> Table: ...


class Absent(OpenReference):
    """A reference that cannot be read: what needs it is Unavailable, and everything else is measured."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    @property
    def record(self) -> dict[str, Any]:
        return {"kind": "absent"}  # why stands with the metrics that are missing

    def check(self, features: Sequence[Feature]) -> None:
        if features:
            raise Unavailable(self.reason)

    def gather(self, features: Sequence[Feature], *, part: Part = WHOLE, progress: Progress | None = None) -> bool:
        self.check(features)
        return True

    def statistics(self, of: Feature) -> Gaussian:
        raise Unavailable(self.reason)

    def table(self, of: Feature) -> Table:
        raise Unavailable(self.reason)


class KnownStatistics(OpenReference):
    """Statistics in a file. Our own say of which extractor, options and weights they are, and others are refused; of anybody else's the
    dimension is all that can be checked."""

    def __init__(self, file: StatisticsFile, how: PrepareBlock, extractors: Extractors) -> None:
        self.file, self._how, self._extractors = file, how, extractors
        self._fits: dict[Feature, GaussianFit] = {}

    @property
    def record(self) -> dict[str, Any]:
        checked = "extractor, options, weights and preparation" if self.file.stated else "the dimension alone: the file does not say what it is of"
        return {"kind": "statistics", "sha256": known_hash(self.file.path), "stated": self.file.stated, "checked": checked}

    def knows(self, of: Feature) -> bool:
        """Whether the file has an entry for a feature, be it the right one or not."""
        return self.file.fit(of) is not None

    def check(self, features: Sequence[Feature]) -> None:
        for each in features:
            self.statistics(each)

    def gather(self, features: Sequence[Feature], *, part: Part = WHOLE, progress: Progress | None = None) -> bool:
        self.check(features)
        return True

    def statistics(self, of: Feature) -> GaussianFit:
        if of not in self._fits:
            self._fits[of] = self._checked(of)
        return self._fits[of]

    def table(self, of: Feature) -> Table:
        raise Unavailable(f"needs the reference's pictures, and {str(self.file.path)!r} holds statistics only: give a folder of pictures")

    def _checked(self, of: Feature) -> GaussianFit:
        self._check_stated(of)
        try:
            fit = self.file.fit(of)
        except UserError as error:
            raise Unavailable(str(error)) from error
        name = f"{str(self.file.path)!r}"
        if fit is None:
            raise Unavailable(f"{name} holds no statistics of {_described(of)}: give a folder of pictures")
        if (width := self._width(of)) != len(fit.mean):
            raise Unavailable(f"{name} is of {len(fit.mean)} features a picture, {_described(of)} has {width}: it is of another extractor")
        return fit

    def _check_stated(self, of: Feature) -> None:
        stated = self.file.stated
        if stated is None:
            return
        found, needed = (_flat(each) for each in (stated, conventions(of, self._how, self._extractors)))
        for key, value in needed.items():
            if (other := found.get(key)) != value:
                raise Unavailable(f"{str(self.file.path)!r} holds statistics with {key} {other!r}, needed is {value!r}: compute them again")

    def _width(self, of: Feature) -> int:
        picture = Pictures(torch.zeros(1, 3, _PROBE, _PROBE, dtype=torch.uint8), ("",))
        (rows,) = self._extractors(picture, [of]).values()
        return rows.flatten(1).shape[1]


class KnownPictures(OpenReference):
    """Pictures whose features are extracted once, `chunk` at a time, and kept in a folder below `root` by what the pictures are, wherever
    they lie, and by what they were extracted by."""

    def __init__(self, source: PictureSource, how: PrepareBlock, extractors: Extractors, root: Path, chunk: int, kept: str | None = None) -> None:
        """kept: the folder below root that an evaluation has recorded, which is read where it is there. UserError where the pictures are not of
        one size once they are prepared."""
        source.check_sizes(how)
        self.source, self._how, self._extractors, self._root, self._chunk = source, how, extractors, root, chunk
        self._kept = kept if kept and (root / kept).is_dir() else None
        self.warnings = source.warnings
        self._statistics: dict[Feature, Gaussian] = {}

    @cached_property
    def _store(self) -> Store:
        """Opened at first use, for all pictures are hashed for it."""
        by = made_by(self._extractors.resources.device)
        key = digest(["reference", self.source.content, self._how.model_dump(), self._chunk, by])
        return Store(self._root / (self._kept or key[:32]), len(self.source), self._chunk)

    @property
    def record(self) -> dict[str, Any]:
        return {"kind": "pictures", "sha256": self.source.content, "n": len(self.source), "store": self._store.folder.name}

    def check(self, features: Sequence[Feature]) -> None:
        self._extractors.require(features)

    @torch.no_grad()
    def gather(self, features: Sequence[Feature], *, part: Part = WHOLE, progress: Progress | None = None) -> bool:
        names, progress = [self._extractors.name(each) for each in features], progress or Progress()
        lacking = [chunk for chunk in self._store.missing(names) if chunk % part.of == part.index]
        done, total = 0, sum(len(self._store.ids(chunk)) for chunk in lacking)
        if lacking:
            progress.start("reference pictures", total)
        try:
            for chunk in lacking:
                ids = self._store.ids(chunk)
                try:
                    pictures = ready(self.source, ids, self._how)
                except UserError as error:
                    raise Unavailable(str(error)) from error
                self._store.write(chunk, self._extractors(pictures, features), {})
                done += len(ids)
                progress.update(done, {})
        finally:
            if lacking:
                progress.finish()
        return not self._store.missing(names)

    def statistics(self, of: Feature) -> Gaussian:
        if of not in self._statistics:
            self._statistics[of] = table_statistics(self.table(of))
        return self._statistics[of]

    def table(self, of: Feature) -> Table:
        self.gather([of])
        return self._store.table(self._extractors.name(of))

    def save(self, path: Path, of: Feature) -> Path:
        """Write the statistics of a feature to an `.npz` that says what they are of."""
        stated = conventions(of, self._how, self._extractors) | {"pictures": self.source.content}
        return write_statistics(path, self.statistics(of), stated)


class StatisticsAndPictures(OpenReference):
    """ADM's reference batches: statistics of a whole data set, and pictures from it for what statistics do not tell."""

    def __init__(self, statistics: KnownStatistics, pictures: KnownPictures) -> None:
        self._known, self._pictures = statistics, pictures
        self.warnings = pictures.warnings

    @property
    def record(self) -> dict[str, Any]:
        pictures = self._pictures.record
        return {**self._known.record, "kind": "statistics and pictures", "n": pictures["n"], "store": pictures["store"]}

    def check(self, features: Sequence[Feature]) -> None:
        for each in features:
            self._of(each).check([each])

    def gather(self, features: Sequence[Feature], *, part: Part = WHOLE, progress: Progress | None = None) -> bool:
        return self._pictures.gather(features, part=part, progress=progress)

    def statistics(self, of: Feature) -> Gaussian:
        return self._of(of).statistics(of)

    def table(self, of: Feature) -> Table:
        return self._pictures.table(of)

    def _of(self, of: Feature) -> OpenReference:
        return self._known if of.extractor == "inception" and self._known.knows(of) else self._pictures


def conventions(of: Feature, how: PrepareBlock, extractors: Extractors) -> dict[str, Any]:
    """What statistics of a feature depend on besides the pictures; options with their defaults."""
    extractor = extractors.of(of)
    return {
        "extractor": of.extractor,
        "layer": of.layer,
        "options": extractor.config.model_dump(mode="json"),
        "hash": extractors.hash(of),
        "prepare": how.model_dump(mode="json"),
    }


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Conventions with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return found


def _described(of: Feature) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in of.options)
    return f"{of.extractor} {of.layer}{options and f' ({options})'}"


def load_reference(
    block: ReferenceBlock,
    extractors: Extractors,
    root: Path,
    *,
    data_dir: Path | None = None,
    prepare: PrepareBlock = PrepareBlock(),  # noqa: B008
    chunk: int = 64,
    where: str = "",
    allow_pickle: bool = False,
    kept: str | None = None,
) -> OpenReference:
    """The reference of a protocol; one that is missing, damaged or another than the recorded one is Absent. root: the folder of stores. where:
    what to begin messages with, such as `protocol NAME: `. kept: as of `KnownPictures`."""
    key = f"{where}reference.{'file' if block.file is not None else 'images'}"
    try:
        path = _found(block, data_dir, key)
        if block.file is not None:
            _check_hash(block, known_hash(path), f"{key}: {str(path)!r}")
            return _of_file(path, key, prepare, extractors, root, chunk, allow_pickle=allow_pickle, kept=kept)
        source = PictureFolder(path, key)
        _check_hash(block, source.content if block.sha256 else "", f"{key}: {str(path)!r}")
        return KnownPictures(source, prepare, extractors, root, chunk, kept)
    except UserError as error:
        return Absent(str(error))


def _of_file(
    path: Path, key: str, how: PrepareBlock, extractors: Extractors, root: Path, chunk: int, *, allow_pickle: bool, kept: str | None
) -> OpenReference:
    is_archive = path.suffix.lower() == ".npz"
    members = Archive(path).members if is_archive else {}
    holds_pictures = path.suffix.lower() == ".npy" or (is_archive and has_pictures(Archive(path)))
    if holds_pictures and not {"mu", "sigma", "mu_s", "sigma_s"} & members.keys():
        return KnownPictures(PictureArray(path, key), how, extractors, root, chunk, kept)
    known = KnownStatistics(StatisticsFile(path, key, allow_pickle=allow_pickle), how, extractors)
    if not holds_pictures:
        return known
    return StatisticsAndPictures(known, KnownPictures(PictureArray(path, key), how, extractors, root, chunk, kept))


def _found(block: ReferenceBlock, data_dir: Path | None, key: str) -> Path:
    """The path itself where the name leads to something, or below the data folder."""
    name = block.file if block.file is not None else block.images
    assert name is not None
    given = expanded(name)
    source = f": get it from {block.source}" if block.source else ""
    if not given.is_absolute() and data_dir is not None:
        given = data_dir / name
    elif not given.is_absolute() and not given.exists():
        raise UserError(f"{key}: needs {name!r}{source} and name its folder with --data-dir (recipe key evaluate.data_dir)")
    problem = missing(given) if block.file is not None else None if given.is_dir() else f"no folder {str(given)!r}"
    if problem:
        raise UserError(f"{key}: {problem}{source}")
    return given


def _check_hash(block: ReferenceBlock, found: str, where: str) -> None:
    if block.sha256 is not None and found != block.sha256:
        raise UserError(f"{where} is not what is recorded: its SHA-256 is {found}, not {block.sha256}")
