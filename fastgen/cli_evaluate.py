"""The command `fastgen evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fastgen.errors import UserError
from fastgen.files import check_folder, check_writable_file

MOST_STEPS = 1000  # as student.steps of a recipe
# Headings of the help.
_FILES = "Files"
_OWN = "Instead of a protocol"
_STOCK = "How a model is called (default: as it is made for)"
_PROGRAMS = "Metrics of other programs"
_COMPARISON = "Instead of MODEL"


def evaluate(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="MODEL", help="An exported student, a diffusers folder or hub id, or a folder of pictures."),
    ] = None,
    protocol: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="How to measure: a shipped protocol (fastgen protocols list) or a .yaml file (default: digits)."),
    ] = None,
    steps: Annotated[Optional[str], typer.Option(metavar="N,...", help="Step counts of the model, such as 1,2,4 (default: its own).")] = None,  # noqa: UP045
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="Do not measure the student's teacher.")] = False,
    teacher_dir: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--teacher", metavar="DIR", help="The student's teacher, where it is not found; of another model, a pipeline to compare with."),
    ] = None,
    teacher_steps: Annotated[Optional[str], typer.Option(metavar="N,...", help="Step counts of the teacher (default: its own).")] = None,  # noqa: UP045
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Results (default: results.json beside a student, else NAME.results.json here)."),
    ] = None,
    stop_after: Annotated[Optional[int], typer.Option(min=1, metavar="N", help="A quick look at the first N pictures of each set.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(metavar="NAME", help="Where pictures and features are made: auto, cpu, cuda or cuda:N.")] = "auto",
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, max=4096, metavar="N", help="Pictures drawn at once (default: the protocol's)."),
    ] = None,
    part: Annotated[str, typer.Option(metavar="i/n", help="Draw one of n parts; results are written once all are there.")] = "1/1",
    data_dir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="Where prompt files and references lie that a protocol names.", rich_help_panel=_FILES),
    ] = None,
    weights_dir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="Where the weights of feature extractors lie.", rich_help_panel=_FILES),
    ] = None,
    store: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="Where features are kept (default: ~/.cache/fastgen/evaluations).", rich_help_panel=_FILES),
    ] = None,
    dump: Annotated[Optional[Path], typer.Option(metavar="DIR", help="Keep the pictures too, here.", rich_help_panel=_FILES)] = None,  # noqa: UP045
    dump_form: Annotated[str, typer.Option(metavar="png|parquet", help="As what they are kept.", rich_help_panel=_FILES)] = "png",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read reference statistics from EDM2's pickles, numbers alone.", rich_help_panel=_FILES)
    ] = False,
    prompts: Annotated[Optional[Path], typer.Option(metavar="FILE", help="The prompts to draw.", rich_help_panel=_OWN)] = None,  # noqa: UP045
    images: Annotated[Optional[Path], typer.Option(metavar="DIR", help="The real pictures to compare with.", rich_help_panel=_OWN)] = None,  # noqa: UP045
    count: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, max=10**7, metavar="N", help="How many pictures (default: one a prompt).", rich_help_panel=_OWN),
    ] = None,
    guidance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="W", help="Classifier-free guidance.", rich_help_panel=_STOCK),
    ] = None,
    size: Annotated[Optional[str], typer.Option(metavar="HxW", help="Of its pictures; of a student, one of its own.", rich_help_panel=_STOCK)] = None,  # noqa: UP045
    max_sequence_length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, metavar="N", help="Tokens of a prompt that it reads.", rich_help_panel=_STOCK),
    ] = None,
    call: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="NAME=VALUE", help="Another argument of its call; may be given several times.", rich_help_panel=_STOCK),
    ] = None,
    revision: Annotated[Optional[str], typer.Option(metavar="NAME", help="Of a hub id.", rich_help_panel=_STOCK)] = None,  # noqa: UP045
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Of a pipeline's weights, or a student's: fp32 (default), fp16 or bf16.", rich_help_panel=_STOCK),
    ] = None,
    captions: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="What the pictures of a folder were drawn for (default: what lies beside them).", rich_help_panel=_STOCK),
    ] = None,
    external: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="NAME=COMMAND",
            help="A program that scores pictures, such as image_reward='/envs/ir/bin/python score.py'; may be given several times.",
            rich_help_panel=_PROGRAMS,
        ),
    ] = None,
    external_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="That such a program may take.", rich_help_panel=_PROGRAMS)] = 3600.0,
    compare: Annotated[
        Optional[tuple[Path, Path]],  # noqa: UP045
        typer.Option(metavar="A.json B.json", help="What two results files of one protocol differ in, with intervals.", rich_help_panel=_COMPARISON),
    ] = None,
    resamples: Annotated[
        int, typer.Option(min=10, max=10**5, metavar="N", help="How often pictures are drawn again.", rich_help_panel=_COMPARISON)
    ] = 100,
) -> None:
    """Measure a model, and a student's teacher, and write results.json. Killed, the same command goes on."""
    from fastgen import run, terminal
    from fastgen.evaluation.dumps import DumpFolder
    from fastgen.evaluation.external import externals
    from fastgen.evaluation.extractors.base import Resources
    from fastgen.evaluation.own import protocol_of
    from fastgen.evaluation.settings import Settings, part_of
    from fastgen.evaluation.subjects.found import Asked
    from fastgen.evaluation.weights import Weights

    progress = terminal.progress()
    check_folder(data_dir, "--data-dir")
    check_folder(weights_dir, "--weights-dir")
    resources = Resources(Weights(weights_dir), data_dir=data_dir, external=externals(external or [], external_timeout))
    if compare is not None:
        if model is not None:
            raise UserError(f"--compare takes two results files and no model, got {model!r} as well")
        named = any(each is not None for each in (protocol, prompts, images, count))
        of = protocol_of(protocol, prompts=prompts, images=images, count=count, data_dir=data_dir) if named else None
        _compare(compare, output, of, Settings(store, allow_pickle=allow_pickle), resources, resamples, progress)
        return
    if model is None:
        raise UserError("MODEL: missing: name what to measure, or two results files with --compare")
    counts, teacher_counts = _counts("--steps", steps), _counts("--teacher-steps", teacher_steps)
    target = output or run.results_file(model, size=size_of(size))
    check_writable_file(target, "--output")
    asked = Asked(guidance, size_of(size), max_sequence_length, _arguments(call or []), revision, dtype, captions)
    try:
        results = run.evaluate(
            model,
            protocol=protocol_of(protocol, model=model, prompts=prompts, images=images, captions=captions, count=count, data_dir=data_dir),
            steps=counts,
            output=target,
            teacher=not no_teacher,
            teacher_steps=teacher_counts,
            teacher_dir=teacher_dir,
            device=device,
            resources=resources,
            asked=asked,
            settings=Settings(store, part_of(part), stop_after, batch_size, allow_pickle),
            dump=None if dump is None else DumpFolder(dump, dump_form),
            progress=progress,
        )
    except run.PartDone as done:
        terminal.note(f"part {part}: {done}")
        return
    terminal.print_results(results)
    terminal.note(f"results: {target}")


