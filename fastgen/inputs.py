"""What a run reads from elsewhere, by content: a continuation has to read the same, wherever it lies by then.

A run folder records it in `inputs.json` before training begins, and every checkpoint in its `state.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgen import checkpoint
from fastgen.config import Recipe, flatten, read_yaml
from fastgen.errors import UserError
from fastgen.families import source_hash
from fastgen.files import reading, write_atomically
from fastgen.fingerprints import digest, sealed, unsealed
from fastgen.plan import Plan

FILE = "inputs.json"
TEACHER, INIT = "teacher.pretrained", "student.init"
# What may differ between a run and its continuation: nothing that changes a number.
_RESUMABLE = ("train.checkpoint_every", "train.keep", "train.sample_every", "train.device", "evaluate", "export")


@dataclass(frozen=True)
class Inputs:
    """hashes: by the recipe key that names the input; pairs: how many of data.pairs' folder the run has, which may grow meanwhile."""

    hashes: Mapping[str, str] = field(default_factory=dict)
    pairs: int | None = None


def identify(planned: Plan, *, pairs: int | None = None) -> Inputs:
    """A plan's inputs, of its pairs the first `pairs` (None: all). Reads every file once, large ones only where they are not known yet."""
    teacher, init = planned.recipe.teacher, planned.recipe.student.init
    hashes = {TEACHER: source_hash(teacher.pretrained, teacher.revision), **planned.method.files(planned.method_config)}
    if planned.prompts is not None:
        hashes["data.prompts"] = digest(list(planned.prompts.items()))
    if planned.images is not None:
        hashes["data.images"] = planned.images.content()
    if planned.pairs is not None:
        pairs = planned.pairs.manifest.count if pairs is None else pairs
        hashes["data.pairs"] = planned.pairs.content(pairs)
    if init != "teacher" and not planned.started:  # all that it brings is in the checkpoint of a run that has begun
        hashes[INIT] = checkpoint.identity(Path(init).expanduser())
    return Inputs(hashes, pairs if planned.pairs is not None else None)


def write(run_dir: Path, inputs: Inputs) -> None:
    """Record what a run begins with."""
    write_atomically(run_dir / FILE, json.dumps(sealed({"hashes": dict(inputs.hashes), "pairs": inputs.pairs}), indent=1) + "\n")


def recorded(run_dir: Path) -> Inputs:
    """What a run began with: as its newest checkpoint says, else its folder; nothing where neither does."""
    if checkpoint.checkpoints(run_dir / "checkpoints"):
        state = checkpoint.read_state(checkpoint.latest(run_dir))
        return Inputs(state["inputs"], state["pairs"] if "data.pairs" in state["inputs"] else None)
    if not (run_dir / FILE).is_file():
        return Inputs()
    with reading(run_dir / FILE):
        content = unsealed(json.loads((run_dir / FILE).read_text(encoding="utf-8")))
    return Inputs(content["hashes"], content["pairs"])


def check_same(run_dir: Path, planned: Plan) -> Inputs:
    """What the run in `run_dir` began with; UserError unless `planned` goes on with it: the same numbers in the recipe, the same content
    behind its paths."""
    then, now = flatten(read_yaml(run_dir / "recipe.yaml")), flatten(planned.resolved())
    began = recorded(run_dir)
    found = dict(identify(planned, pairs=began.pairs).hashes)
    if planned.started and then.get(INIT) != now[INIT] != "teacher" and Path(now[INIT]).is_dir():  # the same run moved, or another
        found[INIT] = checkpoint.identity(Path(now[INIT]))
    by_content = began.hashes.keys() & found.keys()
    for key in sorted(then.keys() | now.keys()):
        by_name = key not in by_content and not (key == "teacher.revision" and TEACHER in by_content) and not key.startswith(_RESUMABLE)
        if by_name and then.get(key) != now.get(key):
            raise UserError(
                f"--resume: recipe key {key} is {now.get(key)!r}, the run in {str(run_dir)!r} has {then.get(key)!r}; resume with the same recipe"
            )
    for key in sorted(by_content):
        if began.hashes[key] != found[key]:
            raise UserError(f"--resume: recipe key {key}: {_changed(then.get(key), now.get(key))}; resume with what the run in {str(run_dir)!r} has")
    return began


def _changed(then: Any, now: Any) -> str:
    return f"{now!r} has changed since the run began" if then == now else f"{now!r} holds something else than {then!r}, with which the run began"


def at_its_commit(recipe: Recipe, run_dir: Path) -> Recipe:
    """A recipe without teacher.revision goes on with the commit that the run in `run_dir` began with, though the hub may have moved on."""
    before = read_yaml(run_dir / "recipe.yaml").get("teacher") if (run_dir / "recipe.yaml").is_file() else None
    if recipe.teacher.revision is not None or not isinstance(before, dict) or before.get("pretrained") != recipe.teacher.pretrained:
        return recipe
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"revision": before.get("revision")})})


def check_teacher(began: Mapping[str, str], planned: Plan) -> None:
    """UserError where a run's teacher is another than it was, so that what it exports would be another student."""
    teacher = planned.recipe.teacher
    if TEACHER in began and began[TEACHER] != source_hash(teacher.pretrained, teacher.revision):
        raise UserError(f"recipe key {TEACHER}: {teacher.pretrained!r} has changed since the run began; the student would be another")
