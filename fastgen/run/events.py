"""Training a built run into its folder: what happens after each step, and what a signal does."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fastgen import diagnostics, group, pictures
from fastgen.data.latents import name_of
from fastgen.errors import NotFinite, TrainingFailed, UserError
from fastgen.evaluation.block import PROTOCOL, resources_of
from fastgen.evaluation.settings import Settings, with_root
from fastgen.generator import ImageGenerator, generate_pictures
from fastgen.progress import Once, Progress
from fastgen.run.building import Run, spread
from fastgen.run.diverged import with_way_on
from fastgen.run.interrupted import Interrupted
from fastgen.run.measuring import Measuring
from fastgen.run.straightened import straightness_of
from fastgen.runlog import RunLog
from fastgen.saving import Saver
from fastgen.trainer import Metrics

_ECHO = 10.0  # seconds
_SAMPLES, _SAMPLE_PROMPTS = 16, 4  # pictures; the prompts they share, whose spread tells whether modes are lost


def train_steps(run: Run, run_dir: Path, progress: Progress, logged: Metrics | None = None) -> None:
    """Train to the end. logged: the metrics of the step that the run goes on from, whose row may be missing still.

    A checkpoint is saved before the pictures of its step are drawn, and holds what else the step's row needs. Of several processes the main one
    writes while the others wait; all of them draw.
    """
    settings, evaluate, trainer = run.plan.recipe.train, run.plan.recipe.evaluate, run.trainer
    resolved = run.plan.resolved()
    samples = Samples(run, run_dir / "samples") if run.plan.family.exportable and settings.sample_every else None
    for name in trainer.roles.keys() - run.plan.method.roles_for(run.plan.method_config).keys():  # which has drawn the run's pairs
        trainer.release(name)
    watch = diagnostics.Watch()
    is_due = lambda step, every: bool(every) and (step == settings.steps or step % every == 0)  # noqa: E731
    parallel = run.parallel
    log = RunLog(run_dir)
    saver = Saver(run_dir / "checkpoints", keep=settings.keep, beside=settings.save_beside, timeout=settings.timeout)
    with _signals() as caught, log if parallel.is_main else nullcontext(), _measuring(run, run_dir, progress) as student, saver:
        if run.plan.recipe.data.encode == "ahead":
            run.plan.family.free_encoders()
        rows = log.rows() if parallel.is_main else []  # of the part that is resumed
        for row in rows:
            watch(row)
        saved = trainer.step if logged is not None else -1
        latest: Metrics = logged or {}

        def save() -> None:
            nonlocal saved
            trainer.check_weights()
            parallel.lone(log.flush)
            saver.save(trainer, resolved, inputs=run.began.hashes, metrics=latest)
            saved = trainer.step

        def write_row(step: int, metrics: Metrics) -> None:
            if samples and is_due(step, settings.sample_every):
                metrics = {**metrics, **samples.draw(step)}
            if step == settings.steps:
                metrics = {**metrics, **_straightened(run)}
            if student and is_due(step, evaluate.every):
                student.draw()
            if is_due(step, evaluate.every) or is_due(step, settings.sample_every) or is_due(step, settings.checkpoint_every):
                parallel.lone(lambda: finish_row(step, metrics))
            elif parallel.is_main:  # a line, which nobody waits for
                finish_row(step, metrics)

        def finish_row(step: int, metrics: Metrics) -> None:
            failures: list[str] = []
            if student and is_due(step, evaluate.every):
                try:
                    metrics = {**metrics, **student.measure()}
                except NotFinite:
                    raise
                except UserError as error:  # costs this row's numbers alone
                    failures = [f"{PROTOCOL}: the student is not measured here: {error}"]
            row: dict[str, Any] = {"step": step, **{key: float(f"{value:.6g}") for key, value in metrics.items()}}
            if warnings := [*watch(row), *failures]:
                row["warnings"] = warnings
            log.write(row, sync=step == settings.steps or is_due(step, settings.checkpoint_every))
            for warning in warnings:
                progress.warn(f"warning at step {step}: {warning}")
            progress.update(step, metrics)

        def after_step(step: int, metrics: Metrics) -> None:
            nonlocal latest
            latest = metrics
            if step == settings.steps or is_due(step, settings.checkpoint_every):
                save()
            write_row(step, metrics)

        progress.start("training", settings.steps, trainer.step)
        try:
            if logged and parallel.broadcast(not any(row["step"] == trainer.step for row in rows)):
                write_row(trainer.step, logged)
            trainer.run([after_step], should_stop=lambda: bool(caught))
            stopped = parallel.first(next(iter(caught), None))
            if stopped is not None and saved != trainer.step:
                save()
        except NotFinite as error:
            saver.wait()
            raise with_way_on(TrainingFailed(f"step {trainer.step}: {error}"), run_dir / "checkpoints", trainer) from error
        except TrainingFailed as failure:
            saver.wait()
            raise with_way_on(failure, run_dir / "checkpoints", trainer) from failure
        finally:  # a bar left running hides the terminal's cursor
            progress.finish()
        if stopped is not None:
            saver.wait()
            raise Interrupted(stopped, trainer.step)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second one interrupts at once. A launcher passes on what a terminal or a queue has sent to all
    its processes, and ends the others as soon as one has ended: these signals are the first one's echo."""
    caught: list[int] = []
    echoes = group.launched() > 1
    since = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal since
        if caught and echoes and time.monotonic() - since < _ECHO:
            return
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        since = time.monotonic()

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where Python allows no handlers
        before = {}
    is_over = False
    try:
        yield caught
        is_over = not caught
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if echoes and not is_over else handler)


