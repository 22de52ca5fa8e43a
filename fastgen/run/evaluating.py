"""Measuring a model by a protocol: a student beside its teacher, any diffusers pipeline, or pictures that are there already."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastgen.evaluation import results
from fastgen.evaluation.dumps import DumpFolder
from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.protocol import Protocol, load_protocol
from fastgen.evaluation.runner import Drawn, Evaluation, Settings, default_stores
from fastgen.evaluation.subjects.base import Subject
from fastgen.evaluation.subjects.found import Asked, subject_of
from fastgen.evaluation.subjects.generated import teacher_subject
from fastgen.files import expanded
from fastgen.generator import read_manifest, teacher_source
from fastgen.parallel import choose_device
from fastgen.portable import source_name
from fastgen.progress import Progress


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
    """Measure a model and, unless `teacher=False`, its teacher, one after the other, and write results.json; returns its content.

    model: an exported student, any diffusers folder or hub id, or a folder of pictures. steps: of the model (default: its own);
    teacher_steps: of the teacher (default: its own); teacher_dir: where a student's teacher is, unless its fastgen.json or the run that it
    lies in says so; for other models, the pipeline to compare with. resources: where weights and data lie. settings: where features are kept,
    so that the same call goes on where one was killed and draws nothing twice; PartDone where they name a part and others are not done.
    """
    progress, place = progress or Progress(), choose_device(device, "--device")
    resources = replace(resources or Resources(), device=place)
    protocol = protocol if isinstance(protocol, Protocol) else load_protocol(protocol, data_dir=resources.data_dir, key="--protocol")
    asked = asked or Asked()
    beside = _teacher(str(model), asked, teacher_dir, place) if teacher else None  # refuses before anything is measured
    target = results_file(str(model)) if output is None else Path(output)
    models = _subjects(subject_of(str(model), asked, device=place, teacher_dir=teacher_dir), steps)  # and this before a reference is read
    with contextlib.ExitStack() as stack:
        settings = settings or Settings(stack.enter_context(default_stores(progress)))
        evaluation = Evaluation(protocol, resources, settings, dump=dump, progress=progress)
        progress.stage(f"measuring {model} with protocol {protocol.name}")
        _draw(evaluation, models)
        if beside is not None:
            _draw(evaluation, _subjects(beside(), teacher_steps))
        if evaluation.left:
            raise PartDone(evaluation.left)
        rows = [*evaluation.rows(), *evaluation.floors()]
        origin = results.provenance(
            protocol,
            device=place,
            model_hash=evaluation.drawn[0].content,
            extractors=evaluation.extractor_hashes,
            reference=None if evaluation.reference is None else evaluation.reference.record,
            models=_records(evaluation.drawn),
        )
        if "unfinished" in (record := evaluation.drawn[0].record):
            origin["unfinished"] = record["unfinished"]
        return results.write_results(target, protocol.name, rows, origin, missing=evaluation.missing, stop_after=settings.stop_after)


def is_student(model: str) -> bool:
    return (expanded(model) / "fastgen.json").is_file()


def _teacher(model: str, asked: Asked, teacher_dir: str | Path | None, device: torch.device) -> Callable[[], Subject] | None:
    """What loads the model's teacher; None where there is none. UserError where a student's teacher is not found."""
    if is_student(model):
        teacher_source(expanded(model), read_manifest(expanded(model))["teacher"], teacher_dir)
        return lambda: teacher_subject(expanded(model), device=device, teacher_dir=teacher_dir)
    return None if teacher_dir is None else lambda: subject_of(str(teacher_dir), asked.of_teacher(), device=device, name="teacher")


def results_file(model: str) -> Path:
    """Where results go: beside a student, and otherwise into the current folder."""
    return expanded(model) / "results.json" if is_student(model) else Path(f"{source_name(model)}.results.json".replace("/", "_"))


def _subjects(model: Subject, steps: Sequence[int] | None) -> list[Subject]:
    """A model at each number of steps. UserError for one that it cannot take."""
    return [model] if steps is None else [model.at(count) for count in steps]


def _draw(evaluation: Evaluation, subjects: list[Subject]) -> None:
    """Draw each, after which it leaves memory: the next model may be large too."""
    while subjects:
        evaluation.draw(subjects.pop(0))
    gc.collect()


def _records(drawn: Sequence[Drawn]) -> dict[str, dict[str, Any]]:
    """What is known of each model in the rows, by its name and, where it has several, its number of steps; and what its stores are called,
    for comparisons."""
    names = [each.name for each in drawn]
    return {
        each.name if names.count(each.name) == 1 else f"{each.name}, {each.steps} steps": {
            **each.record,
            "stores": {where: store.folder.name for where, store in each.stores.items()},
        }
        for each in drawn
    }
