"""The command line. Exit status 0; 2 and one `error:` line for a user's mistake; 1 for training that failed; 128 + n for signal n."""

from __future__ import annotations

import io
import math
import os
import shlex
import sys
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from fastgen.cli_evaluate import MOST_STEPS, evaluate, size_of
from fastgen.cli_gallery import gallery
from fastgen.cli_straightness import straightness
from fastgen.errors import TrainingFailed, UserError, one_line
from fastgen.files import check_writable_file
from fastgen.printing import put

if TYPE_CHECKING:
    from fastgen.data.store import Store

app = typer.Typer(
    name="fastgen",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil diffusion and flow models into students that generate in one to four network evaluations.",
)
recipes_app = typer.Typer(help="List or show the recipes that come with fastgen.")
app.add_typer(recipes_app, name="recipes")
protocols_app = typer.Typer(help="List or show the protocols that come with fastgen.")
app.add_typer(protocols_app, name="protocols")
cache_app = typer.Typer(help="Draw once what several runs use.")
app.add_typer(cache_app, name="cache")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the bare name of a shipped recipe.")]
Overrides = Annotated[Optional[list[str]], typer.Argument(metavar="[key=value]...", help="Overrides, such as train.steps=50.")]  # noqa: UP045

TeacherDir = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--teacher", metavar="DIR", help="The folder of the student's teacher, where it is not found."),
]
# What the processes of a launcher may share; all else is for one.
SHARED = ("train", "evaluate", "cache")
_HEAD_START = 2.0  # seconds for rank 0 to say what all end with, before a launcher sees that another has ended, and ends it too

StudentDir = Annotated[Path, typer.Argument(metavar="STUDENT_DIR", help="An exported student.")]


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Annotated[Optional[Path], typer.Option(help="Run folder (default: runs/RECIPE).")] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the run folder.")] = False,
    resume_or_start: Annotated[bool, typer.Option("--resume-or-start", help="Resume where there is a run, else start: for job queues.")] = False,
    resume_from: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="step_N", help="Go on from this checkpoint; newer ones are kept aside."),
    ] = None,
    allow_change: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="KEY", help="A recipe key in which a resumed run may differ, such as optimizer.student.lr; recorded in the run."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the run folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print roles, parameters, memory and grid; write nothing.")] = False,
    only: Annotated[Optional[str], typer.Option(metavar="train", help="Stop after training: no export, evaluation or report.")] = None,  # noqa: UP045
) -> None:
    """Train, export, verify, evaluate and report, as the recipe says."""
    from fastgen import run, terminal
    from fastgen.config import Recipe

    folder = output or Path("runs") / Path(recipe).stem
    options: Any = {"resume": resume, "or_start": resume_or_start, "resume_from": resume_from, "allow_change": allow_change or []}
    options |= {"overwrite": overwrite, "only": _only(only)}
    if allow_change and not (resume or resume_or_start or resume_from):
        raise UserError("--allow-change: needs --resume, --resume-or-start or --resume-from")
    if dry_run:
        terminal.quiet()
        terminal.print_plan(run.dry_run(Recipe.load(recipe, overrides or []), folder, **options))
        return
    try:
        terminal.quiet()
        run.train(recipe, folder, overrides=overrides or [], progress=terminal.progress(log=sys.stdout), **options)
    except run.Interrupted as interrupted:
        words = ["fastgen", "train", recipe, *(overrides or []), "--output", str(folder), *(["--only", only] if only else [])]
        words += [f"--allow-change={key}" for key in allow_change or []]
        again = shlex.join([*words, "--resume-or-start" if resume_or_start else "--resume"])
        terminal.note(f"{interrupted}; checkpoint saved. To go on:")
        terminal.note(f"  {again}")
        raise typer.Exit(128 + interrupted.number) from None
    terminal.print_run(folder)


def _only(value: str | None) -> Literal["train"] | None:
    if value not in (None, "train"):
        raise UserError(f"--only: {value!r} is not a stage to stop after; allowed: train")
    return "train" if value else None


