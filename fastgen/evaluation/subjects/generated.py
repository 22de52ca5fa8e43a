"""Students and their teachers, drawn by our own sampler, which draws what the stock pipeline does."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.evaluation.protocol import SampleSet
from fastgen.evaluation.subjects.base import Subject
from fastgen.export import DTYPES
from fastgen.families import source_hash
from fastgen.fingerprints import folder_hash
from fastgen.generator import ImageGenerator, check_student, load_teacher, load_teacher_of, open_student, read_manifest
from fastgen.portable import source_name
from fastgen.provenance import teacher_lora, teacher_source


class GeneratorSubject(Subject):
    """An ImageGenerator at a number of steps, by default its own. content: SHA-256 of its weights. source: its folder, or a teacher's name.
    told: what else its pictures depend on, as JSON has it. taught_by: of a student, its teacher's SHA-256."""

    def __init__(
        self,
        generator: ImageGenerator,
        name: str,
        *,
        content: str,
        source: str,
        steps: int | None = None,
        dtype: str = "fp32",
        told: Mapping[str, Any] | None = None,
        taught_by: str | None = None,
    ) -> None:
        self.generator, self.name, self.source, self.dtype, self.told = generator, name, source, dtype, dict(told or {})
        self._content, self.taught_by = content, content if name == "teacher" else taught_by
        self.guidance = generator.guidance
        self._step(steps or generator.steps)

    def _step(self, steps: int) -> None:
        self.times = self.generator.times(steps).tolist()  # UserError for a number that the student was not made for
        self.steps: int = steps

    @property
    def content(self) -> str:
        return self._content

    @property
    def record(self) -> dict[str, Any]:
        generator, family = self.generator, self.generator.family
        return {
            "source": source_name(self.source),
            **self.told,
            "pipeline": family.pipeline_classes[0] if family.pipeline_classes else type(family).__name__,
            "steps": self.steps,
            "grid": self.times,
            "sampler": generator.moves,
            **({"scheduler": self._scheduler()} if family.exportable and generator.moves == generator.sampler else {}),
            **({"windows": own["edges"]} if (own := generator.own) and own["name"] == generator.moves == "linear_windows" else {}),
            "guidance": generator.guidance,
            "options": family.options,
            "dtype": self.dtype,
            "device": generator.device.type,
        }

    def _scheduler(self) -> dict[str, Any]:
        """The one with which a stock pipeline draws the same."""
        generator = self.generator
        grid = generator.explicit_grid if self.steps == generator.steps else None
        scheduler = generator.family.sampling_scheduler(self.steps, grid, generator.sampler)
        return {"class": type(scheduler).__name__, **{key: value for key, value in scheduler.config.items() if not key.startswith("_")}}

    def at(self, steps: int) -> GeneratorSubject:
        other = copy.copy(self)
        vars(other).pop("identity", None)
        other._step(steps)
        return other

    def beside(self) -> GeneratorSubject | None:
        generator = self.generator.with_own_sampler()
        if generator is self.generator:
            return None
        if why_not := generator.why_not_own(self.steps):
            raise UserError(f"{self.name} is not drawn with {generator.moves}: {why_not}")
        other = self.at(self.steps)
        other.generator, other.name = generator, f"{self.name}_{generator.moves}"
        return other

    def check(self, sets: Mapping[str, SampleSet], *, whole: bool) -> list[str]:
        shape = self.generator.family.picture_shape
        if len(shape) == 4:
            raise UserError(f"{self.generator.name} draws videos of {shape[1]} frames, and only pictures are measured")
        prompts = list(dict.fromkeys(prompt for samples in sets.values() for prompt in samples.prompts))
        return self.generator.family.legibility(prompts).check("prompts")

    def draw(self, prompts: list[str], seeds: list[int], ids: Sequence[int]) -> Tensor:
        return self.generator(prompts, seeds, self.steps)


def student_subject(
    folder: Path,
    *,
    steps: int | None = None,
    dtype: str = "fp32",
    device: torch.device | str = "cpu",
    teacher_dir: str | Path | None = None,
    size: Sequence[int] | None = None,
) -> GeneratorSubject:
    """An exported student, at one of its sizes (height, width), by default the first. UserError where its files are not those that were exported,
    as of `load_student`."""
    manifest = read_manifest(folder)
    check_student(folder, manifest)
    generator = open_student(folder, manifest, device=device, dtype=DTYPES[dtype], teacher_dir=teacher_dir).at_size(size)
    told = {"negative_prompt": manifest["teacher"]["negative_prompt"]} | {key: manifest[key] for key in ("method", "unfinished") if manifest.get(key)}
    if manifest["weights"] == "lora":
        told["teacher"] = manifest["teacher"].get("sha256") or _teacher_hash(folder, manifest["teacher"], teacher_dir)
    taught_by, content = manifest["teacher"].get("sha256"), folder_hash(folder)
    return GeneratorSubject(generator, "student", content=content, source=str(folder), steps=steps, dtype=dtype, told=told, taught_by=taught_by)


def teacher_subject(
    student: Path,
    *,
    steps: int | None = None,
    size: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    teacher_dir: str | Path | None = None,
) -> GeneratorSubject:
    """The teacher that an exported student's fastgen.json names, or the one in `teacher_dir`, with the student's options and its guidance there."""
    recorded = read_manifest(student)["teacher"]
    source, revision = teacher_source(student, recorded, teacher_dir)
    generator = load_teacher_of(student, size=size, device=device, teacher_dir=teacher_dir)
    told = {"negative_prompt": recorded["negative_prompt"], **({} if revision is None else {"revision": revision})}
    if recorded.get("lora"):
        told["lora"] = [{key: adapter[key] for key in ("name", "weight", "sha256")} for adapter in recorded["lora"]]
    content = _teacher_hash(student, recorded, teacher_dir)
    return GeneratorSubject(generator, "teacher", content=content, source=source, steps=steps, told=told)


def _teacher_hash(student: Path, recorded: dict[str, Any], teacher_dir: str | Path | None) -> str:
    return source_hash(*teacher_source(student, recorded, teacher_dir), teacher_lora(student, recorded))


def bundled_subject(source: str, *, steps: int | None = None, guidance: float | None = None, device: torch.device | str = "cpu") -> GeneratorSubject:
    """A teacher that comes with fastgen."""
    generator = load_teacher(source, guidance=guidance, device=device)
    return GeneratorSubject(generator, "teacher", content=source_hash(source), source=source, steps=steps)
