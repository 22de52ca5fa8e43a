"""The command `fastgen evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fastgen.errors import UserError
from fastgen.files import check_writable_file

MOST_STEPS = 1000  # as student.steps of a recipe


def evaluate(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[MODEL]", help="An exported student, a diffusers folder or hub id, or a folder of pictures."),
    ] = None,
    protocol: Annotated[Optional[str], typer.Option(help="How to measure: a shipped protocol or a .yaml file (default: digits).")] = None,  # noqa: UP045
    prompts: Annotated[Optional[Path], typer.Option(help="Instead of a protocol: a file with prompts.")] = None,  # noqa: UP045
    images: Annotated[Optional[Path], typer.Option(help="Instead of a protocol's reference: a folder of real pictures.")] = None,  # noqa: UP045
    count: Annotated[Optional[int], typer.Option(min=1, max=10**7, help="With --prompts or --images: how many pictures.")] = None,  # noqa: UP045
    steps: Annotated[Optional[str], typer.Option(help="Step counts of the model, such as 1,2,4 (default: its own).")] = None,  # noqa: UP045
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Results file (default: results.json beside a student, else NAME.results.json here)."),
    ] = None,
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="Do not measure the student's teacher.")] = False,
    teacher_dir: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--teacher", metavar="DIR", help="The student's teacher, where it is not found; of another model, a pipeline to compare with."),
    ] = None,
    teacher_steps: Annotated[Optional[str], typer.Option(help="Step counts of the teacher (default: its own).")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="Where pictures and features are made: auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[Optional[str], typer.Option(help="Of the model: fp32 (default), fp16 or bf16.")] = None,  # noqa: UP045
    batch_size: Annotated[Optional[int], typer.Option(min=1, max=4096, help="Pictures drawn at once (default: the protocol's).")] = None,  # noqa: UP045
    data_dir: Annotated[Optional[Path], typer.Option(help="Folder of prompt files and references that a protocol names.")] = None,  # noqa: UP045
    weights_dir: Annotated[Optional[Path], typer.Option(help="Folder of extractors' weights.")] = None,  # noqa: UP045
    store: Annotated[Optional[Path], typer.Option(help="Folder of features (default: ~/.cache/fastgen/evaluations).")] = None,  # noqa: UP045
    part: Annotated[str, typer.Option(metavar="i/n", help="Draw one of n parts; results are written once all are there.")] = "1/1",
    stop_after: Annotated[Optional[int], typer.Option(min=1, help="A quick look at the first N pictures of each set.")] = None,  # noqa: UP045
    guidance: Annotated[Optional[float], typer.Option(help="Of a stock pipeline: classifier-free guidance (default: its own).")] = None,  # noqa: UP045
    size: Annotated[Optional[str], typer.Option(metavar="HxW", help="Of a stock pipeline (default: its own).")] = None,  # noqa: UP045
    max_sequence_length: Annotated[Optional[int], typer.Option(min=1, help="Of a stock pipeline: tokens of a prompt (default: its own).")] = None,  # noqa: UP045
    call: Annotated[Optional[list[str]], typer.Option(metavar="NAME=VALUE", help="Of a stock pipeline: another argument of its call.")] = None,  # noqa: UP045
    revision: Annotated[Optional[str], typer.Option(help="Of a hub id.")] = None,  # noqa: UP045
    captions: Annotated[Optional[Path], typer.Option(help="Of a folder of pictures: what they were drawn for.")] = None,  # noqa: UP045
    dump: Annotated[Optional[Path], typer.Option(help="Keep the pictures in this folder.")] = None,  # noqa: UP045
    dump_form: Annotated[str, typer.Option(help="png or parquet.")] = "png",
    external: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="NAME=COMMAND", help="A program that scores pictures, such as image_reward='/envs/ir/bin/python score.py'."),
    ] = None,
    external_timeout: Annotated[float, typer.Option(help="Seconds that such a program may take.")] = 3600.0,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read reference statistics from EDM2's pickles, numbers alone.")] = False,
    compare: Annotated[
        Optional[tuple[Path, Path]],  # noqa: UP045
        typer.Option(metavar="A.json B.json", help="Instead of MODEL: what two results files of one protocol differ in, with intervals."),
    ] = None,
    resamples: Annotated[int, typer.Option(min=10, max=10**5, help="Of --compare: how often pictures are drawn again.")] = 100,
) -> None:
    """Measure a model, and a student's teacher, and write results.json. Killed, the same command goes on."""
    from fastgen import run, terminal
    from fastgen.evaluation.dumps import DumpFolder
    from fastgen.evaluation.external import externals
    from fastgen.evaluation.extractors.base import Resources
    from fastgen.evaluation.own import protocol_of
    from fastgen.evaluation.runner import Settings, part_of, stores_folder
    from fastgen.evaluation.subjects.found import Asked
    from fastgen.evaluation.weights import Weights

    progress = terminal.progress()
    resources = Resources(Weights(weights_dir), data_dir=data_dir, external=externals(external or [], external_timeout))
    if compare is not None:
        if model is not None:
            raise UserError(f"--compare takes two results files and no model, got {model!r} as well")
        named = protocol is not None or prompts is not None or images is not None
        load = (lambda: protocol_of(protocol, prompts=prompts, images=images, data_dir=data_dir)) if named else None
        _compare(compare, output, load, Settings(stores_folder(store), allow_pickle=allow_pickle), resources, resamples, progress)
        return
    if model is None:
        raise UserError("MODEL: missing: name what to measure, or two results files with --compare")
    counts, teacher_counts = _counts("--steps", steps), _counts("--teacher-steps", teacher_steps)
    target = output or run.results_file(model)
    check_writable_file(target, "--output")
    asked = Asked(guidance, _size(size), max_sequence_length, _arguments(call or []), revision, dtype, captions)
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
            settings=Settings(stores_folder(store), part_of(part), stop_after, batch_size, allow_pickle),
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


def _size(text: str | None) -> tuple[int, int] | None:
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
    return [int(part) for part in parts]