@app.command("plan")
def plan_memory(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="SIZE", help="Of the device, such as 24GB: whether the run fits, and if not, what would make it fit."),
    ] = None,
    processes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", min=1, help="How many processes share the run (train.shard), each on a device of its own; what is said is of one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say how much memory a recipe needs, stage by stage, from its teacher's configurations alone."""
    from fastgen import room, terminal
    from fastgen.config import Recipe

    terminal.quiet()
    limit = None if memory is None else room.bytes_of(memory)
    found = room.answer(Recipe.load(recipe, overrides or []), limit, terminal.progress(), processes=processes)
    terminal.print_json(found) if as_json else terminal.print_need(found)
    if found.get("fits") is False:
        raise typer.Exit(1)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder with a checkpoint.")],
    output: Annotated[Path, typer.Option(help="Folder of the exported student.")],
    lora: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--lora/--full", help="Write the LoRA adapter alone, or the whole pipeline (default: as the recipe's export.weights says)."),
    ] = None,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Also a student whose phase has begun and is not over.")] = False,
    comfy: Annotated[
        bool, typer.Option("--comfy", help="Write the LoRA adapter, and the same for ComfyUI and other programs; diffusers reads it back.")
    ] = False,
) -> None:
    """Write the averaged student of a run's newest checkpoint as a diffusers pipeline."""
    from fastgen import card, run, terminal
    from fastgen.generator import read_manifest

    terminal.quiet()
    weights: Any = None if lora is None else "lora" if lora else "full"
    folder = run.export(run_dir, output, weights=weights, unfinished=unfinished, for_comfy=comfy, progress=terminal.progress())
    terminal.note(f"student: {folder}")
    manifest = read_manifest(folder)
    for file in manifest["comfyui"]["files"] if comfy else ():
        terminal.note(f"for ComfyUI: {folder / file}")
    if "unfinished" in manifest:
        terminal.note(card.unfinished_text(manifest))


@app.command()
def verify(
    student_dir: StudentDir,
    teacher_dir: TeacherDir = None,
    device: Annotated[str, typer.Option(help="Where both draw: auto, cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="In which precision: fp32, or fp16 or bf16, which show only gross mistakes.")] = "fp32",
) -> None:
    """Reload the student in plain diffusers, without fastgen, and compare its grid and pictures with ours."""
    from fastgen import export as exports
    from fastgen import run, terminal
    from fastgen.parallel import choose_device

    if dtype not in exports.DTYPES:
        raise UserError(f"--dtype: {dtype!r} is no precision; allowed: {', '.join(exports.DTYPES)}")
    place = choose_device(device, "--device")
    terminal.quiet()
    result = exports.verify(student_dir, teacher_dir=teacher_dir, device=place, dtype=dtype)
    run.require_verified(result, student_dir)
    terminal.note(f"verified: {result.pictures} pictures differ by at most {result.picture_error:.1e}, the grid by {result.grid_error:.1e}")


@app.command()
def sample(
    student_dir: StudentDir,
    prompt: Annotated[list[str], typer.Option(help="Prompt; give it several times for a row of pictures.")],
    output: Annotated[Path, typer.Option(help="PNG file; of videos it gets a film strip, and a .webp file beside it moves.")],
    steps: Annotated[Optional[int], typer.Option(min=1, max=MOST_STEPS, help="Network evaluations (default: the student's).")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the first picture; the next ones count up.")] = 0,
    size: Annotated[Optional[str], typer.Option(metavar="HxW", help="Of a student of several sizes (default: its first).")] = None,  # noqa: UP045
    native: Annotated[bool, typer.Option("--native", help="As its pipeline draws, where it is made for a sampler of fastgen's own.")] = False,
    first_step_from_teacher: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, max=MOST_STEPS, metavar="N", help="For diversity: N steps of the teacher replace the student's first one."),
    ] = None,
    first_step_guidance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="W", help="The teacher's guidance in them (default: 1, none)."),
    ] = None,
    teacher_dir: TeacherDir = None,
) -> None:
    """Draw pictures with an exported student."""
    from fastgen import pictures, terminal
    from fastgen.generator import load_student, load_teacher_of

    if first_step_guidance is not None and first_step_from_teacher is None:
        raise UserError("--first-step-guidance: needs --first-step-from-teacher")
    guidance = 1.0 if first_step_guidance is None else first_step_guidance
    if not 1 <= guidance < math.inf:
        raise UserError(f"--first-step-guidance: {guidance:g} is not a number from 1 (no guidance) up")
    if output.suffix.lower() != ".png":
        raise UserError(f"--output: {str(output)!r} must end in .png")
    check_writable_file(output, "--output")
    terminal.quiet()
    chosen = size_of(size)
    student = load_student(student_dir, teacher_dir=teacher_dir)
    student = student if chosen is None else student.at_size(chosen)
    student = student if native else student.with_own_sampler()
    for warning in student.family.legibility(prompt).check("--prompt"):
        terminal.warn(warning)
    if first_step_from_teacher is not None:
        student.times_after_first(steps)  # refuses before the teacher is loaded
        teacher = load_teacher_of(student_dir, guidance=guidance, size=chosen, teacher_dir=teacher_dir)
        student = student.with_first_step(teacher, first_step_from_teacher)
    images = student(prompt, [seed + i for i in range(len(prompt))], steps)
    pictures.save_png(pictures.picture_row(images), output)
    terminal.note(f"picture: {output}")
    if images.ndim == 5:
        pictures.save_video(images, output.with_suffix(".webp"), student.family.frame_rate)
        terminal.note(f"video: {output.with_suffix('.webp')}")


