"""One run from recipe to report: train, export, verify, evaluate, report. Home of `fastgen.train` and `fastgen.evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml

from fastgen import checkpoint, inputs
from fastgen.config import Recipe
from fastgen.data import training
from fastgen.errors import UserError
from fastgen.files import write_atomically
from fastgen.plan import plan
from fastgen.run.building import build, load_pairs
from fastgen.run.events import train_steps
from fastgen.run.folder import check_folder, plain, remove_run
from fastgen.run.products import evaluate, export, finish, measure, require_verified
from fastgen.run.progress import Interrupted, Progress
from fastgen.runlog import RunLog

__all__ = ["Interrupted", "Progress", "build", "evaluate", "export", "measure", "require_verified", "train"]


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
    progress, run_dir = progress or Progress(), plain(output)
    recipe = inputs.at_its_commit(recipe, run_dir) if resume else recipe
    planned = plan(recipe, only=only, started=resume and bool(checkpoint.checkpoints(run_dir / "checkpoints")))
    if overwrite and given == (run_dir / "recipe.yaml").resolve():
        raise UserError(f"--overwrite: {str(run_dir)!r} holds the recipe itself, which would be replaced; choose another --output")
    check_folder(run_dir, resume=resume, overwrite=overwrite)
    began = inputs.check_same(run_dir, planned) if resume else None  # silent: what is refused has one line, and large files are known by now
    for warning in planned.warnings:
        progress.warn(f"warning: {warning}")
    run = build(planned, progress)
    if began is None:
        progress.stage("identifying teacher and data by their content")
        began = inputs.identify(planned)
    run.began = began
    if recipe.data.pairs is not None:
        data = training.with_pairs(run.data, load_pairs(run, progress), planned.family, run.parallel.device)
        run.trainer.data = data.with_first_pairs(began.pairs)
    if overwrite:
        remove_run(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    inputs.write(run_dir, began)
    write_atomically(run_dir / "recipe.yaml", yaml.safe_dump(planned.resolved(), sort_keys=False, width=120))
    if resume:
        if checkpoint.checkpoints(run_dir / "checkpoints"):  # none: it was killed before its first one and starts over
            newest = checkpoint.latest(run_dir)
            progress.stage(f"resuming from {newest}")
            checkpoint.load(newest, run.trainer)
        RunLog(run_dir).truncate(run.trainer.step)
    train_steps(run, run_dir, progress)
    if only != "train":
        finish(run, run_dir, progress)
    return run_dir
