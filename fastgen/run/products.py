"""The line of products: a trained run's student exported, verified, measured and reported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fastgen import checkpoint, inputs, report
from fastgen.config import Recipe, validate
from fastgen.distillers.base import Distiller
from fastgen.errors import UserError
from fastgen.evaluation import runner
from fastgen.evaluation.protocols import load_protocol
from fastgen.export import Verification, export_lora, export_student, verify
from fastgen.families import resolve_source
from fastgen.fingerprints import folder_hash
from fastgen.generator import ImageGenerator, load_student, load_teacher_of, read_manifest, teacher_source
from fastgen.plan import plan
from fastgen.progress import Progress
from fastgen.run.building import Run, build
from fastgen.run.folder import check_parents, plain


def finish(run: Run, run_dir: Path, progress: Progress) -> None:
    student_dir = run_dir / "student"
    progress.stage(f"exporting to {student_dir}")
    _write_student(run, student_dir, run.plan.recipe.export.weights)
    progress.stage("verifying in plain diffusers")
    require_verified(verify(student_dir), student_dir)
    protocol = run.plan.recipe.evaluate.protocol
    if protocol is not None:
        device, has_teacher = str(run.parallel.device), "teacher" in run.roles
        evaluate(student_dir, protocol=protocol, output=run_dir / "results.json", teacher=has_teacher, device=device, progress=progress)
    progress.stage("writing the report")
    report.write_report(run_dir)


def require_verified(result: Verification, folder: Path) -> None:
    """UserError when plain diffusers does not draw what we draw."""
    if not result.passed:
        raise UserError(
            f"{str(folder)!r}: plain diffusers differs from our sampler: grid by {result.grid_error:.2g}, pictures by {result.picture_error:.2g}"
        )


def _write_student(run: Run, output: Path, weights: Literal["full", "lora"]) -> Path:
    student, family, info = run.averaged(), run.plan.family, run.info()
    if weights == "lora":
        return export_lora(student, family, info, output)
    return export_student(student, family, info, output, dtype=run.plan.recipe.export.dtype)


def export(run_dir: Path, output: Path, *, weights: Literal["full", "lora"] | None = None, unfinished: bool = False) -> Path:
    """Export the averaged student of a run's newest checkpoint; fastgen.json and the card say so where it trains on after that. weights:
    None for the form that the run's recipe names.

    UserError for a student none of whose steps have been trained, and, unless `unfinished`, for one that is no good before its own
    training is over, such as the expert of a phase.
    """
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{str(run_dir)!r} holds no run (no recipe.yaml)")
    output = plain(output)
    check_parents(output)
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / "fastgen.json").is_file())):
        raise UserError(f"--output: {str(output)!r} exists and is no exported student; choose a new folder")
    chosen, state = checkpoint.opened(run_dir)
    state["recipe"]["train"]["device"] = "auto"  # the machine that exports need not be the one that trained
    planned = plan(validate(Recipe, state["recipe"]), started=True)
    inputs.check_teacher(state["inputs"], planned)
    if weights == "lora":
        planned.check_lora("--lora")
    run = build(planned, Progress())
    _check_trained(run.trainer.distiller, state["step"], run_dir, unfinished=unfinished)
    run.began = inputs.Inputs(state["inputs"])
    checkpoint.load(chosen, run.trainer, state)
    return _write_student(run, output, weights or planned.recipe.export.weights)


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


def evaluate(
    student_dir: str | Path,
    *,
    protocol: str = "digits",
    steps: Sequence[int] | None = None,
    output: str | Path | None = None,
    teacher: bool = True,
    teacher_steps: Sequence[int] | None = None,
    teacher_dir: str | Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure an exported student and, unless `teacher=False`, its teacher (cached), and write results.json; returns its content.

    steps: step counts of the student (default: its own); teacher_steps: of the teacher (default: its own); teacher_dir: where the teacher
    is, unless the student's fastgen.json or the run that it lies in says so.
    """
    progress, folder = progress or Progress(), Path(student_dir)
    manifest = read_manifest(folder)
    measured, student = load_protocol(protocol), load_student(folder, device=device, teacher_dir=teacher_dir)
    source = teacher_source(folder, manifest["teacher"], teacher_dir) if teacher else None  # before the student is measured
    for count in steps or []:
        student.times(count)  # refuses counts that the student was not made for before anything is measured
    progress.stage(f"measuring {folder} with protocol {protocol}")
    rows = measure(measured, student, "student", steps or [student.steps], progress)
    if source is not None:
        base = load_teacher_of(folder, device=device, teacher_dir=teacher_dir)
        weights = folder_hash(resolve_source(*source))
        rows += _teacher_rows(measured, base, weights, manifest["teacher"], teacher_steps or [base.steps], progress)
    rows += runner.cached(f"floors/{measured.hash()}/{measured.extractor_hash()}", measured.floors)
    provenance = runner.provenance(measured, device=device, model_hash=folder_hash(folder))
    if "unfinished" in manifest:
        provenance["unfinished"] = manifest["unfinished"]
    runner.write_results(output or folder / "results.json", protocol, rows, provenance)
    return {"protocol": protocol, "metrics": rows, "provenance": provenance}


def _teacher_rows(
    protocol: Any, teacher: ImageGenerator, weights: str, source: dict[str, Any], steps: Sequence[int], progress: Progress
) -> list[Any]:
    """The teacher's rows, measured once for each weights, protocol, guidance and sampling grid."""
    settings = {key: value for key, value in source.items() if key not in ("pretrained", "revision", "sha256")}  # who it is, the weights say
    rows = []
    for count in steps:
        options, times = teacher.family.options, teacher.times(count).tolist()
        key = json.dumps([weights, protocol.hash(), protocol.extractor_hash(), settings, teacher.guidance, options, times, str(teacher.device)])
        rows += runner.cached(key, lambda count=count: measure(protocol, teacher, "teacher", [count], progress))
    return rows


def measure(protocol: Any, generator: ImageGenerator, model: str, steps: Sequence[int], progress: Progress) -> list[Any]:
    """Rows of one model at each step count, with a progress bar."""
    total = len(steps) * sum(len(subset.prompts) for subset in protocol.subsets.values())
    progress.start(f"measuring the {model}", total)
    try:
        return runner.run_protocol(
            protocol, generator, model=model, steps=steps, guidance=generator.guidance, progress=lambda done, total, what: progress.update(done, {})
        )
    finally:  # a bar left running hides the terminal's cursor
        progress.finish()
