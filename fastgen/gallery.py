"""One self-contained HTML page of pictures: models side by side for each prompt, from the same noise; blind, with a person's votes."""

from __future__ import annotations

import gc
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from fastgen.errors import UserError
from fastgen.evaluation.prompts import prompts_of
from fastgen.evaluation.protocol import SampleSet
from fastgen.evaluation.subjects.base import Subject
from fastgen.evaluation.subjects.found import Asked, kind_of, subject_of
from fastgen.evaluation.subjects.generated import GeneratorSubject, teacher_subject
from fastgen.families import find_family
from fastgen.files import expanded, write_atomically
from fastgen.fingerprints import sealed
from fastgen.generator import read_manifest, student_family
from fastgen.pages import image_uri, rendered, short_names
from fastgen.pictures import picture_row, png
from fastgen.portable import source_name
from fastgen.progress import Progress
from fastgen.provenance import teacher_source
from fastgen.rng import derive_seed

LETTERS = "ABCDEFGHI"  # what models are called in a blind gallery; as many as there are keys
MOST_ROWS = 2000
MOST_PIXELS = 2**27  # of all pictures: 128 of 1024 x 1024, a page of some 200 MB
_SMALL = 160  # pixels on the longer side below which pictures are enlarged without smoothing


@dataclass
class _Model:
    """A column. source: as it was given; size: of its pictures (H, W), None before a stock pipeline has drawn; evaluations: of its network for one
    picture, None where a stock pipeline's own call decides it. pictures: data URIs, a row each."""

    name: str
    source: str
    load: Callable[[], Subject]
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    evaluations: int | None = None
    sha256: str = ""
    pictures: list[str] = field(default_factory=list)

    @property
    def detail(self) -> str:
        steps = [] if self.steps is None else [f"{self.steps} step{'s' * (self.steps != 1)}"]
        return " · ".join([*steps, *([] if self.evaluations is None else [f"{self.evaluations} NFE"])])

    @property
    def record(self) -> dict[str, Any]:
        told = {"steps": self.steps, "guidance": self.guidance, "evaluations": self.evaluations, "sha256": self.sha256}
        return {"name": self.name, **{key: value for key, value in told.items() if value is not None}}


@dataclass(frozen=True)
class Rows:
    """What is drawn: a prompt and the seed of its noise for each row, `samples` rows of a prompt one below the other."""

    prompts: list[str]
    samples: int = 1
    seed: int = 0

    @property
    def each(self) -> list[tuple[str, int]]:
        return [(prompt, self.seed + row) for row, prompt in enumerate(prompt for prompt in self.prompts for _ in range(self.samples))]


def read_rows(prompts: Path, samples: int = 1, seed: int = 0) -> Rows:
    """The prompts of a .txt, .jsonl or .csv file. UserError for a file that is none, is empty, or makes more rows than a page takes."""
    found = prompts_of(prompts, "--prompts")
    if not found:
        raise UserError(f"--prompts: {str(prompts)!r} holds no prompts")
    if (count := len(found) * samples) > MOST_ROWS:
        raise UserError(f"--prompts: {len(found):,} prompts with --samples {samples} make {count:,} rows; a page takes at most {MOST_ROWS:,}")
    return Rows(found, samples, seed)


