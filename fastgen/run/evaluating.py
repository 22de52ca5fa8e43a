"""Measuring a model by a protocol: a student beside its teacher, any diffusers pipeline, or pictures that are there already."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from fastgen import group
from fastgen.data.latents import name_of
from fastgen.errors import CannotWrite, UserError
from fastgen.evaluation import results
from fastgen.evaluation.dumps import DumpFolder
from fastgen.evaluation.extraction import WHOLE, Part
from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.protocol import Protocol, load_protocol
from fastgen.evaluation.runner import Drawn, Evaluation
from fastgen.evaluation.settings import Settings, with_root
from fastgen.evaluation.sharing import draw_parts
from fastgen.evaluation.subjects.base import Subject
from fastgen.evaluation.subjects.found import Asked, is_student, kind_of, subject_of
from fastgen.evaluation.subjects.generated import teacher_subject
from fastgen.files import check_writable, expanded
from fastgen.generator import read_manifest
from fastgen.group import Alone
from fastgen.parallel import own_device
from fastgen.portable import source_name
from fastgen.progress import Once, Progress
from fastgen.provenance import teacher_source
from fastgen.run.agreement import agree


class PartDone(Exception):
    """A part of an evaluation has drawn its own; `left` chunks wait for the others."""

    def __init__(self, left: int) -> None:
        super().__init__(f"{left} chunk{'s' * (left != 1)} of pictures wait for other parts; what is drawn is kept")
        self.left = left


def evaluate(
    model: str | Path,
    *,
    protocol: str | Protocol = "digits",
    steps: Sequence[int] | None = None,
    output: str | Path | None = None,
    teacher: bool = True,
    teacher_steps: Sequence[int] | None = None,
    teacher_dir: str | Path | None = None,
    device: str = "auto",
    resources: Resources | None = None,
    asked: Asked | None = None,
    settings: Settings | None = None,
    dump: DumpFolder | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model and, unless `teacher=False`, its teacher, one after the other, and write results.json; returns its content. A teacher that
    fails once the model is drawn costs what needs it: that is listed as missing, and the model's own rows are written.

    model: an exported student, any diffusers folder or hub id, or a folder of pictures. steps: of the model (default: its own);
    teacher_steps: of the teacher (default: its own); teacher_dir: where a student's teacher is, unless its fastgen.json or the run that it
    lies in says so; for other models, the pipeline to compare with. resources: where weights and data lie. settings: where features are kept,
    so that the same call goes on where one was killed and draws nothing twice; PartDone where they name a part and others are not done.
    A launcher's processes draw a part each, and have the results all.
    """
    with group.joined() as members:
        progress = Once(progress) if progress is not None and members.is_main else Progress()
        place, resources, settings = own_device(device, "--device"), resources or Resources(), settings or Settings()
        if members.world_size > 1 and settings.part != WHOLE:
            raise UserError(f"--part: the {members.world_size} processes that the launcher started take a part each; leave it out")
        protocol = protocol if isinstance(protocol, Protocol) else load_protocol(protocol, data_dir=resources.data_dir, key="--protocol")
        asked = asked or Asked()
        target = results_file(str(model), size=asked.size) if output is None else Path(output)
        measurement = Measurement(
            str(model), protocol, target, place, steps, teacher, teacher_steps, teacher_dir, resources, asked, settings, dump, progress
        )
        if members.world_size > 1:
            counts = {"--steps": steps, "--teacher-steps": teacher_steps, "--stop-after": settings.stop_after, "--batch-size": settings.batch_size}
            agree(members, {"MODEL": str(model), "protocol": protocol.hash(), **counts, "idea of how the model is called": asked})
            if place.type == "cuda":
                torch.cuda.set_device(place)  # of which time and memory are measured
        measurement.draw_parts(members)
        return members.told(measurement.results)


@dataclass(frozen=True)
class Measurement:
    """What `evaluate` measures, and how; `device`: this process's own."""

    model: str
    protocol: Protocol
    output: Path
    device: torch.device
    steps: Sequence[int] | None = None
    teacher: bool = True
    teacher_steps: Sequence[int] | None = None
    teacher_dir: str | Path | None = None
    resources: Resources = field(default_factory=Resources)
    asked: Asked = field(default_factory=Asked)
    settings: Settings = field(default_factory=Settings)
    dump: DumpFolder | None = None
    progress: Progress = field(default_factory=Progress)

    def draw_parts(self, members: Alone) -> None:
        """Collective: have each of several processes draw its part of the pictures."""

        def draw(part: Part) -> None:
            own = replace(self, settings=replace(self.settings, part=part), progress=self.progress if members.is_main else Progress())
            with own._drawn():
                pass

        draw_parts(members, draw, self.progress)

    def results(self) -> dict[str, Any]:
        """Draw what is missing, measure, and write the results. PartDone where other parts are missing still."""
        with self._drawn() as evaluation:
            if evaluation.left:
                raise PartDone(evaluation.left)
            return _written(evaluation, self.output, self.device)

    @contextmanager
    def _drawn(self) -> Iterator[Evaluation]:
        """The evaluation, once this process has drawn what the settings say."""
        resources, place, model = replace(self.resources, device=self.device), self.device, self.model
        # What nothing can come of is refused before anything is loaded, and that before a reference is read.
        kind_of(model, self.asked, key="MODEL")
        beside = _teacher(model, self.asked, self.teacher_dir, self.teacher_steps, place) if self.teacher else None
        if beside is None and self.teacher_steps is not None:
            raise UserError("--teacher-steps: there is no teacher to measure")
        if self.dump is not None:
            check_writable(self.dump.folder, "--dump")
        subject = subject_of(model, self.asked, device=place, teacher_dir=self.teacher_dir, name=_name(model, beside))
        models = _subjects(subject, self.steps, self.progress)
        del subject
        with with_root(self.settings, self.progress) as settings:
            evaluation = Evaluation(self.protocol, resources, settings, dump=self.dump, progress=self.progress, teacher=beside is not None)
            self.progress.stage(f"measuring {model} with protocol {self.protocol.name}")
            _draw(evaluation, models)
            if beside is not None:
                _draw_teacher(evaluation, beside, self.teacher_steps)
                gc.collect()
            yield evaluation


