"""The command `fastgen gallery`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fastgen.cli_evaluate import MOST_STEPS
from fastgen.errors import UserError
from fastgen.files import check_writable_file, write_atomically

_COUNTING = "Counting votes"


def gallery(
    models: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="STUDENT...", help="Exported students; also diffusers folders or hub ids. With --count, files of votes."),
    ] = None,
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="A prompt a line, or .jsonl, .csv or .tsv with prompt, caption or text."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="The page, .html; with --count, the counts as JSON."),
    ] = None,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, max=MOST_STEPS, metavar="N", help="Steps of the models, but the teacher (default: their own)."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="Pictures of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**48, help="Seed of the first row; the next ones count up.")] = 0,
    teacher_dir: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--teacher", metavar="DIR", help="The folder of the students' teacher, where it is not found."),
    ] = None,
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="Do not draw with the first student's teacher.")] = False,
    blind: Annotated[bool, typer.Option("--blind", help="Hide and shuffle the models, and collect votes; a key is written beside the page.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, metavar="N", help="Pictures drawn at once.")] = 4,
    device: Annotated[str, typer.Option(metavar="NAME", help="Where pictures are drawn: auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a page that is there, and its key.")] = False,
    count: Annotated[bool, typer.Option("--count", help="Count votes: the arguments are files from a page.", rich_help_panel=_COUNTING)] = False,
    key: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="The key of the page that they are about.", rich_help_panel=_COUNTING),
    ] = None,
) -> None:
    """One page with teacher and students side by side for each prompt, from the same noise; blind, with votes."""
    if count:
        if prompts is not None or blind:
            raise UserError(f"--count: counts votes and draws nothing; remove {'--blind' if blind else '--prompts'}")
        _count([Path(file) for file in models or []], key, output)
        return
    if key is not None:
        raise UserError("--key: needs --count")
    if not models:
        raise UserError("STUDENT: missing: name one exported student or more")
    if prompts is None:
        raise UserError("--prompts: missing: a file with a prompt a line")
    if output is None:
        raise UserError("--output: missing: the page to write, such as gallery.html")
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output: {str(output)!r} must end in .html")
    if no_teacher and teacher_dir is not None and not _has_adapter(models):
        raise UserError("--teacher: says where a teacher is, and --no-teacher draws without: give either")
    options = {"steps": steps, "teacher": not no_teacher, "teacher_dir": teacher_dir, "blind": blind, "batch_size": batch_size}
    _write(models, prompts, output, samples, seed, device=device, overwrite=overwrite, **options)


def _write(models: list[str], prompts: Path, output: Path, samples: int, seed: int, *, device: str, **options: Any) -> None:
    from fastgen import terminal
    from fastgen.gallery import read_rows, write_gallery
    from fastgen.parallel import choose_device

    check_writable_file(output, "--output")
    place, rows, progress = choose_device(device, "--device"), read_rows(prompts, samples, seed), terminal.progress()
    written = write_gallery(models, rows, output, device=place, progress=progress, **options)
    for name, path in zip(("gallery", "key"), written, strict=False):
        terminal.note(f"{name}: {path}")


def _has_adapter(models: list[str]) -> bool:
    """Which needs its teacher to draw."""
    from fastgen.evaluation.subjects.found import is_student
    from fastgen.files import expanded
    from fastgen.generator import read_manifest

    return any(is_student(model) and read_manifest(expanded(model))["weights"] == "lora" for model in models)


def _count(files: list[Path], key: Path | None, output: Path | None) -> None:
    from fastgen import terminal
    from fastgen.votes import count_votes, tally_table

    if not files:
        raise UserError("--count: missing: one file of votes or more, as a page's button saves it")
    if key is None:
        raise UserError("--key: missing: the .key.json file that was written beside the page")
    if output is not None:
        check_writable_file(output, "--output")
    tally = count_votes(files, key)
    terminal.echo(tally_table(tally))
    if output is not None:
        write_atomically(output, json.dumps(tally, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        terminal.note(f"counts: {output}")
