"""Which kind of subject a name on the command line is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from fastgen.errors import UserError
from fastgen.evaluation.subjects.base import Subject
from fastgen.evaluation.subjects.generated import student_subject
from fastgen.evaluation.subjects.stock import StockPipeline
from fastgen.evaluation.subjects.stock_call import Asked
from fastgen.files import expanded


@dataclass(frozen=True)
class Wanted:
    """How a model is to be loaded and called. call: of a stock pipeline. captions: of a folder of pictures."""

    call: Asked = field(default_factory=Asked)
    revision: str | None = None
    dtype: str = "fp32"
    captions: Path | None = None


def is_student(model: str) -> bool:
    return (expanded(model) / "fastgen.json").is_file()


def subject_of(
    model: str,
    wanted: Wanted,
    *,
    device: torch.device | str = "cpu",
    teacher_dir: str | Path | None = None,
    name: Literal["pipeline", "teacher"] = "pipeline",
) -> Subject:
    """An exported student, any diffusers pipeline, or a folder of pictures. name: of a pipeline, in results.json."""
    path = expanded(model)
    if is_student(model):
        if wanted.call != Asked():
            raise UserError(f"--guidance, --size and --call are of stock pipelines; {model!r} is an exported student, which brings its own")
        return student_subject(path, dtype=wanted.dtype, device=device, teacher_dir=teacher_dir)
    if path.is_dir() and not (path / "model_index.json").is_file():
        from fastgen.evaluation.subjects.pictures import PicturesSubject

        return PicturesSubject(path, captions=wanted.captions)
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{model!r} is a file; a student, a diffusers folder, a hub id or a folder of pictures is measured")
    return StockPipeline(model, wanted.call, revision=wanted.revision, dtype=wanted.dtype, device=device, name=name)
