"""One run from recipe to report: train, export, verify, evaluate, report. Home of `fastgen.train` and `fastgen.evaluate`."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from fastgen import checkpoint, conditioning, diagnostics, inputs, pictures, report
from fastgen.config import Recipe, validate
from fastgen.data import training
from fastgen.data.pairs import Pairs, TeacherSampler, make_pairs
from fastgen.distillers.base import Distiller
from fastgen.errors import UserError
from fastgen.evaluation import runner
from fastgen.evaluation.protocols import load_protocol
from fastgen.export import Expert, StudentInfo, Verification, export_lora, export_student, verify
from fastgen.families import resolve_source
from fastgen.files import write_atomically
from fastgen.fingerprints import folder_hash
from fastgen.generator import ImageGenerator, check_teacher_of, generate_pictures, load_student, load_teacher_of, read_manifest
from fastgen.parallel import SingleProcess, launch
from fastgen.plan import Plan, plan
from fastgen.roles import Roles, build_roles
from fastgen.runlog import RunLog
from fastgen.surgery.second_time import Defaults
from fastgen.trainer import Metrics, Trainer

_SAMPLES, _SAMPLE_PROMPTS = 16, 4  # pictures; the prompts they share, whose spread tells whether modes are lost


class Interrupted(Exception):
    """Training stopped on a signal after saving; `number` is the signal's."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped at step {step} by {signal.Signals(number).name}")
        self.number = number


class Progress:
    """What a run says while it works; this one says nothing. The command line shows bars."""

    def stage(self, message: str) -> None:
        """A new stage begins."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """A counted piece of work begins."""

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        """`done` of the total, with the numbers that matter now."""

    def warn(self, message: str) -> None:
        """Something has gone wrong that does not stop the work."""

    def finish(self) -> None:
        """The counted work is over."""


@dataclass
class Run:
    """A plan with its networks, data and trainer, and what it was begun with."""

    plan: Plan
    roles: Roles
    data: training.TrainingData
    trainer: Trainer
    parallel: SingleProcess
    began: inputs.Inputs = field(default_factory=inputs.Inputs)

    def info(self) -> StudentInfo:
        recipe, resolved = self.plan.recipe, self.plan.resolved()
        stated = ("shift",) if recipe.teacher.shift is not None else ()
        teacher = {key: resolved["teacher"][key] for key in ("pretrained", "revision", "guidance", "negative_prompt", *stated)}
        teacher["sha256"] = self.began.hashes.get(inputs.TEACHER)
        return StudentInfo(
            method=recipe.distiller.name,
            steps=recipe.student.steps,
            grid=self.plan.grid,
            guidance=self.plan.guidance,
            teacher=teacher,
            prompts=_spread(self.data.prompts, 8),
            recipe=resolved,
            unfinished=self.unfinished(),
        )

    def unfinished(self) -> dict[str, dict[str, int]]:
        """The students that this run still trains, each with its own step and how many it will have."""
        distiller = self.trainer.distiller
        trained = {role: distiller.trained(role, self.trainer.step) for role, _ in distiller.students()}
        return {role: {"step": step, "of": count} for role, (step, count) in trained.items() if step < count}

    def generator(self, role: str) -> ImageGenerator:
        """Pictures from a role's current weights: the student on its grid, the teacher at its own steps."""
        recipe, family = self.plan.recipe, self.plan.family
        student = role == "student"
        return ImageGenerator(
            family,
            self.trainer.distiller.sampler(self.trainer.models) if student else self.roles[role].predictor,
            steps=recipe.student.steps if student else family.own_call["num_inference_steps"],
            guidance=self.plan.guidance if student else recipe.teacher.guidance,
            negative_prompt=recipe.teacher.negative_prompt,
            grid=self.plan.grid if student else None,
            device=self.parallel.device,
        )


