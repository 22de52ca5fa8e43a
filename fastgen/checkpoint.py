"""Atomic checkpoints of everything a run needs to go on bit for bit: every trained role, its optimizer, the averages, the method's
running statistics, and the step.

Random numbers and data positions are functions of the step (rng.py), so there is nothing else to save. Tensors are safetensors
(tensor_files.py), which any number of processes reads, replicas as well as shards; nothing is pickled. A checkpoint appears under its final name
only when every process has written its part. What never changes, a frozen network that is not the teacher's, is written once: each checkpoint has
a link to the file of the one before. `state.json` holds the hash of every other file, and its own seal; whoever loads from a
checkpoint checks what it reads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from fastgen import records
from fastgen.errors import UserError
from fastgen.files import OLD, PARTIAL, publish, reading, recover, remove, remove_partial, share, write_atomically, writing
from fastgen.fingerprints import check_files, digest, sealed, unsealed
from fastgen.group import Alone
from fastgen.optimizers import load_states, move_states, state_tensors
from fastgen.roles import Role, Roles
from fastgen.trainer import Metrics, Trainer

if TYPE_CHECKING:
    from fastgen.tensor_files import Group, Saved

FORMAT = 5
BY_INDEX = 4  # the format that named optimizers' states by their parameters' places, which is read still
BASE = "base_"  # components that are the same in all checkpoints of a run
NO_OTHER = "no other checkpoint is complete: fastgen train … --overwrite starts over"


@dataclass(frozen=True)
class Content:
    """Of a checkpoint: the record without its files, and tensors by component."""

    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    @classmethod
    def of(
        cls, trainer: Trainer, recipe: dict[str, Any], *, inputs: Mapping[str, str] | None = None, metrics: Metrics | None = None, apart: bool = False
    ) -> Content:
        """Of a run as it stands. inputs: what it was begun with, by content; metrics: of this step, which it may be killed before it logs.
        apart: as copies in the CPU's memory, which do not change when it goes on."""
        trained = [name for name in trainer.ema if trainer.distiller.finished(name, trainer.step)]
        pairs = trainer.data.num_pairs
        state = {"format": FORMAT, "step": trainer.step, "seconds": trainer.seconds, "trained": trained, "pairs": pairs}
        state |= {"recipe": recipe, "inputs": dict(inputs or {}), "metrics": dict(metrics or {})}
        tensors = _tensors(trainer)
        if apart:
            tensors = {name: own if name.startswith(BASE) else _copied(own) for name, own in tensors.items()}
        return cls(state, tensors)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().to("cpu", copy=True) for key, value in tensors.items()}


def save(folder: Path, trainer: Trainer, recipe: dict[str, Any], *, keep: int, group: Group = None) -> Path:
    """`write` what a run is now."""
    return write(folder, Content.of(trainer, recipe), keep=keep, group=group)


def write(folder: Path, content: Content, *, keep: int, group: Group = None) -> Path:
    """Write `folder`/step_NNNNNN and delete all but the newest `keep`; returns its path. UserError where that cannot be done, and then nothing
    of it is left. group: of the processes that write it together, each its own files; the first writes the record, once all have."""
    from fastgen import tensor_files

    target = folder / f"step_{content.state['step']:06d}"
    partial = target.with_name(PARTIAL + target.name)
    is_main = group is None or group.rank() == 0

    def begin() -> dict[str, str]:
        if not is_main:
            return {}
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return _linked(folder, partial, content)

    def end() -> None:
        if is_main:
            share(partial)
            files = {name: value for own in (linked, *written) for name, value in sorted(own.items())}
            write_atomically(partial / "state.json", json.dumps(sealed({**content.state, "files": files}), indent=1))
            publish(partial, target)

    with writing(target):
        try:
            linked = tensor_files.together(group, begin)[0]
            there = {component(file) for file in linked}
            new = {name: tensors for name, tensors in content.tensors.items() if name not in there}
            written = tensor_files.together(group, lambda: tensor_files.write(partial, new, target=target, group=group))
            tensor_files.together(group, end)
        except BaseException:
            if is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in checkpoints(folder)[:-keep] if is_main else ():
            remove(old)
    return target