class Samples:
    """Picture grids during training: the teacher's row, then the student's, from the same noise."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        prompts = spread(run.data.prompts, _SAMPLE_PROMPTS)
        self.prompts = [prompt for prompt in prompts for _ in range(_SAMPLES // len(prompts))]
        self.seeds = list(range(len(self.prompts)))
        self.student = run.generator("student")
        self.students = [self.student, *map(self.student.at_size, self.student.sizes[1:])]
        for start in range(0, len(prompts), at_once := run.plan.recipe.train.at_once):
            self.student.conditioning(prompts[start : start + at_once])  # while the text encoders are still there
        self.rows: list[list[tuple[str, torch.Tensor]]] = [[] for _ in self.students]  # by size
        if "teacher" in run.roles:
            teacher = run.generator("teacher")
            for rows, size in zip(self.rows, self.student.sizes, strict=True):
                rows.append((f"teacher, {teacher.steps} steps", self._pictures(teacher.at_size(size))))

    def draw(self, step: int) -> Metrics:
        """Write `step_NNNNNN.png` from the averaged weights, and of more sizes than one `step_NNNNNN_HxW.png` of each other; returns the student's
        drift from the teacher at the first, where there is one."""
        self.run.trainer.check_weights()
        with self.run.trainer.ema.applied():
            drawn = [self._pictures(student) for student in self.students]
        name = f"student, {self.student.steps} step{'s' * (self.student.steps > 1)}"

        def save() -> None:
            for place, (rows, own, size) in enumerate(zip(self.rows, drawn, self.student.sizes, strict=True)):
                file = f"step_{step:06d}.png" if place == 0 else f"step_{step:06d}_{name_of(size)}.png"
                pictures.save_png(pictures.picture_grid([*rows, (name, own)], self.prompts), self.folder / file)

        self.run.parallel.lone(save)
        return diagnostics.drift(drawn[0], self.rows[0][0][1], self.prompts) if self.rows[0] else {}

    def _pictures(self, generator: ImageGenerator) -> torch.Tensor:
        """In batches no larger than training's own, which the processes share."""
        size, parallel = self.run.plan.recipe.train.at_once, self.run.parallel
        all_starts = range(0, len(self.prompts), size)
        starts = all_starts[parallel.rank :: parallel.world_size]
        own = [generate_pictures(generator, self.prompts[i : i + size], self.seeds[i : i + size], batch=size) for i in starts]
        if self.run.plan.cut is not None:  # a pass through networks of which each process has a part takes all of them
            for _ in range(math.ceil(len(all_starts) / parallel.world_size) - len(own)):
                generate_pictures(generator, self.prompts[:size], self.seeds[:size], batch=size)
        return torch.cat(parallel.members.in_turn(own))


def _straightened(run: Run) -> Metrics:
    """How straight the flow of the averaged student is, and its teacher's was, where the method asks for it."""
    plan, trainer = run.plan, run.trainer
    samples = plan.method.straightness_of(plan.method_config)
    if not samples:
        return {}
    with trainer.ema.applied():
        setting = trainer.distiller.setting
        predict = trainer.distiller.sampler(trainer.models)
        predict = setting.guide(predict) if plan.guidance != 1 else predict
        told: Any = {"guidance": plan.guidance, "samples": samples, "train": plan.recipe.train, "device": run.parallel.device}
        after = straightness_of(predict, run.data, setting, **told)
    before = run.straightness or {}  # unless run.json was lost
    return {f"straightness/{name}": found["straightness"] for name, found in (("teacher", before), ("student", after)) if found}


@contextmanager
def _measuring(run: Run, run_dir: Path, progress: Progress) -> Iterator[Measuring | None]:
    """What measures the student during training, if the recipe asks for it; what cannot be measured is said at the first."""
    protocol, block = run.plan.protocol, run.plan.recipe.evaluate
    if protocol is None or not block.every:
        yield None
        return
    said = Once(progress)
    with with_root(Settings(), said) as kept:
        yield Measuring.of(run, protocol, resources_of(block, run.parallel.device), kept.stores, run_dir, said)