def build(plan: Plan, progress: Progress) -> Run:
    """Load the teacher, make the roles, encode the data."""
    recipe, family = plan.recipe, plan.family
    parallel = launch(recipe.train.shard, recipe.train.device)
    data = training.prepare(family, plan.prompts, plan.images, parallel.device, progress.stage)
    progress.stage(f"loading {recipe.teacher.pretrained}")
    backbone = family.load_backbone().to(parallel.device)
    setting = plan.setting(conditioning.to(family.encode_prompts([recipe.teacher.negative_prompt]), parallel.device), family.decode)
    defaults = Defaults.on(setting.path, setting.grid, setting.guidance)
    roles = build_roles(plan.roles, family, backbone, tuning=plan.tuning, autocast=plan.autocast, defaults=defaults, seed=recipe.train.seed)
    if recipe.student.init != "teacher" and not plan.started:
        taken = checkpoint.load_students(Path(recipe.student.init).expanduser(), roles, plan.method.inherited(plan.method_config))
        roles.align_adapters(taken)
    distiller = plan.method(plan.method_config, setting)
    trainer = Trainer(distiller, roles, data, plan.optimizers, recipe.train, parallel)
    return Run(plan, roles, data, trainer, parallel)


def _pairs(run: Run, progress: Progress) -> Pairs:
    """The noise-sample pairs that the recipe names: of a folder, or drawn from the teacher now."""
    recipe, family = run.plan.recipe, run.plan.family
    if run.plan.pairs is not None:
        return run.plan.pairs.load()
    assert isinstance(recipe.data.pairs, int)
    times = family.grid(family.own_call["num_inference_steps"]).to(run.parallel.device)
    teacher = TeacherSampler(run.trainer.distiller.setting.guide(run.trainer.models["teacher"]), times, family.latent.shape)
    weights = training.prompt_weights(run.plan.prompts, run.plan.images)
    progress.start("drawing pairs", recipe.data.pairs)
    try:
        return make_pairs(
            teacher,
            run.data.conditioning,
            weights,
            range(recipe.data.pairs),
            seed=recipe.train.seed,
            batch=recipe.train.micro_batch or recipe.train.batch_size,
            progress=lambda done: progress.update(done, {}),
        )
    finally:  # a bar left running hides the terminal's cursor
        progress.finish()


