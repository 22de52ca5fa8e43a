"""One run from recipe to report: train, export, verify, evaluate, report. Home of `fastgen.train` and `fastgen.evaluate`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import yaml

from fastgen import checkpoint, group, inputs
from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.evaluation.block import PROTOCOL
from fastgen.files import check_writable, expanded, write_atomically
from fastgen.outlook import describe
from fastgen.plan import Plan, plan
from fastgen.progress import Progress
from fastgen.run.agreement import agree, by_key
from fastgen.run.building import Run, build, with_pairs
from fastgen.run.evaluating import PartDone, evaluate, results_file
from fastgen.run.events import train_steps
from fastgen.run.folder import RunFolder
from fastgen.run.interrupted import Interrupted
from fastgen.run.products import export, finish, require_verified
from fastgen.runlog import RunLog

__all__ = ["Interrupted", "PartDone", "Progress", "build", "dry_run", "evaluate", "export", "require_verified", "results_file", "train"]


def train(
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    or_start: bool = False,
    resume_from: str | None = None,
    allow_change: Sequence[str] = (),
    overwrite: bool = False,
    only: Literal["train"] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Run a recipe into the run folder `output` and return it; `only="train"` stops after training.

    resume: go on from the newest checkpoint; or_start: where there is a run, else start; resume_from: from the checkpoint of that name, such as
    step_000100. allow_change: recipe keys in which a continuation may differ. UserError for mistakes (nothing has been written then) and for
    what cannot be written, TrainingFailed when a number stops being finite, Interrupted after SIGINT or SIGTERM; in the last three cases the
    run can be resumed from its last checkpoint.
    """
    folder = RunFolder(output)
    flags: Any = {"resume": resume or resume_from is not None, "overwrite": overwrite, "or_start": or_start}
    with group.joined() as members:
        given = None if isinstance(recipe, Recipe) else os.path.realpath(expanded(recipe))
        recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, overrides)
        progress = progress if progress is not None and members.is_main else Progress()
        members.lone(lambda: _check_folder(folder, flags, given))
        with folder.held() if members.is_main else nullcontext():
            resume = members.told(lambda: _resumes(folder, flags))
            start = _start(recipe, folder, resume=resume, resume_from=resume_from, allow_change=allow_change, only=only)
            agree(members, by_key(start.planned.resolved()))
            for warning in (*start.planned.warnings, *group.left_alone()):
                progress.warn(f"warning: {warning}")
            members.lone(lambda: folder.claim(lambda: folder.check(**flags)))
            run = build(start.planned, progress)
            _begin(run, start, folder, progress)
            members.lone(lambda: folder.note(warnings=list(run.warnings) or None))
            train_steps(run, folder.path, progress, None if start.state is None else start.state.get("metrics", {}))
            if only != "train":
                finish(run, folder, progress)
    return folder.path


def _check_folder(folder: RunFolder, flags: Mapping[str, bool], given: str | None) -> None:
    """given: the recipe's file."""
    folder.check(**flags)
    check_writable(folder.path, "--output")
    if flags["overwrite"] and given == os.path.realpath(folder.path / "recipe.yaml"):
        raise UserError(f"--overwrite: {str(folder.path)!r} holds the recipe itself, which would be replaced; choose another --output")


def _resumes(folder: RunFolder, flags: Mapping[str, bool]) -> bool:
    """Whether the run that lies in the folder is gone on with; what kills have left there is mended then."""
    if resumes := folder.check(**flags):
        folder.recover()
    return resumes


def dry_run(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    or_start: bool = False,
    resume_from: str | None = None,
    allow_change: Sequence[str] = (),
    overwrite: bool = False,
    only: Literal["train"] | None = None,
) -> dict[str, Any]:
    """What `train` would do with the same arguments, and UserError where it would refuse; nothing is written. A folder that holds a run already
    is a warning, for one may ask what a recipe comes to at any time."""
    folder = RunFolder(output)
    asks = resume or or_start or overwrite or resume_from is not None
    resume = folder.check(resume=resume or resume_from is not None, or_start=or_start, overwrite=overwrite or (folder.holds_run and not asks))
    check_writable(folder.path, "--output")
    start = _start(recipe, folder, resume=resume, resume_from=resume_from, allow_change=allow_change, only=only, dry=True)
    outcome = describe(start.planned)
    if folder.holds_run and not asks:
        outcome["warnings"].append(f"{str(folder.path)!r} already holds a run; it takes --resume or --overwrite")
    return outcome


class _Start(NamedTuple):
    """Where a run begins: its plan, and for a continuation its checkpoint, if it has one, with its state; what it goes on with; what changed."""

    planned: Plan
    chosen: Path | None = None
    state: dict[str, Any] | None = None
    began: inputs.Inputs | None = None
    changed: Mapping[str, list[Any]] = MappingProxyType({})


def _start(
    recipe: Recipe,
    folder: RunFolder,
    *,
    resume: bool,
    resume_from: str | None,
    allow_change: Sequence[str],
    only: Literal["train"] | None,
    dry: bool = False,
) -> _Start:
    """Everything that can be refused before networks are loaded."""
    if not resume:
        return _Start(plan(recipe, only=only, dry=dry))
    members = group.current()
    has_checkpoint = members.told(lambda: folder.has_checkpoint) or resume_from
    chosen, state = checkpoint.opened(folder.path, resume_from, members) if has_checkpoint else (None, None)
    recipe = inputs.at_its_commit(recipe, inputs.began_as(folder.path, state))
    planned = plan(recipe, only=only, started=state is not None, dry=dry)
    began, changed = inputs.check_same(folder.path, planned, state, allow_change)
    if PROTOCOL in changed:
        said = f"{PROTOCOL}: {recipe.evaluate.protocol!r} is not what the run began with: numbers before and from here on do not compare"
        planned = replace(planned, warnings=(*planned.warnings, said))
    return _Start(inputs.as_begun(planned, began), chosen, state, began, changed)


def _begin(run: Run, start: _Start, folder: RunFolder, progress: Progress) -> None:
    """Say what the run begins with, and bring its trainer to where it goes on."""
    began, members = start.began, run.parallel.members
    if began is None:
        progress.stage("identifying teacher and data by their content")
        began = members.lone(lambda: inputs.identify(run.plan))  # first by one: what it finds is known then to others on its machine
        began = inputs.identify(run.plan) if began is None else began
    members.same({**began.hashes, "number of data.pairs": str(began.pairs)})
    run.began = began
    if start.planned.recipe.data.pairs is not None:
        run.trainer.data = with_pairs(run, progress).with_first_pairs(began.pairs)
    if start.chosen is not None:
        progress.stage(f"resuming from {start.chosen}")
        checkpoint.load(start.chosen, run.trainer, start.state)
        members.together()
    members.lone(lambda: _record(run, start, folder, progress))


def _record(run: Run, start: _Start, folder: RunFolder, progress: Progress) -> None:
    """Write what the run begins with, or goes on with."""
    if start.chosen is None:  # also of a run that was killed before its first checkpoint
        folder.begin(None)
        folder.note(straightness=run.straightness)
    else:
        run.straightness = folder.noted("straightness")
        for name in checkpoint.set_aside(folder.path, start.chosen):
            progress.stage(f"newer than that, so kept aside: {folder.path / 'checkpoints' / name}")
        folder.begin({"step": run.trainer.step, "changed": dict(start.changed)})
        RunLog(folder.path).truncate(run.trainer.step)
    inputs.write(folder.path, run.began)
    write_atomically(folder.path / "recipe.yaml", yaml.safe_dump(start.planned.resolved(), sort_keys=False, width=120))
