"""What a run reads from elsewhere, by content: a continuation has to read the same, wherever it lies by then.

A run folder records it in `inputs.json` before training begins, and every checkpoint in its `state.json`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field
from pydantic_core import to_jsonable_python

from fastgen import checkpoint, records
from fastgen.config import OptimizerBlock, Recipe, flatten
from fastgen.data import pair_folder
from fastgen.errors import UserError, nearest
from fastgen.evaluation.block import PROTOCOL
from fastgen.families import lora_hash, source_hash
from fastgen.files import expanded, reading, write_atomically
from fastgen.fingerprints import digest, sealed, unsealed
from fastgen.plan import Plan
from fastgen.yaml_files import read_yaml

FILE = "inputs.json"
TEACHER, LORA, INIT, KEPT = "teacher.pretrained", "teacher.lora", "student.init", "student.shrink.keep"
EXPERTS, SIZES = "student.moe", "data.buckets"
# What no continuation can change: beginnings of keys.
_FOR_GOOD = ("teacher", "student", "distiller.name", "data.pairs", SIZES)
# What may differ between a run and its continuation: nothing that changes a number.
_RESUMABLE = (
    "train.checkpoint_every",
    "train.keep",
    "train.save_beside",
    "train.sample_every",
    "train.device",
    "train.shard",
    "train.mesh",
    "train.timeout",
    "train.checkpointing",
    "teacher.offload",
    "train.ema_device",
    "train.offload_optimizers",
    "evaluate",
    "export",
    "distiller.straightness",
    *("data.caption_key", "data.skip_broken", "data.store", "data.keep"),
)


@dataclass(frozen=True)
class Inputs:
    """hashes: by the recipe key that names the input, and as KEPT which blocks importance chose, and as EXPERTS how many experts there
    are where some were added or removed, in JSON: a continuation measures nothing anew; as SIZES those that the images asked for, in JSON, which
    other images (--allow-change data.images) have to ask for too. pairs: how many of data.pairs' folder the run has, which may grow meanwhile."""

    hashes: Mapping[str, str] = field(default_factory=dict)
    pairs: int | None = None


def identify(planned: Plan, *, pairs: int | None = None) -> Inputs:
    """A plan's inputs, of its pairs the first `pairs` (None: all). Reads every file once, large ones only where they are not known yet."""
    teacher, init = planned.recipe.teacher, planned.recipe.student.init
    hashes = {TEACHER: source_hash(teacher.pretrained, teacher.revision, teacher.adapters), **planned.method.files(planned.method_config)}
    if teacher.lora is not None:
        hashes[LORA] = lora_hash(teacher.adapters)
    if planned.prompts is not None and planned.recipe.data.prompts is not None:  # else they are the pairs' own
        hashes["data.prompts"] = digest(list(planned.prompts.items()))
    if planned.images is not None:
        hashes["data.images"] = planned.images.content()
    if planned.pairs is not None:
        pairs = planned.pairs.count if pairs is None else pairs
        hashes["data.pairs"] = pair_folder.content(planned.pairs, pairs)
    if planned.protocol is not None:
        hashes[PROTOCOL] = planned.protocol.hash()
    if init != "teacher" and not planned.started:  # all that it brings is in the checkpoint of a run that has begun
        hashes[INIT] = checkpoint.identity(expanded(init))
    if planned.kept is not None:
        hashes[KEPT] = json.dumps(planned.kept)
    if planned.expert_sizes and planned.used is None:
        hashes[EXPERTS] = json.dumps(planned.expert_sizes)
    if planned.recipe.data.buckets is not None:
        hashes[SIZES] = json.dumps([list(family.picture_shape[-2:]) for family in planned.families])
    return Inputs(hashes, pairs if planned.pairs is not None else None)