def _linked(folder: Path, partial: Path, content: Content) -> dict[str, str]:
    """Files in `partial` that are those of the newest checkpoint beside it, with their hashes: what is the same in all. None where there is no
    checkpoint yet, or the disk has no links; then they are written."""
    names = {name for name in content.tensors if name.startswith(BASE)}
    if not names or not (before := checkpoints(folder)[-1:]):
        return {}
    made: dict[str, str] = {}
    try:
        for file, value in read_state(before[0])["files"].items():
            if component(file) in names:
                os.link(before[0] / file, partial / file)
                made[file] = value
    except (OSError, UserError):
        for file in made:
            (partial / file).unlink()
        return {}
    return made


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Other names, such as those of copies, are none."""
    named = {int(found.group(1)): path for path in folder.glob("step_*") if (found := re.fullmatch(r"step_(\d{6,18})", path.name))}
    return [path for step, path in sorted(named.items()) if path.name == f"step_{step:06d}" and (path / "state.json").is_file()]


def latest(run_dir: Path) -> Path:
    """The newest checkpoint of a run folder; UserError when there is none."""
    found = checkpoints(run_dir / "checkpoints")
    if not found:
        raise UserError(f"{str(run_dir)!r} holds no checkpoint")
    return found[-1]


def opened(run_dir: Path, name: str | None = None, members: Alone | None = None) -> tuple[Path, dict[str, Any]]:
    """A run's newest checkpoint, or that of a name such as step_000100, with its state; every byte of it has been checked.

    members: the processes that call this, each of which reads its share of the files. UserError when there is none; when it is damaged, the error
    says which is the newest that is not.
    """
    found = checkpoints(run_dir / "checkpoints")
    if name is None:
        chosen = latest(run_dir)
    else:
        number = re.fullmatch(r"(?:step_)?(\d{1,18})", name)
        chosen = run_dir / "checkpoints" / f"step_{int(number.group(1)) if number else 0:06d}"
        if number is None or chosen not in found:
            have = ", ".join(path.name for path in found) or "none"
            raise UserError(f"--resume-from: {str(run_dir)!r} holds no checkpoint {name!r}; it has {have}")
    members = members or Alone()
    try:
        return chosen, check(chosen, members)
    except UserError as error:
        whole = members.told(lambda: getattr(newest_whole([path for path in found if path != chosen]), "name", None))
        other = f"the newest complete one is {whole}: fastgen train … --resume-from {whole} goes on from it" if whole else NO_OTHER
        raise UserError(f"{error}; {other}") from error


def newest_whole(found: Sequence[Path]) -> Path | None:
    """The newest of some checkpoints, oldest first, of which every byte is as it was saved."""
    for path in reversed(found):
        try:
            check(path)
        except UserError:
            continue
        return path
    return None


def check(checkpoint: Path, members: Alone | None = None) -> dict[str, Any]:
    """A checkpoint's state; UserError unless every byte of it is as it was saved. members: share the reading, and all raise what one finds."""
    members = members or Alone()
    state, wrong = {}, None
    try:
        state = read_state(checkpoint)
        _check_against(checkpoint, state, range(members.rank, len(state["files"]), members.world_size))
    except UserError as error:
        wrong = str(error)
    seen = members.each((wrong, digest(state)))
    for found, _ in seen:
        if found is not None:
            raise UserError(found)
    if len({of for _, of in seen}) > 1:  # shares of different lists of files would leave some unread
        raise UserError(f"{str(checkpoint)!r} is not the same for all processes; they need one folder")
    return state


def recover_all(folder: Path) -> None:
    """Put back or remove what kills have left among a run's checkpoints."""
    for old in folder.glob(f"{OLD}step_*"):
        recover(folder / old.name.removeprefix(OLD))
    remove_partial(folder)