app.command()(evaluate)
app.command()(gallery)
app.command()(straightness)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="One run, or several to compare.")],
    output: Annotated[Optional[Path], typer.Option(help="HTML file (default: report.html in the run, comparison.html here).")] = None,  # noqa: UP045
) -> None:
    """Write a run's report, or one page that compares several runs."""
    from fastgen import report as reports
    from fastgen import terminal

    if output is not None:
        check_writable_file(output, "--output")
    if len(run_dirs) == 1:
        written = reports.write_report(run_dirs[0], output)
    else:
        written = reports.write_comparison(run_dirs, output or Path("comparison.html"))
    terminal.note(f"report: {written}")


@recipes_app.command("list")
def recipes_list() -> None:
    """Names of the shipped recipes, each with its first comment."""
    from fastgen import terminal
    from fastgen.config import shipped_recipes

    for name, path in shipped_recipes().items():
        terminal.echo(f"{name:28s} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe's name.")]) -> None:
    """Print a recipe."""
    from fastgen import terminal
    from fastgen.config import find_recipe
    from fastgen.yaml_files import read_text

    terminal.echo(read_text(find_recipe(name)).rstrip())


@protocols_app.command("list")
def protocols_list() -> None:
    """Names of the shipped protocols, each with its first comment."""
    from fastgen import terminal
    from fastgen.evaluation.protocol import shipped_protocols

    for name, path in shipped_protocols().items():
        terminal.echo(f"{name:18s} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")


@protocols_app.command("show")
def protocols_show(name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped protocol's name.")]) -> None:
    """Print a protocol."""
    from fastgen import terminal
    from fastgen.evaluation.protocol import find_protocol
    from fastgen.yaml_files import read_text

    terminal.echo(read_text(find_protocol(name, "NAME")).rstrip())


StoreDir = Annotated[Path, typer.Option(help="Folder of the store, for data.store; one that holds some of it is continued.")]
Part = Annotated[str, typer.Option(metavar="i/n", help="Make the shards of one of n parts; the whole is the same whoever makes which.")]


@cache_app.command("pairs")
def cache_pairs(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option(help="Folder of the pairs; one that holds some of them is continued.")],
    overrides: Overrides = None,
    count: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, max=10**9, help="Pairs in all (default: 10000, or what the folder was begun for; of data, all)."),
    ] = None,
    steps: Annotated[Optional[int], typer.Option(min=1, max=MOST_STEPS, help="Sampling steps (default: the teacher's).")] = None,  # noqa: UP045
    solver: Annotated[Literal["euler", "heun"], typer.Option(help="heun: order 2, twice the evaluations.")] = "euler",
    source: Annotated[
        Literal["noise", "data"],
        typer.Option("--from", help="data: seek the noise that the unguided teacher's flow leads to from each image of data.images."),
    ] = "noise",
    part: Part = "1/1",
    batch: Annotated[Optional[int], typer.Option(min=1, max=2**20, help="Pairs drawn at once (default: the recipe's train.micro_batch).")] = None,  # noqa: UP045
) -> None:
    """Draw noise-sample pairs from a recipe's teacher, for data.pairs; the same command goes on where one was interrupted."""
    from fastgen import caching, terminal
    from fastgen.config import Recipe
    from fastgen.evaluation.settings import part_of

    read, progress = Recipe.load(recipe, overrides or []), terminal.progress()
    store, made = caching.cache_pairs(
        read, output, count=count, steps=steps, solver=solver, source=source, part=part_of(part), batch=batch, progress=progress
    )
    _note_store(store, made)


