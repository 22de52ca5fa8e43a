"""The line of products: a trained run's student exported, verified, measured and reported."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastgen import checkpoint, inputs, report
from fastgen.config import Recipe, validate
from fastgen.distillers.base import Distiller
from fastgen.errors import UserError
from fastgen.evaluation.block import PROTOCOL, resources_of
from fastgen.export import Expert, Verification, drawn_at_every_size, export_lora, export_student, trained_error, verify
from fastgen.files import remove, writing
from fastgen.fingerprints import digest, folder_hash
from fastgen.plan import plan
from fastgen.progress import Once, Progress
from fastgen.run.building import Run, build
from fastgen.run.evaluating import Measurement
from fastgen.run.folder import RunFolder, check_parents, plain

# What pictures in [0, 1] of the trained and of the exported student may differ by: rounding in single precision, and where either rounds to less.
_EXACT, _ROUNDED = 1e-3, 5e-2


def finish(run: Run, folder: RunFolder, progress: Progress) -> None:
    """Everything that comes after training. UserError where the student cannot be measured: it lies there whole, with a report that says so,
    and run.json says why under `unmeasured`."""
    student_dir, members = folder.path / "student", run.parallel.members
    student = None if run.plan.cut is None else run.averaged()  # whose parts all processes have
    members.lone(lambda: _make_student(run, folder, student_dir, progress, student))
    measurement = _measurement(run, folder.path, progress)
    if measurement is not None:
        measurement.draw_parts(members)
    members.lone(lambda: _measure_and_report(measurement, folder, progress))


def _measure_and_report(measurement: Measurement | None, folder: RunFolder, progress: Progress) -> None:
    student_dir = folder.path / "student"
    folder.note(unmeasured=None if measurement is None else "its measuring has not come to an end")
    try:
        if measurement is not None:
            measurement.results()
    except UserError as error:
        with suppress(UserError):  # of a disk that takes no results, say
            folder.note(unmeasured=str(error))
            report.write_report(folder.path)
        raise UserError(
            f"recipe key {PROTOCOL}: the student in {str(student_dir)!r} is whole, but could not be measured: {error}; the same command with "
            "--resume goes on from there"
        ) from error
    folder.note(unmeasured=None)
    progress.stage("writing the report")
    report.write_report(folder.path)


def _make_student(run: Run, folder: RunFolder, student_dir: Path, progress: Progress, student: list[Expert] | None = None) -> None:
    """Export and verify, unless the student of this recipe and this checkpoint lies there, as it was verified. student: where it is averaged
    already."""
    source = digest([checkpoint.identity(folder.path), run.plan.resolved()])
    with suppress(UserError):  # there is none, or none that can be read
        if folder.noted("student") == {"source": source, "sha256": folder_hash(student_dir)}:
            progress.stage(f"{student_dir} is exported and verified already")
            return
    progress.stage(f"exporting to {student_dir}")
    trained = _export(run, student_dir, run.plan.recipe.export.weights, student=student)
    with writing(folder.path):
        remove(folder.path / "results.json")  # of another student
    progress.stage("verifying in plain diffusers")
    result = verify(student_dir, trained=trained)
    require_verified(result, student_dir)
    assert result.trained_error is not None
    _check_as_trained(run, result.trained_error, student_dir, progress)
    folder.note(student={"source": source, "sha256": folder_hash(student_dir)})


def _measurement(run: Run, run_dir: Path, progress: Progress) -> Measurement | None:
    """The student beside its teacher, if the recipe asks for it."""
    if run.plan.protocol is None:
        return None
    return Measurement(
        str(run_dir / "student"),
        run.plan.protocol,
        run_dir / "results.json",
        run.parallel.device,
        teacher="teacher" in run.plan.roles,
        resources=resources_of(run.plan.recipe.evaluate),
        progress=Once(progress),
    )


def require_verified(result: Verification, folder: Path) -> None:
    """UserError when plain diffusers does not draw what we draw."""
    if not result.passed:
        raise UserError(
            f"{str(folder)!r}: plain diffusers differs from our sampler: grid by {result.grid_error:.2g}, pictures by {result.picture_error:.2g}"
        )


def _export(
    run: Run, output: Path, weights: Literal["full", "lora"], *, for_comfy: bool = False, student: list[Expert] | None = None
) -> list[Tensor]:
    """Write the averaged student; what it drew before, at every size."""
    student = run.averaged() if student is None else student
    trained = drawn_at_every_size(run.generator("student", student), run.examples)  # now, for adapters are merged where they are
    run.plan.family.free_encoders()
    _write_student(run, output, weights, for_comfy=for_comfy, student=student)
    return trained


def _check_as_trained(run: Run, error: float, student_dir: Path, progress: Progress) -> None:
    """UserError for an export that draws something else than the networks which were trained; a warning where rounding alone may do that much."""
    if error <= (_ROUNDED if (rounds := _rounds(run)) else _EXACT):
        return
    said = f"{str(student_dir)!r}: draws other pictures than the network that was trained, by {error:.2g} (root mean square)"
    if not rounds:
        raise UserError(said)
    progress.warn(f"warning: {said}; in half precision steps may drift so far apart, but look at its samples")


def _rounds(run: Run) -> bool:
    """Whether training and export need not compute the same to single precision."""
    plan, export = run.plan, run.plan.recipe.export
    stored = plan.storage.quantise is not None or plan.storage.dtype == "bf16"
    narrow = stored or plan.autocast is not None or export.dtype != "fp32" or plan.frozen_dtype != torch.float32
    return narrow or run.parallel.device.type != "cpu"


def _write_student(run: Run, output: Path, weights: Literal["full", "lora"], *, for_comfy: bool, student: list[Expert]) -> Path:
    family, info = run.plan.family, run.info()
    if weights == "lora":
        return export_lora(student, family, info, output, for_comfy=for_comfy)
    return export_student(student, family, info, output, dtype=run.plan.recipe.export.dtype)


def export(
    run_dir: Path,
    output: Path,
    *,
    weights: Literal["full", "lora"] | None = None,
    unfinished: bool = False,
    for_comfy: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Export the averaged student of a run's newest checkpoint; fastgen.json and the card say so where it trains on after that. weights:
    None for the form that the run's recipe names. for_comfy: the adapter, and the same for other programs, which plain diffusers then reads back.

    UserError for a student none of whose steps have been trained, and, unless `unfinished`, for one that is no good before its own
    training is over, such as the expert of a phase; and where what was written, which then lies there, draws something else than what was trained.
    """
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{str(run_dir)!r} holds no run (no recipe.yaml)")
    output = plain(output)
    check_parents(output)
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / "fastgen.json").is_file())):
        raise UserError(f"--output: {str(output)!r} exists and is no exported student; choose a new folder")
    chosen, state = checkpoint.opened(run_dir)
    # The machine that exports need not be the one that trained, nor are there its processes.
    state["recipe"]["train"] |= {"device": "auto", "shard": "auto", "mesh": None}
    planned = inputs.as_begun(plan(validate(Recipe, state["recipe"]), only="export", started=True), inputs.Inputs(state["inputs"]))
    inputs.check_teacher(state["inputs"], planned)
    if for_comfy and weights == "full":
        raise UserError("--comfy: writes the student's adapter for other programs, and --full merges it; leave out one of them")
    if for_comfy or weights == "lora":
        planned.check_lora("--comfy" if for_comfy else "--lora")
        weights = "lora"
    run = build(planned, Progress())
    _check_trained(run.trainer.distiller, state["step"], run_dir, unfinished=unfinished)
    run.began = inputs.Inputs(state["inputs"])
    checkpoint.load(chosen, run.trainer, state)
    trained = _export(run, output, weights or planned.recipe.export.weights, for_comfy=for_comfy)
    teacher = planned.recipe.teacher
    teacher_dir = teacher.pretrained if teacher.revision is None else None
    if for_comfy:
        require_verified(verify(output, teacher_dir=teacher_dir), output)
    _check_as_trained(run, trained_error(output, trained, teacher_dir), output, progress or Progress())
    return output


def _check_trained(distiller: Distiller, step: int, run_dir: Path, *, unfinished: bool) -> None:
    students = [(role, distiller.period(role), *distiller.trained(role, step)) for role, _ in distiller.students()]
    for role, period, done, count in students:
        if done == 0 < count:
            raise UserError(
                f"{str(run_dir)!r}: {period} has not begun at step {step}, so {role} is still what the run started from; go on with "
                "fastgen train … --resume"
            )
    for role, period, done, count in students:
        if not (unfinished or distiller.finished(role, step)):
            raise UserError(
                f"{str(run_dir)!r}: {period} is not over at step {step}, so {role} has trained {done} of its {count} steps; go on with "
                "fastgen train … --resume, or pass --unfinished to export it as it is"
            )