def set_aside(run_dir: Path, chosen: Path) -> list[str]:
    """Rename the checkpoints newer than `chosen`, from which a run goes on, so that they do not count any more; returns their new names."""
    found = checkpoints(run_dir / "checkpoints")
    aside = []
    for path in found[found.index(chosen) + 1 :]:
        target = path.with_name(f"abandoned_{path.name}")
        remove(target)
        os.replace(path, target)
        aside.append(target.name)
    return aside


class State(records.Schema):
    """state.json, of the present format."""

    step: Annotated[int, Field(ge=0, lt=10**18)]
    seconds: Annotated[float, Field(ge=0)]
    trained: list[str]
    pairs: Annotated[int, Field(ge=0)] | None
    recipe: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, str]
    metrics: Annotated[dict[str, Any], Field(default_factory=dict)]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's step, resolved recipe, inputs and files, as they were written; UserError for a damaged record or another format."""
    state = records.read(checkpoint / "state.json")
    version = state.get("format")
    if version not in (BY_INDEX, FORMAT) or not isinstance(version, int):
        raise UserError(f"{str(checkpoint)!r} has format {records.shown(version)}; {_why_not(version)}")
    with reading(checkpoint / "state.json"):
        return records.checked(unsealed(state), State)


def _why_not(version: Any) -> str:
    if not isinstance(version, int) or version > FORMAT:
        return f"this version reads {FORMAT}"
    return "its random streams are those of an older fastgen, and here it would go on with others; train again, or resume with fastgen 0.1"


def identity(run_dir: Path) -> str:
    """What a run's newest checkpoint is, wherever it lies: the digest of its record, which holds the hashes of its files."""
    return digest(read_state(latest(run_dir)))


def _check_against(checkpoint: Path, state: Mapping[str, Any], share: range) -> None:
    """UserError unless the files, of which a share is read, are those that were saved: a bit that has flipped, or a file of another role, another
    step or another run."""
    strange = {file.name for file in checkpoint.glob("*.safetensors")} - state["files"].keys()
    if strange:
        raise UserError(f"cannot read {str(checkpoint / min(strange))!r}: it does not belong to this checkpoint")
    names = sorted(state["files"])
    check_files(checkpoint, {names[i]: state["files"][names[i]] for i in share}, "saved")


def load(checkpoint: Path, trainer: Trainer, state: dict[str, Any] | None = None) -> None:
    """Restore everything, strictly: a missing, broken or misshapen tensor is a UserError. What had left memory by then is not there, and
    leaves this trainer's. state: what `opened` gave, which has checked the files already."""
    state = check(checkpoint) if state is None else state
    trainer.move_to(state["step"])
    if (count := trainer.data.num_pairs) is not None:  # their folder may have grown since, and draws depend on their number
        if count < state["pairs"]:
            raise UserError(f"recipe key data.pairs: {count} pairs, but the run began with {state['pairs']}")
        trainer.data = trainer.data.with_first_pairs(state["pairs"])
    with reading(checkpoint):
        for name, role in trainer.roles.trained.items():
            found = _saved(checkpoint, f"role_{name}", state)
            role.check_shapes(found.shapes)
            found.read_into(role.state_dict())
            if base := role.base():
                _read_base(role, base, _saved(checkpoint, f"{BASE}{name}", state))
        for name, optimizer in trainer.optimizers.items():
            parameters = trainer.roles[name].parameters()
            if state["format"] == BY_INDEX:
                parameters = {str(index): parameter for index, parameter in enumerate(parameters.values())}
            states = _saved(checkpoint, f"optimizer_{name}", state).read(lambda flat, own=parameters: own.get(flat.rpartition("/")[0]))
            load_states(name, optimizer, states, list(parameters))
            if trainer.settings.offload_optimizers:
                move_states(optimizer, torch.device("cpu"))
        for name, average in trainer.ema.items():
            found = _saved(checkpoint, f"ema_{name}", state)
            average.check_shapes(found.shapes)
            found.read_into({**average.shadow, "updates": (updates := torch.zeros((), dtype=torch.int64))})
            average.updates = int(updates)
        if statistics := trainer.distiller.statistics:
            found = _saved(checkpoint, "statistics", state)
            _check_statistics(statistics, found.shapes)
            found.read_into(statistics)
    trainer.seconds = state["seconds"]