def _spread(items: Sequence[str], count: int) -> list[str]:
    """`count` (2 or more) items at even distances, the first and the last among them; all of them when there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def train(
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    only: Literal["train"] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Run a recipe into the run folder `output` and return it; `only="train"` stops after training.

    UserError for mistakes (nothing has been written then), TrainingFailed when a number stops being finite, Interrupted after
    SIGINT or SIGTERM; in the last two cases the run can be resumed from its last checkpoint.
    """
    given = None if isinstance(recipe, Recipe) else Path(recipe).expanduser().resolve()
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, overrides)
    progress, run_dir = progress or Progress(), _plain(output)
    recipe = inputs.at_its_commit(recipe, run_dir) if resume else recipe
    planned = plan(recipe, only=only, started=resume and bool(checkpoint.checkpoints(run_dir / "checkpoints")))
    if overwrite and given == (run_dir / "recipe.yaml").resolve():
        raise UserError(f"--overwrite: {str(run_dir)!r} holds the recipe itself, which would be replaced; choose another --output")
    _check_folder(run_dir, resume=resume, overwrite=overwrite)
    began = inputs.check_same(run_dir, planned) if resume else None  # silent: what is refused has one line, and large files are known by now
    for warning in planned.warnings:
        progress.warn(f"warning: {warning}")
    run = build(planned, progress)
    if began is None:
        progress.stage("identifying teacher and data by their content")
        began = inputs.identify(planned)
    run.began = began
    if recipe.data.pairs is not None:
        data = training.with_pairs(run.data, _pairs(run, progress), planned.family, run.parallel.device)
        run.trainer.data = data.with_first_pairs(began.pairs)
    if overwrite:
        _remove_run(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    inputs.write(run_dir, began)
    write_atomically(run_dir / "recipe.yaml", yaml.safe_dump(planned.resolved(), sort_keys=False, width=120))
    if resume:
        if checkpoint.checkpoints(run_dir / "checkpoints"):  # none: it was killed before its first one and starts over
            newest = checkpoint.latest(run_dir)
            progress.stage(f"resuming from {newest}")
            checkpoint.load(newest, run.trainer)
        RunLog(run_dir).truncate(run.trainer.step)
    _train(run, run_dir, progress)
    if only != "train":
        _finish(run, run_dir, progress)
    return run_dir


def _check_folder(run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    _check_parents(run_dir)
    if run_dir.is_file():
        raise UserError(f"--output: {str(run_dir)!r} is a file, a folder is needed")
    holds_run = (run_dir / "recipe.yaml").is_file() and (run_dir / "metrics.jsonl").is_file()
    if resume and not holds_run:
        raise UserError(f"--resume: {str(run_dir)!r} holds no run to resume")
    if run_dir.is_dir() and any(run_dir.iterdir()) and not holds_run:
        raise UserError(f"--output: {str(run_dir)!r} holds other files and no run; choose an empty or new folder")
    if holds_run and not (resume or overwrite):
        raise UserError(f"--output: {str(run_dir)!r} already holds a run; pass --resume to go on with it or --overwrite to replace it")


def _remove_run(run_dir: Path) -> None:
    """Delete what a run writes, and nothing else that lies there."""
    for name in ("recipe.yaml", inputs.FILE, "metrics.jsonl", "results.json", "report.html"):
        (run_dir / name).unlink(missing_ok=True)
    for name in ("samples", "checkpoints", "student", "tensorboard"):
        shutil.rmtree(run_dir / name, ignore_errors=True)


def _plain(folder: str | Path) -> Path:
    """A folder's path without `..`, which could turn into a folder that holds other things while the run makes its own."""
    path = Path(folder)
    return path if path.name and ".." not in path.parts else Path(os.path.abspath(path))


def _check_parents(folder: Path) -> None:
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"--output: {str(folder)!r} cannot be made, because {str(above)!r} is a file")


def _train(run: Run, run_dir: Path, progress: Progress) -> None:
    settings, trainer = run.plan.recipe.train, run.trainer
    resolved = run.plan.resolved()
    save = lambda: checkpoint.save(run_dir / "checkpoints", trainer, resolved, keep=settings.keep, inputs=run.began.hashes)  # noqa: E731
    samples = Samples(run, run_dir / "samples") if run.plan.family.exportable and settings.sample_every else None
    evaluations = _evaluations(run)
    run.plan.family.free_encoders()
    watch = diagnostics.Watch()
    with _signals() as caught, RunLog(run_dir) as log:
        for row in log.rows():  # of the part that is resumed
            watch(row)

        def after_step(step: int, metrics: Metrics) -> None:
            done = step == settings.steps
            if samples and (done or step % settings.sample_every == 0):
                metrics = {**metrics, **samples.draw(step)}
            if run.plan.recipe.evaluate.every and (done or step % run.plan.recipe.evaluate.every == 0):
                metrics = {**metrics, **evaluations()}
            row: dict[str, Any] = {"step": step, **{key: float(f"{value:.6g}") for key, value in metrics.items()}}
            if warnings := watch(row):
                row["warnings"] = warnings
            log.write(row)
            for warning in warnings:
                progress.warn(f"warning at step {step}: {warning}")
            if done or (settings.checkpoint_every and step % settings.checkpoint_every == 0):
                log.flush()
                save()
            progress.update(step, metrics)

        progress.start("training", settings.steps, trainer.step)
        try:
            trainer.run([after_step], should_stop=lambda: bool(caught))
        finally:  # a bar left running hides the terminal's cursor
            progress.finish()
        if caught:
            if trainer.step < settings.steps:
                log.flush()
                save()
            raise Interrupted(caught[0], trainer.step)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second one interrupts at once."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where Python allows no handlers
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Samples:
    """Picture grids during training: the teacher's row, then the student's, from the same noise."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        prompts = _spread(run.data.prompts, _SAMPLE_PROMPTS)
        self.prompts = [prompt for prompt in prompts for _ in range(_SAMPLES // len(prompts))]
        self.seeds = list(range(len(self.prompts)))
        self.student = run.generator("student")
        self.student.conditioning(self.prompts)  # while the text encoders are still there
        self.rows: list[tuple[str, torch.Tensor]] = []
        if "teacher" in run.roles:
            teacher = run.generator("teacher")
            self.rows.append((f"teacher, {teacher.steps} steps", self._pictures(teacher)))

    def draw(self, step: int) -> Metrics:
        """Write `step_NNNNNN.png` from the averaged weights; returns the student's drift from the teacher, where there is one."""
        with self.run.trainer.ema.applied():
            drawn = self._pictures(self.student)
        student = (f"student, {self.student.steps} step{'s' * (self.student.steps > 1)}", drawn)
        pictures.save_png(pictures.picture_grid([*self.rows, student], self.prompts), self.folder / f"step_{step:06d}.png")
        return diagnostics.drift(drawn, self.rows[0][1], self.prompts) if self.rows else {}

    def _pictures(self, generator: ImageGenerator) -> torch.Tensor:
        """In batches no larger than training's own."""
        train = self.run.plan.recipe.train
        return generate_pictures(generator, self.prompts, self.seeds, batch=train.micro_batch or train.batch_size)


def _evaluations(run: Run) -> Callable[[], Metrics]:
    """Measure the averaged student during training, as scalars `eval/<metric>`."""
    name = run.plan.recipe.evaluate.protocol
    if name is None or not run.plan.recipe.evaluate.every:
        return dict
    protocol, student = load_protocol(name), run.generator("student")

    def measure() -> Metrics:
        with run.trainer.ema.applied():
            rows = runner.run_protocol(protocol, student, model="student", steps=[student.steps], guidance=student.guidance)
        return {f"eval/{row['name']}": row["value"] for row in rows}

    return measure


def _finish(run: Run, run_dir: Path, progress: Progress) -> None:
    student_dir = run_dir / "student"
    progress.stage(f"exporting to {student_dir}")
    export_student(_averaged(run), run.plan.family, run.info(), student_dir, dtype=run.plan.recipe.export.dtype)
    progress.stage("verifying in plain diffusers")
    require_verified(verify(student_dir), student_dir)
    protocol = run.plan.recipe.evaluate.protocol
    if protocol is not None:
        device, has_teacher = str(run.parallel.device), "teacher" in run.roles
        evaluate(student_dir, protocol=protocol, output=run_dir / "results.json", teacher=has_teacher, device=device, progress=progress)
    progress.stage("writing the report")
    report.write_report(run_dir)


def _averaged(run: Run) -> list[Expert]:
    """The student's experts, with their averaged weights for good."""
    run.trainer.ema.settle()
    return [Expert(run.roles[name], end) for name, end in run.trainer.distiller.students()]


def require_verified(result: Verification, folder: Path) -> None:
    """UserError when plain diffusers does not draw what we draw."""
    if not result.passed:
        raise UserError(
            f"{str(folder)!r}: plain diffusers differs from our sampler: grid by {result.grid_error:.2g}, pictures by {result.picture_error:.2g}"
        )


def export(run_dir: Path, output: Path, *, as_lora: bool = False, unfinished: bool = False) -> Path:
    """Export the averaged student of a run's newest checkpoint; fastgen.json and the card say so where it trains on after that.

    UserError for a student none of whose steps have been trained, and, unless `unfinished`, for one that is no good before its own
    training is over, such as the expert of a phase.
    """
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{str(run_dir)!r} holds no run (no recipe.yaml)")
    output = _plain(output)
    _check_parents(output)
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / "fastgen.json").is_file())):
        raise UserError(f"--output: {str(output)!r} exists and is no exported student; choose a new folder")
    state = checkpoint.read_state(checkpoint.latest(run_dir))
    state["recipe"]["train"]["device"] = "auto"  # the machine that exports need not be the one that trained
    planned = plan(validate(Recipe, state["recipe"]), started=True)
    inputs.check_teacher(state["inputs"], planned)
    if as_lora and planned.tuning is None:
        raise UserError("--lora: this run trained with student.tune: full, so it has no adapter; export it without --lora")
    run = build(planned, Progress())
    _check_trained(run.trainer.distiller, state["step"], run_dir, unfinished=unfinished)
    run.began = inputs.Inputs(state["inputs"])
    checkpoint.load(checkpoint.latest(run_dir), run.trainer)
    student = _averaged(run)
    if as_lora:
        return export_lora(student, planned.family, run.info(), output)
    return export_student(student, planned.family, run.info(), output, dtype=planned.recipe.export.dtype)


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
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure an exported student and, unless `teacher=False`, its teacher (cached), and write results.json; returns its content.

    steps: step counts of the student (default: its own); teacher_steps: of the teacher (default: its own).
    """
    progress, folder = progress or Progress(), Path(student_dir)
    manifest = read_manifest(folder)
    measured, student = load_protocol(protocol), load_student(folder, device=device)
    if teacher:
        check_teacher_of(folder, manifest["teacher"])  # before the student is measured
    for count in steps or []:
        student.times(count)  # refuses counts that the student was not made for before anything is measured
    progress.stage(f"measuring {folder} with protocol {protocol}")
    rows = measure(measured, student, "student", steps or [student.steps], progress)
    if teacher:
        base = load_teacher_of(folder, device=device)
        rows += _teacher_rows(measured, base, manifest["teacher"], teacher_steps or [base.steps], progress)
    rows += runner.cached(f"floors/{measured.hash()}/{measured.extractor_hash()}", measured.floors)
    provenance = runner.provenance(measured, device=device, model_hash=folder_hash(folder))
    if "unfinished" in manifest:
        provenance["unfinished"] = manifest["unfinished"]
    runner.write_results(output or folder / "results.json", protocol, rows, provenance)
    return {"protocol": protocol, "metrics": rows, "provenance": provenance}


def _teacher_rows(protocol: Any, teacher: ImageGenerator, source: dict[str, Any], steps: Sequence[int], progress: Progress) -> list[Any]:
    """The teacher's rows, measured once for each weights, protocol, guidance and sampling grid."""
    weights = folder_hash(resolve_source(source["pretrained"], source.get("revision")))
    settings = {key: value for key, value in source.items() if key not in ("pretrained", "revision", "sha256")}  # who it is, the weights say
    rows = []
    for count in steps:
        call, times = teacher.family.call_arguments(count, teacher.guidance), teacher.times(count).tolist()
        key = json.dumps([weights, protocol.hash(), protocol.extractor_hash(), settings, call, times, str(teacher.device)])
        rows += runner.cached(key, lambda count=count: measure(protocol, teacher, "teacher", [count], progress))
    return rows


def measure(protocol: Any, generator: ImageGenerator, model: str, steps: Sequence[int], progress: Progress) -> list[Any]:
    """Rows of one model at each step count, with a progress bar."""
    total = len(steps) * sum(len(subset.prompts) for subset in protocol.subsets.values())
    progress.start(f"measuring the {model}", total)
    rows = runner.run_protocol(
        protocol, generator, model=model, steps=steps, guidance=generator.guidance, progress=lambda done, total, what: progress.update(done, {})
    )
    progress.finish()
    return rows
