"""The command `fastgen straightness`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from fastgen.cli_evaluate import MOST_STEPS
from fastgen.errors import UserError

if TYPE_CHECKING:
    from fastgen.generator import ImageGenerator
    from fastgen.straightness import Straightness

_TEACHER = "recipe key teacher.pretrained"


def straightness(
    teacher: Annotated[
        str, typer.Argument(metavar="TEACHER", help="fastgen:NAME, toy:NAME, a diffusers folder, a hub id, or an exported student's folder.")
    ],
    guidance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="W", help="Classifier-free guidance, 1 is none (default: the teacher's own)."),
    ] = None,
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="As data.prompts of a recipe (default: a bundled teacher's own; of toy teachers, none)."),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, max=10**7, metavar="N", help="Trajectories.")] = 128,
    steps: Annotated[int, typer.Option(min=2, max=MOST_STEPS, metavar="K", help="Steps of each, Heun's: two evaluations a step.")] = 32,
    seed: Annotated[int, typer.Option(min=0, max=2**48, help="Of prompts and noise.")] = 0,
    batch: Annotated[int, typer.Option(min=1, max=4096, metavar="N", help="Trajectories at once.")] = 16,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.")] = "auto",
    teacher_dir: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--teacher", metavar="DIR", help="The folder of an adapter's teacher, where it is not found."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say how straight a model's flow is, and whether reflow has something to straighten."""
    from fastgen import straightness as measuring
    from fastgen import terminal

    if guidance is not None and not 1 <= guidance < math.inf:
        raise UserError(f"--guidance: {guidance:g} is not a number from 1 (no guidance) up")
    weights, progress = _prompts(teacher, prompts, guidance), terminal.progress()
    progress.stage(f"loading {teacher}")
    generator = _load(teacher, guidance, device, teacher_dir)
    for warning in generator.family.legibility(list(weights)).check("--prompts"):
        progress.warn(f"warning: {warning}")
    found = measuring.straightness(generator, weights, samples=samples, steps=steps, seed=seed, batch=batch, progress=progress)
    if as_json:
        terminal.print_json({"model": teacher, **asdict(found), "verdict": measuring.verdict(found)})
        return
    for line in [_heading(teacher, found), *_lines(found), measuring.verdict(found)]:
        terminal.note(line)


def _prompts(teacher: str, file: Path | None, guidance: float | None) -> dict[str, float]:
    """Prompts and their weights."""
    from fastgen.data.prompts import KEY, load_prompts
    from fastgen.families import is_hub_id, resolve_source

    toy = teacher.startswith("toy:")
    if file is not None:
        with _said_as(KEY, "--prompts"):
            return load_prompts(str(file))
    if not toy and not is_hub_id(teacher):  # which would be fetched
        with _said_as(_TEACHER, "TEACHER"):
            resolve_source(teacher)
    if teacher.startswith("fastgen:"):
        return load_prompts(teacher)  # a bundled teacher's prompts have its name
    if not toy:
        raise UserError("--prompts: missing: a file with a prompt a line, or a bundled teacher's name (fastgen:digits) for its own")
    if guidance not in (None, 1):
        raise UserError("--prompts: missing: a file with a component's number a line; guidance does nothing without")
    return {"": 1.0}


def _load(teacher: str, guidance: float | None, device: str, teacher_dir: str | None) -> ImageGenerator:
    from fastgen import terminal
    from fastgen.evaluation.subjects.found import is_student
    from fastgen.files import expanded
    from fastgen.generator import load_student, load_teacher, read_manifest
    from fastgen.parallel import choose_device

    place = choose_device(device, "--device")
    if not is_student(teacher):
        if teacher_dir is not None:
            raise UserError(f"--teacher: says where an adapter's teacher is, and {teacher!r} is no exported student")
        with _said_as(_TEACHER, "TEACHER"):
            return load_teacher(teacher, guidance=guidance, device=place)
    if guidance is not None:
        raise UserError("--guidance: does not apply to an exported student, whose fastgen.json says how it is called")
    manifest = read_manifest(expanded(teacher))
    if manifest.get("own_steps_only"):
        raise UserError(f"TEACHER: {teacher!r} is a student that serves its own {manifest['steps']} steps alone, so it has no flow to follow")
    terminal.warn(f"made by {manifest['method']}; this says something of students whose method learns velocities at all times, and of others nothing")
    return load_student(expanded(teacher), device=place, teacher_dir=teacher_dir)


@contextmanager
def _said_as(key: str, argument: str) -> Iterator[None]:
    """A recipe's mistakes as the command's own."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(key, argument)) from error


def _heading(model: str, found: Straightness) -> str:
    noise = "pure noise" if found.noise_end == 1 else f"flow time {found.noise_end:.4g}"
    guidance = "no guidance" if found.guidance == 1 else f"guidance {found.guidance:g}"
    return f"{model}, {guidance}: {found.samples} trajectories from {noise} to data in {found.steps} steps of Heun's"


def _lines(found: Straightness) -> list[str]:
    def line(name: str, value: Any, error: Any, what: str) -> str:
        return f"  {name:14s}{value:8.4f} ± {error:.4f}   {what}"

    rows = [
        line("straightness", found.straightness, found.straightness_error, "0 is straight; squared distance to the line, over E||Z1 - Z0||^2"),
        line("one step", found.one_step, found.one_step_error, "squared error of one Euler step, over the variance of the samples"),
    ]
    if found.crossing is None:
        return [*rows, "  crossing and residual are left out: with guidance the velocity is no mean of lines"]
    return [
        *rows,
        line("crossing", found.crossing, found.crossing_error, "of lines from noise to samples drawn apart, over E||Z1 - Z0||^2"),
        line("residual", found.residual, found.residual_error, "0 where the field is exact for its own samples"),
    ]
