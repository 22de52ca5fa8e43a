"""Which kind of subject it is that somebody wants to measure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fastgen.data.captions import contents
from fastgen.data.pixels import picture_suffixes
from fastgen.errors import UserError, nearest
from fastgen.evaluation.subjects.base import Subject
from fastgen.evaluation.subjects.stock_call import CallSettings
from fastgen.export import DTYPES
from fastgen.families import is_hub_id, resolve_source
from fastgen.files import expanded

Kind = Literal["bundled", "student", "pipeline", "pictures"]
FORMS = "an exported student, a diffusers folder, a folder of pictures, or a hub id 'owner/name'"


@dataclass(frozen=True)
class Asked:
    """What a user wants of a model beside its steps; None: its own. guidance, max_sequence_length, call (other arguments, as JSON has them) and
    revision (of a hub id) are of stock pipelines alone; size (height, width) of these and of students, of which it is one of their own; captions:
    a file, of a folder of pictures."""

    guidance: float | None = None
    size: tuple[int, int] | None = None
    max_sequence_length: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None
    dtype: str | None = None
    captions: Path | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"--dtype: {self.dtype!r} is no precision; {nearest(self.dtype, DTYPES)}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UserError(f"--guidance: {self.guidance:g} is no number to guide by")

    def of_teacher(self) -> Asked:
        """Of the pipeline that a model is compared with: what pictures must have in common."""
        return Asked(size=self.size, dtype=self.dtype)

    def refuse(self, kind: str, *allowed: str) -> None:
        """UserError for the first thing that is wanted and does not apply to this kind of model."""
        given = {"guidance": "--guidance", "size": "--size", "max_sequence_length": "--max-sequence-length", "call": "--call"}
        given |= {"revision": "--revision", "dtype": "--dtype", "captions": "--captions"}
        for name, option in given.items():
            value = getattr(self, name)
            if name not in allowed and value not in (None, {}):
                raise UserError(f"{option}: does not apply to {kind}")


def subject_of(
    model: str | Path,
    asked: Asked = Asked(),
    *,
    steps: int | None = None,
    device: torch.device | str = "cpu",
    teacher_dir: str | Path | None = None,
    name: Literal["teacher", "pipeline"] | None = None,
) -> Subject:
    """The student, pipeline or pictures at `model`, which can be a path, a hub id or `fastgen:NAME`. steps: by default its own. teacher_dir: where an
    adapter's teacher is. name: what its rows are called, by default what it is. UserError for what is none of these, and for what does not apply."""
    folder, model = expanded(model), str(model)
    kind = kind_of(model, asked, steps=steps)
    if kind == "pictures":
        from fastgen.evaluation.subjects.pictures import PicturesSubject

        subject = PicturesSubject(folder, asked.captions)
    elif kind == "pipeline":
        from fastgen.evaluation.subjects.stock import StockPipeline

        subject = StockPipeline(model, _call(asked, steps), revision=asked.revision, dtype=asked.dtype or "fp32", device=device)
    else:
        from fastgen.evaluation.subjects.generated import bundled_subject, student_subject

        if kind == "bundled":
            subject = bundled_subject(model, steps=steps, guidance=asked.guidance, device=device)
        else:
            options: Any = {"dtype": asked.dtype or "fp32", "device": device, "teacher_dir": teacher_dir, "size": asked.size}
            subject = student_subject(folder, steps=steps, **options)
    return _called(subject, name)


def _called(subject: Subject, name: Literal["teacher", "pipeline"] | None) -> Subject:
    if name is not None:
        subject.name = name
    return subject


def is_student(model: str) -> bool:
    """Whether it is a folder that fastgen has exported."""
    return (expanded(model) / "fastgen.json").is_file()


def kind_of(model: str, asked: Asked = Asked(), *, steps: int | None = None, key: str = "MODEL") -> Kind:
    """Which of them it is. UserError, which begins with `key`, before anything is loaded: for what is none of them, for what does not apply to
    its kind, and for a hub id that cannot be had, which is downloaded here."""
    folder = expanded(model)
    if model.startswith("fastgen:"):
        asked.refuse("a bundled teacher", "guidance")
        _resolved(model, key)
        if asked.guidance is not None and asked.guidance < 1:
            raise UserError(f"--guidance: {asked.guidance:g}; a bundled teacher takes 1 (none) and more, as in diffusers")
        return "bundled"
    if is_student(model):
        asked.refuse("an exported student, whose fastgen.json says how it is called", "dtype", "size")
        return "student"
    if (folder / "model_index.json").is_file() or is_hub_id(model):
        from fastgen.evaluation.subjects.stock import check_pipeline

        asked.refuse("a pipeline", "guidance", "size", "max_sequence_length", "call", "revision", "dtype")
        check_pipeline(model, _call(asked, steps), asked.revision)
        return "pipeline"
    _check_pictures(folder, key)
    asked.refuse("a folder of pictures", "captions")
    if steps is not None:
        raise UserError("--steps: does not apply to a folder of pictures")
    return "pictures"


def _call(asked: Asked, steps: int | None) -> CallSettings:
    return CallSettings(steps, asked.guidance, asked.size, asked.max_sequence_length, asked.call)


def _resolved(model: str, key: str) -> Path:
    try:
        return resolve_source(model)
    except UserError as error:  # of a teacher, as those messages have it
        raise UserError(str(error).replace("recipe key teacher.pretrained: ", f"{key}: ")) from error


def _check_pictures(folder: Path, key: str) -> None:
    if not folder.is_dir():
        what = f"{str(folder)!r} is a file" if folder.exists() else f"no folder {str(folder)!r}"
        raise UserError(f"{key}: {what}; needed is {FORMS}")
    if (folder / "recipe.yaml").is_file():
        raise UserError(f"{key}: {str(folder)!r} is a run; its student is {str(folder / 'student')!r}")
    if not any(path.suffix.lower() in picture_suffixes() for path in folder.rglob("*")):
        raise UserError(f"{key}: {str(folder)!r} is not {FORMS}: {contents(folder)}")