def trained_students(run_dir: Path) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the students in a run's newest checkpoint whose training is over, and the run's resolved recipe. UserError for a folder without."""
    if not run_dir.is_dir():
        raise UserError(f"recipe key student.init: {str(run_dir)!r} is neither teacher nor the folder of a run")
    if not checkpoints(run_dir / "checkpoints"):
        raise UserError(f"recipe key student.init: {str(run_dir)!r} holds no checkpoint")
    try:
        state = read_state(latest(run_dir))
    except UserError as error:
        raise UserError(f"recipe key student.init: {error}") from error
    return tuple(state["trained"]), state["recipe"]


def load_students(run_dir: Path, roles: Roles, names: Sequence[str]) -> list[str]:
    """Take over those of another run's students in `names` whose training is over, and say which. UserError when they do not fit."""
    newest, trained = latest(run_dir), trained_students(run_dir)[0]
    state = read_state(newest)
    recorded, taken = state["files"], [name for name in names if name in trained]
    for name in taken:
        try:
            files = [file for part in (f"ema_{name}", f"{BASE}{name}") for file in _files_of(part, recorded)]
            check_files(newest, {file: recorded[file] for file in files}, "saved")
        except UserError as error:
            raise UserError(f"recipe key student.init: {error}") from error
        try:
            with reading(newest):
                found = _saved(newest, f"ema_{name}", state)
            del found.shapes["updates"]
            role, base = roles[name], roles[name].base()
            if base and not _files_of(f"{BASE}{name}", recorded):  # of a run that trained all of it: adapters begin on that
                role.check_shapes(found.shapes, role.whole())
                found.read_into(role.whole())
                continue
            role.check_shapes(found.shapes)
            found.read_into(role.state_dict())
            if base:
                _read_base(role, base, _saved(newest, f"{BASE}{name}", state))
        except ValueError as error:
            raise UserError(f"recipe key student.init: {str(run_dir)!r} holds another student than this recipe's: {error}") from error
    return taken


def _read_base(role: Role, base: Mapping[str, Tensor], saved: Saved) -> None:
    """In place, as it is kept: a weight that was rounded may come from one that was not."""
    role.check_shapes(saved.shapes, base)
    saved.read_into(base)


def _tensors(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    files = {f"ema_{name}": average.state_dict() for name, average in trainer.ema.items()}
    if trainer.distiller.statistics:
        files["statistics"] = trainer.distiller.statistics
    for name, role in trainer.roles.trained.items():
        files[f"role_{name}"] = role.state_dict()
        if base := role.base():
            files[f"{BASE}{name}"] = base
    for name, optimizer in trainer.optimizers.items():
        files[f"optimizer_{name}"] = state_tensors(optimizer, list(trainer.roles[name].parameters()))
    return files


def component(file: str) -> str:
    """Such as role_student, of which a file has all, or what one of several processes wrote."""
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", file)


def _files_of(name: str, files: Iterable[str]) -> list[str]:
    return [file for file in files if component(file) == name]


def _saved(checkpoint: Path, name: str, state: Mapping[str, Any]) -> Saved:
    from fastgen.tensor_files import Saved

    names = _files_of(name, state["files"]) or [f"{name}.safetensors"]
    return Saved([checkpoint / file for file in names])


def _check_statistics(own: Mapping[str, Tensor], saved: Mapping[str, torch.Size]) -> None:
    if own.keys() != saved.keys() or any(own[name].shape != saved[name] for name in own):
        raise ValueError(f"statistics of the method do not match: {sorted(own.keys() ^ saved.keys())}")