def as_begun(planned: Plan, began: Inputs) -> Plan:
    """The plan with what was found when the run began: the blocks that importance chose, and the prompts of the pairs that it had."""
    if KEPT in began.hashes:
        planned = replace(planned, kept=json.loads(began.hashes[KEPT]))
    if planned.started:  # else they are measured once more
        planned = replace(planned, expert_sizes=json.loads(began.hashes.get(EXPERTS, "{}")), used=None)
    if planned.pairs is not None and began.pairs is not None and planned.recipe.data.prompts is None and planned.images is None:
        planned = replace(planned, prompts=pair_folder.weighted_prompts(planned.pairs, began.pairs))
    return planned


def kept_by(run_dir: Path) -> Mapping[str, Sequence[int]]:
    """The blocks that importance chose for the students of another run."""
    return json.loads(checkpoint.read_state(checkpoint.latest(run_dir))["inputs"][KEPT])


def write(run_dir: Path, inputs: Inputs) -> None:
    """Record what a run begins with."""
    write_atomically(run_dir / FILE, json.dumps(sealed({"hashes": dict(inputs.hashes), "pairs": inputs.pairs}), indent=1) + "\n")


def recorded(run_dir: Path, state: Mapping[str, Any] | None) -> Inputs:
    """What a run goes on with: as its folder says, else the state of a checkpoint; nothing where neither does."""
    try:
        found = _read(run_dir / FILE)
    except UserError:
        if state is None:
            raise
        found = Inputs()
    if found.hashes or state is None:
        return found
    return Inputs(state["inputs"], state["pairs"] if "data.pairs" in state["inputs"] else None)


class _Record(records.Schema):
    hashes: dict[str, str]
    pairs: Annotated[int, Field(ge=0)] | None


def _read(file: Path) -> Inputs:
    if not file.is_file():
        return Inputs()
    record = records.read(file)
    with reading(file):
        content = records.checked(unsealed(record), _Record)
    return Inputs(content["hashes"], content["pairs"])