def write_gallery(
    models: Sequence[str],
    rows: Rows,
    output: Path,
    *,
    steps: int | None = None,
    teacher: bool = True,
    teacher_dir: str | Path | None = None,
    blind: bool = False,
    secret: str | None = None,
    batch_size: int = 4,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Draw every row with every model, one model after the other, and write the page; blind: and, beside it, the key that says which letter is
    whom in which row. Returns what it wrote.

    models: exported students, diffusers folders, hub ids or bundled teachers. steps: of all of them (default: their own). teacher: the first
    student's is the first column, in its own number of steps. secret: what the order of a blind row's columns is drawn from, by default a new one.
    UserError, before anything is drawn where that can be known, for pictures of different sizes, students of different teachers beside one of them,
    more pixels than a page takes, and a page that is there already.
    """
    progress = progress or Progress()
    key = key_file(output)
    _check_new(output, key if blind else None, overwrite)
    columns = _columns(models, steps, teacher, teacher_dir, device)
    if len(columns) > len(LETTERS):
        raise UserError(f"STUDENT: {len(columns)} models with the teacher; a gallery shows at most {len(LETTERS)}")
    if blind and len(columns) < 2:
        raise UserError("--blind: there is one model, and nothing to choose from; name another, or leave out --no-teacher")
    _check_sizes(columns, len(rows.each))
    told: set[str] = set()
    for column in sorted(columns, key=lambda column: column.name == "teacher"):  # what a mistake in a student costs is not the teacher's time
        _draw(column, columns, rows, batch_size, progress, told)
    if not blind:
        return [write_atomically(output, rendered("gallery.html.j2", _page(columns, rows, [range(len(columns))] * len(rows.each))))]
    secret, page_id = secret or secrets.token_hex(16), secrets.token_hex(8)
    orders = [_order(secret, row, len(columns)) for row in range(len(rows.each))]
    record = {"format": 1, "page": page_id, "secret": secret, "models": [column.record for column in columns]}
    record["rows"] = [{"prompt": prompt, "seed": seed, "order": list(order)} for (prompt, seed), order in zip(rows.each, orders, strict=True)]
    # The key comes first: a page without one could not be counted.
    write_atomically(key, json.dumps(sealed(record), indent=1, ensure_ascii=False) + "\n")
    return [write_atomically(output, rendered("gallery.html.j2", _page(columns, rows, orders, page_id))), key]


def key_file(output: Path) -> Path:
    """Where the key of a blind gallery is: page.key.json beside page.html."""
    return output.with_name(f"{output.stem}.key.json")


def _check_new(output: Path, key: Path | None, overwrite: bool) -> None:
    for path in (output, key):
        if path is not None and path.is_file() and not overwrite:
            raise UserError(f"--output: {str(path)!r} is there already; give --overwrite to replace it")


def _columns(models: Sequence[str], steps: int | None, teacher: bool, teacher_dir: str | Path | None, device: torch.device | str) -> list[_Model]:
    """The teacher, then the models as they were given. UserError for what none of them can be."""
    kinds = [kind_of(model, steps=steps, key="STUDENT") for model in models]
    if "pictures" in kinds:
        raise UserError(f"STUDENT: {models[kinds.index('pictures')]!r} is a folder of pictures; a gallery draws its own, with students and pipelines")
    students = [model for model, kind in zip(models, kinds, strict=True) if kind == "student"]
    names = _names(models)
    columns = []
    for name, model, kind in zip(names, models, kinds, strict=True):
        of_adapter = teacher_dir if kind == "student" else None
        load = lambda model=model, of=of_adapter: subject_of(model, Asked(), steps=steps, device=device, teacher_dir=of)  # noqa: E731
        columns.append(_Model(name, model, load, _size(model, kind, teacher_dir)))
    if not teacher:
        return columns
    if not students:
        if teacher_dir is not None:
            raise UserError("--teacher: no student is given, whose teacher that could be; name it as one of the models")
        return columns
    first = expanded(students[0])
    _check_teachers(students)
    teacher_source(first, read_manifest(first)["teacher"], teacher_dir)
    beside = _Model("teacher", students[0], lambda: teacher_subject(first, device=device, teacher_dir=teacher_dir))
    beside.size = next(column.size for column in columns if column.source == students[0])
    return [beside, *columns]


def _names(models: Sequence[str]) -> list[str]:
    """Local folders by the last part of their paths (a run's `student` by the run's), or by as many as make them differ; others by themselves."""
    local = [model for model in models if expanded(model).is_dir()]
    folders = [folder.parent if folder.name == "student" else folder for folder in (expanded(model).absolute() for model in local)]
    short = dict(zip(local, short_names(folders, "model"), strict=True))
    names = [short.get(model) or source_name(model) for model in models]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"the same model is given twice: {twice[0]}")
    return names


def _check_teachers(students: Sequence[str]) -> None:
    """UserError unless all were trained with one teacher, as far as they know its hash."""
    hashes = {student: read_manifest(expanded(student))["teacher"].get("sha256") for student in students}
    for one, other in combinations([student for student in students if hashes[student]], 2):
        if hashes[one] != hashes[other]:
            told = f"{hashes[one][:8]} of {one!r} and {hashes[other][:8]} of {other!r}"
            raise UserError(f"STUDENT: they have different teachers (SHA-256 {told}); compare the students alone with --no-teacher")


def _size(model: str, kind: str, teacher_dir: str | Path | None) -> tuple[int, int] | None:
    """Of a model's pictures, before it is loaded; None of a stock pipeline's."""
    if kind == "pipeline":
        return None
    folder = expanded(model)
    family = find_family(model) if kind == "bundled" else student_family(folder, read_manifest(folder), teacher_dir)
    shape = family.picture_shape
    if len(shape) == 4:
        raise UserError(f"STUDENT: {model!r} draws videos of {shape[1]} frames; a gallery shows pictures")
    return shape[-2], shape[-1]


def _check_sizes(columns: Sequence[_Model], num_rows: int) -> None:
    """UserError where sizes that are known differ, or are too much for a page."""
    known = [(column, column.size) for column in columns if column.size is not None]
    for (one, size), (other, others) in combinations(known, 2):
        if size != others:
            told = f"{one.name!r} draws {size[0]}x{size[1]} pixels, {other.name!r} {others[0]}x{others[1]}"
            raise UserError(f"STUDENT: pictures of different sizes cannot stand side by side from the same noise: {told}")
    if known:
        height, width = known[0][1]
        if (total := num_rows * len(columns) * height * width) > MOST_PIXELS:
            what = f"{num_rows * len(columns):,} pictures of {height}x{width} have {total / 1e6:,.0f} million pixels"
            raise UserError(f"--prompts: {what}; a page takes at most {MOST_PIXELS / 1e6:,.0f} million: give fewer prompts, --samples or models")


def _draw(column: _Model, columns: Sequence[_Model], rows: Rows, batch_size: int, progress: Progress, told: set[str]) -> None:
    """Fill a column; its model leaves memory before the next one is loaded. told: warnings that another model has given."""
    progress.stage(f"loading {column.name}")
    subject, each = column.load(), rows.each
    column.steps, column.guidance, column.sha256 = subject.steps, subject.guidance, subject.content
    if isinstance(subject, GeneratorSubject) and subject.steps is not None:
        column.evaluations = subject.steps * (1 if subject.guidance == 1 else 2)
    samples = SampleSet("gallery", tuple(prompt for prompt, _ in each), tuple(seed for _, seed in each))
    for warning in subject.check({"gallery": samples}, whole=False):
        if warning not in told:
            progress.warn(f"warning: {warning}")
            told.add(warning)
    progress.start(f"drawing with {column.name}", len(each))
    try:
        for start in range(0, len(each), batch_size):
            batch = each[start : start + batch_size]
            ids = range(start, start + len(batch))
            for picture in subject.draw([prompt for prompt, _ in batch], [seed for _, seed in batch], ids):
                if column.size is None:
                    column.size = picture.shape[-2], picture.shape[-1]
                    _check_sizes(columns, len(each))
                column.pictures.append(image_uri(png(picture_row(picture[None]))))
            progress.update(start + len(batch), {})
    finally:
        progress.finish()
    del subject
    gc.collect()


def _order(secret: str, row: int, count: int) -> Sequence[int]:
    """Which model stands in each place of a blind row."""
    generator = torch.Generator().manual_seed(derive_seed("gallery", secret, row))
    return torch.randperm(count, generator=generator).tolist()


def _page(columns: Sequence[_Model], rows: Rows, orders: Sequence[Sequence[int]], page_id: str = "") -> dict[str, Any]:
    """What the template shows: of a blind page nothing that tells one model from another."""
    blind, size = bool(page_id), next(column.size for column in columns if column.size is not None)
    groups: list[dict[str, Any]] = []
    for row, ((prompt, seed), order) in enumerate(zip(rows.each, orders, strict=True)):
        if row % rows.samples == 0:
            groups.append({"prompt": prompt, "rows": []})
        cells = [_cell(columns[index], row, seed, LETTERS[place] if blind else "") for place, index in enumerate(order)]
        groups[-1]["rows"].append({"number": row, "seed": seed, "cells": cells})
    title = "Which picture is best?" if blind else f"Gallery of {', '.join(column.name for column in columns)}"
    models = [] if blind else [_line(column) for column in columns]
    counts = {"num_models": len(columns), "num_rows": len(rows.each), "height": size[0], "width": size[1], "small": max(size) < _SMALL}
    return {"title": title, "models": models, "groups": groups, "page_id": page_id, **counts}


def _line(column: _Model) -> dict[str, str]:
    """Of the table of models."""
    absent = "\N{EN DASH}"
    numbers = {"steps": column.steps, "guidance": column.guidance, "evaluations": column.evaluations}
    return {"name": column.name, "sha256": column.sha256[:8], **{key: absent if each is None else f"{each:g}" for key, each in numbers.items()}}


def _cell(column: _Model, row: int, seed: int, letter: str) -> dict[str, str]:
    return {
        "uri": column.pictures[row],
        "name": letter or column.name,
        "detail": "" if letter else column.detail,
        "alt": f"picture {letter}" if letter else f"{column.name}, seed {seed}",
        "letter": letter,
    }
