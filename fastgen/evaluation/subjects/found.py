"""Which kind of subject a name on the command line is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from fastgen.data.captions import contents
from fastgen.data.pixels import picture_suffixes
from fastgen.errors import UserError, nearest
from fastgen.evaluation.subjects.base import Subject
from fastgen.evaluation.subjects.generated import bundled_subject, student_subject
from fastgen.evaluation.subjects.pictures import PicturesSubject
from fastgen.evaluation.subjects.stock import StockPipeline
from fastgen.evaluation.subjects.stock_call import Asked
from fastgen.export import DTYPES
from fastgen.families import is_hub_id
from fastgen.files import expanded

FORMS = "an exported student, a diffusers folder, a folder of pictures, or a hub id 'owner/name'"


@dataclass(frozen=True)
class Wanted:
    """How a model is to be loaded and called. call: of a stock pipeline. revision: of a hub id. captions: of a folder of pictures."""

    call: Asked = field(default_factory=Asked)
    revision: str | None = None
    dtype: str = "fp32"
    captions: Path | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype: {self.dtype!r} is no precision; {nearest(self.dtype, DTYPES)}")

    def of_teacher(self) -> Wanted:
        """Of the pipeline that a model is compared with: what their pictures must have in common."""
        return Wanted(Asked(size=self.call.size), dtype=self.dtype)

    def refuse(self, kind: str, *allowed: str) -> None:
        """UserError for the first thing that is wanted and does not apply to this kind of model."""
        given = {"--guidance": self.call.guidance, "--size": self.call.size, "--call": self.call.more or None, "--revision": self.revision}
        given |= {"--dtype": None if self.dtype == "fp32" else self.dtype, "--captions": self.captions}
        for option, value in given.items():
            if value is not None and option not in allowed:
                raise UserError(f"{option}: does not apply to {kind}")


def is_student(model: str | Path) -> bool:
    return (expanded(model) / "fastgen.json").is_file()


def subject_of(
    model: str | Path,
    wanted: Wanted = Wanted(),
    *,
    device: torch.device | str = "cpu",
    teacher_dir: str | Path | None = None,
    name: Literal["pipeline", "teacher"] = "pipeline",
) -> Subject:
    """An exported student, any diffusers pipeline, a bundled teacher `fastgen:NAME`, or a folder of pictures, at its own number of steps or that of
    `wanted.call`. teacher_dir: where an adapter's teacher is. name: of a pipeline, in results.json. UserError for what is none of these, and for
    what is wanted and does not apply."""
    folder, steps = expanded(model), wanted.call.steps
    if str(model).startswith("fastgen:"):
        wanted.refuse("a bundled teacher", "--guidance")
        return bundled_subject(str(model), steps=steps, guidance=wanted.call.guidance, device=device)
    if is_student(model):
        wanted.refuse("an exported student, whose fastgen.json says how it is called", "--dtype")
        return student_subject(folder, steps=steps, dtype=wanted.dtype, device=device, teacher_dir=teacher_dir)
    if (folder / "model_index.json").is_file() or is_hub_id(str(model)):
        wanted.refuse("a pipeline", "--guidance", "--size", "--call", "--revision", "--dtype")
        return StockPipeline(str(model), wanted.call, revision=wanted.revision, dtype=wanted.dtype, device=device, name=name)
    _check_pictures(folder)
    wanted.refuse("a folder of pictures", "--captions")
    if steps is not None:
        raise UserError("--steps: does not apply to a folder of pictures")
    return PicturesSubject(folder, wanted.captions)


def _check_pictures(folder: Path) -> None:
    """UserError for what is neither a model nor a folder of pictures."""
    if not folder.is_dir():
        raise UserError(f"MODEL: {str(folder)!r} {'is a file' if folder.exists() else 'is not there'}; needed is {FORMS}")
    if (folder / "recipe.yaml").is_file():
        raise UserError(f"MODEL: {str(folder)!r} is a run; its student is {str(folder / 'student')!r}")
    if not any(path.suffix.lower() in picture_suffixes() for path in folder.rglob("*")):
        raise UserError(f"MODEL: {str(folder)!r} is not {FORMS}: {contents(folder)}")