def began_as(run_dir: Path, state: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The resolved recipe of the run in `run_dir`: that of its folder, else that of a checkpoint's state; None where there is neither."""
    if (run_dir / "recipe.yaml").is_file():
        return read_yaml(run_dir / "recipe.yaml")
    return None if state is None else state["recipe"]


def check_same(run_dir: Path, planned: Plan, state: Mapping[str, Any] | None, allowed: Collection[str] = ()) -> tuple[Inputs, dict[str, list[Any]]]:
    """What the run in `run_dir` goes on with, and of the keys in `allowed` those that have changed, each with what was and what is; so is a
    protocol with another content.

    UserError unless `planned` has the same numbers in its recipe and the same content behind its paths but for these. state: of the
    checkpoint to go on from, None where there is none.
    """
    before = began_as(run_dir, state)
    then, now = {} if before is None else flatten(_completed(before, planned)), flatten(planned.resolved())
    _check_allowed(allowed, then.keys() | now.keys())
    began = recorded(run_dir, state)
    found = identify(planned, pairs=began.pairs)
    compared = dict(found.hashes)
    if planned.started and then.get(INIT) != now[INIT] != "teacher" and Path(now[INIT]).is_dir():  # the same run moved, or another
        compared[INIT] = checkpoint.identity(Path(now[INIT]))
    by_content = began.hashes.keys() & compared.keys()
    changed = {key: [then.get(key), now.get(key)] for key in _by_name(then, now, by_content)} if then else {}
    renewed = {key for key in by_content if began.hashes[key] != compared[key]}
    for key in sorted(changed.keys() | renewed):
        if key.startswith(_RESUMABLE) or _is_allowed(key, allowed):
            continue
        way_on = "" if key.startswith(_FOR_GOOD) else f", or pass --allow-change {key}"
        if key in changed:
            ours, theirs = (f"recipe key {key} is {now.get(key)!r}", f"the run in {str(run_dir)!r} has {then.get(key)!r}")
            raise UserError(f"--resume: {ours}, {theirs}; resume with the same recipe{way_on}")
        what = _changed(then.get(key), now.get(key))
        if key == SIZES:
            what = f"data.images asks for the sizes {compared[key]}, with {began.hashes[key]} the run began"
        raise UserError(f"--resume: recipe key {key}: {what}; resume with what the run in {str(run_dir)!r} has{way_on}")
    hashes = {**began.hashes, **{key: compared[key] for key in renewed}} if began.hashes else found.hashes
    return Inputs(hashes, found.pairs), changed | {key: [began.hashes[key], compared[key]] for key in renewed}


def _completed(before: Mapping[str, Any], planned: Plan) -> dict[str, Any]:
    """The resolved recipe of a run, with the defaults of keys that have been added since an older fastgen wrote it."""
    blocks: dict[str, Any] = {name: each.annotation for name, each in Recipe.model_fields.items() if name != "optimizer"}
    blocks["distiller"] = planned.method.Config
    completed = {**before, **{name: _with_defaults(block, before.get(name, {})) for name, block in blocks.items()}}
    if isinstance(roles := before.get("optimizer"), dict):
        completed["optimizer"] = {role: _with_defaults(OptimizerBlock, block) for role, block in roles.items()}
    return completed


def _with_defaults(block: type[BaseModel], before: Any) -> Any:
    if not isinstance(before, dict):  # of a damaged file
        return before
    new = {name: each for name, each in block.model_fields.items() if name not in before and not each.is_required()}
    inner = {name: below for name, each in block.model_fields.items() if isinstance(before.get(name), dict) and (below := _block_in(each.annotation))}
    before = {**before, **{name: _with_defaults(below, before[name]) for name, below in inner.items()}}
    return {**before, **{name: to_jsonable_python(each.get_default(call_default_factory=True)) for name, each in new.items()}}


def _block_in(annotation: Any) -> type[BaseModel] | None:
    """The block of an annotation such as `Block | None`."""
    return next((each for each in (annotation, *get_args(annotation)) if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _by_name(then: Mapping[str, Any], now: Mapping[str, Any], by_content: Collection[str]) -> list[str]:
    """Keys that differ and that nothing but their value tells."""
    silent = {"teacher.revision"} if TEACHER in by_content else set()
    if "data.pairs" in by_content:
        silent |= {"data.pairs.from"}
    keys = (then.keys() | now.keys()) - silent - set(by_content)
    return [key for key in keys if not key.startswith(_RESUMABLE) and then.get(key) != now.get(key)]


def _check_allowed(allowed: Collection[str], known: Collection[str]) -> None:
    for key in allowed:
        if not any(name == key or name.startswith(f"{key}.") for name in known):
            raise UserError(f"--allow-change: no recipe key {key!r}; {nearest(key, known)}")
        if key.startswith(_FOR_GOOD) or any(name.startswith(f"{key}.") for name in _FOR_GOOD):
            raise UserError(f"--allow-change: {key} decides what is trained, so a run cannot go on with another; start a new one")


def _is_allowed(key: str, allowed: Collection[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in allowed)


def _changed(then: Any, now: Any) -> str:
    return f"{now!r} has changed since the run began" if then == now else f"{now!r} holds something else than {then!r}, with which the run began"


def at_its_commit(recipe: Recipe, before: Mapping[str, Any] | None) -> Recipe:
    """A recipe without teacher.revision goes on with the commit that a run began with, whose recipe was `before`, though the hub may have
    moved on."""
    teacher = (before or {}).get("teacher")
    if recipe.teacher.revision is not None or not isinstance(teacher, dict) or teacher.get("pretrained") != recipe.teacher.pretrained:
        return recipe
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"revision": teacher.get("revision")})})


def check_teacher(began: Mapping[str, str], planned: Plan) -> None:
    """UserError where a run's teacher is another than it was, so that what it exports would be another student."""
    teacher = planned.recipe.teacher
    if TEACHER in began and began[TEACHER] != source_hash(teacher.pretrained, teacher.revision, teacher.adapters):
        key, what = (TEACHER, repr(teacher.pretrained))
        if LORA in began and began[LORA] != lora_hash(teacher.adapters):
            key, what = LORA, "one of the teacher's adapters"
        raise UserError(f"recipe key {key}: {what} has changed since the run began; the student would be another")
