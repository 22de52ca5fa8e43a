"""An exported student as the teacher of another: what its fastgen.json says of the guidance and the times that its network is made for.

A second reflow, InstaFlow's distillation of a rectified flow and progressive distillation go on from a student. Its network holds the guidance of its
own teacher, so that guiding it once more guides twice, and a few-step student's is made for the times of its own steps alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from fastgen import records
from fastgen.errors import UserError
from fastgen.manifest import FORMAT, FormerPipeline, Guidance, Options, Pipeline, upgraded

KEY = "recipe key teacher.guidance"


class _Taught(records.Schema):
    guidance: Guidance = 1.0


class _Record(records.Schema):
    teacher: _Taught | None = None
    method: str = ""
    grid: list[float] = Field(default_factory=list)
    sampler: str = "euler"
    options: Options = Options()
    recipe: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Former:
    """A student's folder. guidance: that its network is called with, 1 is none; taught: its own teacher's; told: what the network is told of it, None
    where it has no such input."""

    guidance: float
    taught: float
    told: float | None
    steps: int
    method: str
    grid: tuple[float, ...]  # path times
    sampler: str
    distiller: dict[str, Any]  # block of its recipe, empty where that is not recorded

    @property
    def holds_guidance(self) -> bool:
        """Whether its network gives guided predictions by itself."""
        return self.guidance == 1 and self.taught > 1


def former(folder: Path) -> Former | None:
    """What a pipeline folder says of itself where it is a student's; None where it is not, or was made by hand. UserError for a broken record."""
    path = folder / "fastgen.json"
    if not path.is_file():
        return None
    record = records.read(path, FormerPipeline)
    if record.get("format", 1) >= FORMAT:
        records.read(path, Pipeline)
    record = upgraded(record)
    try:
        records.checked(record, _Record)
    except ValueError as error:
        raise UserError(f"{str(path)!r}: {error}; export the student again") from error
    if record.get("teacher") is None or not {"guidance", "steps"} <= record.keys():
        return None
    distiller = record.get("recipe", {}).get("distiller", {})
    taught, grid = record["teacher"].get("guidance", 1.0), tuple(record.get("grid", ()))
    block = distiller if isinstance(distiller, dict) else {}
    told, method, sampler = record.get("options", {}).get("embedded_guidance"), record.get("method", ""), record.get("sampler", "euler")
    return Former(record["guidance"], taught, told, record["steps"], method, grid, sampler, block)


def check_guidance(source: str, folder: Path, guidance: float, *, key: str = KEY) -> list[str]:
    """UserError where the guidance that a student's network holds already would be given it once more; a warning where some of it would be, as
    InstaFlow means it (Liu et al. 2023, arXiv:2309.06380: 1.5 on a rectified flow that was taught with 5), or where a student of an unguided teacher
    would be guided, which it was not trained for either. Students that are called with guidance take any."""
    student = former(folder)
    if student is None or guidance == 1 or student.guidance != 1:
        return []
    if not student.holds_guidance:
        said = f"{guidance:g}, but {source!r} is a student that {student.method} trained without guidance and to be called without; 1 is none"
        return [f"{key.removeprefix('recipe key ')}: {said}"]
    inside = f"{source!r} is a student whose network has its own teacher's guidance {student.taught:g} inside"
    if guidance >= student.taught:
        raise UserError(f"{key}: {guidance:g}, but {inside}, so it would be guided twice; set it to 1")
    more = "on top of it, as InstaFlow's second stage does; set it to 1 unless you mean that"
    return [f"{key.removeprefix('recipe key ')}: {guidance:g}, but {inside}: this comes {more}"]


def cannot_teach(folder: Path) -> str | None:
    """Why a pipeline folder is no teacher, where its fastgen.json says that the pipeline's network is not all of a student, or not at all times."""
    path = folder / "fastgen.json"
    manifest = records.read(path, FormerPipeline) if path.is_file() else {}
    if "experts" in manifest:
        return "a student of several experts"
    return "a student of its own number of steps alone" if manifest.get("own_steps_only") else None