def _written(evaluation: Evaluation, target: Path, device: torch.device) -> dict[str, Any]:
    rows = [*evaluation.rows(), *evaluation.floors()]
    origin = results.provenance(
        evaluation.protocol,
        device=device,
        model_hash=evaluation.drawn[0].content,
        extractors=evaluation.extractor_hashes,
        reference=None if evaluation.reference is None else evaluation.reference.record,
        models=_records(evaluation.drawn),
        batch_size=evaluation.batch_size,
    )
    if "unfinished" in (record := evaluation.drawn[0].record):
        origin["unfinished"] = record["unfinished"]
    name, stop_after = evaluation.protocol.name, evaluation.settings.stop_after
    return results.write_results(target, name, rows, origin, missing=evaluation.missing, stop_after=stop_after)


def _name(model: str, beside: object) -> Literal["pipeline"] | None:
    """What a bundled teacher is called that is compared with another."""
    return "pipeline" if beside is not None and model.startswith("fastgen:") else None


def _teacher(
    model: str, asked: Asked, teacher_dir: str | Path | None, steps: Sequence[int] | None, device: torch.device
) -> Callable[[], Subject] | None:
    """What loads the model's teacher; None where there is none. UserError where a student's teacher is not found, or it is no model."""
    if is_student(model):
        teacher_source(expanded(model), read_manifest(expanded(model))["teacher"], teacher_dir)
        return lambda: teacher_subject(expanded(model), size=asked.size, device=device, teacher_dir=teacher_dir)
    if teacher_dir is None:
        return None
    if kind_of(str(teacher_dir), asked.of_teacher(), key="--teacher") == "pictures" and steps is not None:
        raise UserError("--teacher-steps: does not apply to a folder of pictures")
    return lambda: subject_of(str(teacher_dir), asked.of_teacher(), device=device, name="teacher")


def results_file(model: str, *, size: tuple[int, int] | None = None) -> Path:
    """Where results go: beside a student, and otherwise into the current folder. size: that of a student which is asked for."""
    own = f"results.{name_of(size)}.json" if size else "results.json"
    return expanded(model) / own if is_student(model) else Path(re.sub("[/:]", "_", f"{source_name(model)}.results.json"))


def _subjects(model: Subject, steps: Sequence[int] | None, progress: Progress) -> list[Subject]:
    """A model at each number of steps, and then as only fastgen draws it, where it is made for that. UserError for steps that it cannot take."""
    subjects = [model] if steps is None else [model.at(count) for count in steps]
    for each in list(subjects):
        try:
            subjects += [own] if (own := each.beside()) is not None else []
        except UserError as error:
            progress.warn(f"warning: {error}")
    return subjects


def _draw(evaluation: Evaluation, subjects: list[Subject]) -> None:
    """Draw each, after which it leaves memory: the next model may be large too."""
    while subjects:
        evaluation.draw(subjects.pop(0))
    gc.collect()


def _draw_teacher(evaluation: Evaluation, load: Callable[[], Subject], steps: Sequence[int] | None) -> None:
    """Draw the teacher at each number of steps. The model has been drawn, perhaps for hours, so what goes wrong with its teacher is lost alone."""
    try:
        teacher = load()
    except (UserError, torch.OutOfMemoryError) as error:
        evaluation.lose_teacher(None, error)
        return
    for count in steps or [None]:
        try:
            evaluation.draw(teacher if count is None else teacher.at(count))
        except CannotWrite:
            raise
        except (UserError, torch.OutOfMemoryError) as error:
            evaluation.lose_teacher(count, error)


def _records(drawn: Sequence[Drawn]) -> dict[str, dict[str, Any]]:
    """What is known of each model in the rows, and what its stores are called, for comparisons."""
    return {
        results.model_key(each.name, each.steps): {
            "sha256": each.content,
            **({} if each.steps is None else {"steps": each.steps}),
            **({} if each.guidance is None else {"guidance": each.guidance}),
            **each.record,
            "stores": {where: store.folder.name for where, store in each.stores.items()},
        }
        for each in drawn
    }