@cache_app.command("prompts")
def cache_prompts(recipe: RecipeArgument, output: StoreDir, overrides: Overrides = None, part: Part = "1/1") -> None:
    """Encode a recipe's prompts with its teacher's text encoders; the same command goes on where one was interrupted."""
    _cache_encoded("prompts", recipe, output, overrides, part)


@cache_app.command("latents")
def cache_latents(recipe: RecipeArgument, output: StoreDir, overrides: Overrides = None, part: Part = "1/1") -> None:
    """Encode a recipe's images with its teacher's VAE; the same command goes on where one was interrupted."""
    _cache_encoded("latents", recipe, output, overrides, part)


def _cache_encoded(kind: Literal["prompts", "latents"], recipe: str, output: Path, overrides: list[str] | None, part: str) -> None:
    from fastgen import caching, terminal
    from fastgen.config import Recipe
    from fastgen.evaluation.settings import part_of

    read = Recipe.load(recipe, overrides or [])
    filled = caching.cache_encoded(kind, read, output, part=part_of(part), progress=terminal.progress())
    for store, made in filled:
        _note_store(store, made)
    if read.data.buckets is not None and kind == "latents":
        sizes = [[int(side) for side in store.path.parent.name.split("x")] for store, _ in filled]
        terminal.note(f"train with data.store={output}, or without the pictures with:")
        terminal.note(f"data.images={output} 'student.sizes={sizes}' data.buckets=null teacher.size=null teacher.resolution=null")


def _note_store(store: Store, made: int) -> None:
    from fastgen import terminal

    there = len(store) - sum(len(store.ids(shard)) for shard in store.missing())
    terminal.note(f"{store.manifest.kind}: {store.path} holds {there} of {len(store)}, {made} of them new")


@app.command()
def doctor() -> None:
    """Print versions, devices, and which kernels and paths are active."""
    from fastgen.doctor import print_doctor

    print_doctor()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. Without arguments it shows the help."""
    command = typer.main.get_command(app)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with _together(arguments, getattr(command, "commands", {})):
            status: Any = command.main(args=arguments or ["--help"], prog_name="fastgen", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except UserError as error:
        return _fail(str(error), 2)
    except typer.TyperException as error:
        where = getattr(getattr(error, "ctx", None), "command_path", "fastgen")
        return _fail(f"{error.format_message().rstrip('.')}; see {where} --help", 2)
    except TrainingFailed as error:
        return _fail(str(error), 1)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        return 141
    except OSError as error:  # what no more specific message has caught
        return _fail(f"{one_line(str(error.filename or 'a file'), 200)}: {error.strerror or error}", 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)


@contextmanager
def _together(arguments: list[str], commands: Container[str]) -> Iterator[None]:
    """Around a command: meet the launcher's other processes, if there are any, for whatever ends one ends all then, and is said once. UserError for a
    command that they cannot share."""
    if not _launched() or not arguments or arguments[0] not in commands or "--help" in arguments:
        yield
        return
    alone = arguments[0] if arguments[0] not in SHARED else "evaluate --compare" if "--compare" in arguments else None
    if alone is not None:  # without meeting, for a variable that was left over brings no processes
        if not _speaks():
            time.sleep(_HEAD_START)
        count = one_line(os.environ["WORLD_SIZE"], 40)
        raise UserError(f"{alone}: is for one process, and the launcher started {count} (WORLD_SIZE); they share {', '.join(SHARED)} alone")
    from fastgen import group

    with group.joined():
        yield


def _fail(message: str, status: int) -> int:
    if _speaks():
        put("error: " + one_line(message), sys.stderr)
        sys.stderr.flush()
    if _launched():
        from fastgen import group

        group.said()
    return status


def _launched() -> bool:
    """Whether a launcher has started several processes of this command."""
    return (os.environ.get("WORLD_SIZE") or "1") != "1"


def _speaks() -> bool:
    """Whether this process prints what the command has to say."""
    if not _launched():
        return True
    from fastgen import group

    return group.speaks()


def run_main() -> None:
    """Entry point of the `fastgen` program."""
    for stream in (sys.stdout, sys.stderr):  # a path may hold bytes, or the terminal lack letters, that make `print` fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if _launched():  # PyTorch's own account of a process that has gone, beside our line
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sys.exit(main())
