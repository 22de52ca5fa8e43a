"""The line of products: a trained run's student exported, verified, measured and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastgen import checkpoint, inputs, report
from fastgen.config import Recipe, validate
from fastgen.distillers.base import Distiller
from fastgen.errors import UserError
from fastgen.export import Verification, export_lora, export_student, verify
from fastgen.foresight import resources_of
from fastgen.plan import plan
from fastgen.progress import Progress
from fastgen.run.building import Run, build
from fastgen.run.evaluating import evaluate
from fastgen.run.folder import check_parents, plain


def finish(run: Run, run_dir: Path, progress: Progress) -> None:
    student_dir = run_dir / "student"
    progress.stage(f"exporting to {student_dir}")
    _write_student(run, student_dir, run.plan.recipe.export.weights)
    progress.stage("verifying in plain diffusers")
    require_verified(verify(student_dir), student_dir)
    block = run.plan.recipe.evaluate
    if block.protocol is not None:
        evaluate(
            student_dir,
            protocol=block.protocol,
            output=run_dir / "results.json",
            teacher="teacher" in run.roles,
            device=str(run.parallel.device),
            resources=resources_of(block),
            progress=progress,
        )
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