def _compare(files: tuple[Path, Path], output: Path | None, protocol: Any, settings: Any, resources: Any, resamples: int, progress: Any) -> None:
    from fastgen import terminal
    from fastgen.evaluation.compare import compare_files
    from fastgen.evaluation.compare_table import comparison_table

    if output is not None:
        check_writable_file(output, "--output")
    options: Any = {"settings": settings, "resources": resources, "resamples": resamples, "progress": progress}
    terminal.echo(comparison_table(compare_files(*files, protocol=protocol, output=output, **options)))
    if output is not None:
        terminal.note(f"comparison: {output}")


def size_of(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and 0 < int(height) < 2**16 and 0 < int(width) < 2**16):
        raise UserError(f"--size: {text!r} is not HEIGHTxWIDTH in pixels, such as 1024x1024")
    return int(height), int(width)


def _arguments(given: list[str]) -> dict[str, Any]:
    """Arguments of a call from NAME=VALUE, whose values are read as YAML."""
    from fastgen.yaml_files import parse

    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--call: {text!r} is not NAME=VALUE, such as negative_prompt=blurry")
        try:
            found[name] = parse(value)
        except ValueError as error:
            raise UserError(f"--call {name}: the value is not valid YAML: {error}") from error
    return found


def _counts(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= MOST_STEPS for part in parts):
        raise UserError(f"{option}: {text!r} is not a list of step counts from 1 to {MOST_STEPS}, such as 1,2,4")
    counts = [int(part) for part in parts]
    if twice := [count for count in counts if counts.count(count) > 1]:
        raise UserError(f"{option}: {twice[0]} is given twice")
    return counts
