"""Where the teacher of an exported student is, and the adapters that it was tuned with: what the student records names them by content."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastgen.errors import UserError
from fastgen.families import adapters, source_hash
from fastgen.files import expanded
from fastgen.portable import is_local, source_name
from fastgen.yaml_files import read_yaml


def teacher_source(student: Path, recorded: dict[str, Any], given: str | Path | None = None) -> tuple[str, str | None]:
    """Where a student's teacher is, and at which revision: `given`, what its fastgen.json["teacher"] says, or, where that is the name of
    a local folder, what the recipe of the run that the student lies in says. UserError where there is none, or one whose files are others
    than the student was trained with; those of an older fastgen do not know them."""
    name, lora = recorded["pretrained"], teacher_lora(student, recorded)
    source = str(given) if given is not None else _of_its_run(student, name) if is_local(name) else name
    revision = recorded.get("revision") if source == name else None
    try:
        fits = recorded.get("sha256") in (None, source_hash(source, revision, lora))
    except UserError as error:
        reason = str(error).removeprefix("recipe key teacher.pretrained: ")
        said = f"--teacher: {reason}" if given is not None else f"{str(student)!r}: its teacher: {reason}; {_GIVE_TEACHER}"
        raise UserError(said) from error
    if not fits and given is not None:
        raise UserError(f"--teacher: {source!r} is not the teacher {name!r} that {str(student)!r} was trained with: its SHA-256 differs")
    if not fits:
        raise UserError(f"{str(student)!r}: its teacher {source!r} has changed since the student was trained; {_GIVE_TEACHER}")
    return source, revision


_GIVE_TEACHER = "give the folder of the one it was trained with: --teacher DIR"


def _of_its_run(student: Path, name: str) -> str:
    """The folder `name` that a run's recipe.yaml says, for the student in its folder."""
    source = _recipe_around(student).get("pretrained")
    if not isinstance(source, str) or source_name(source) != name:
        raise UserError(f"{str(student)!r}: its teacher {name!r} was a local folder, and no run around the student says where; {_GIVE_TEACHER}")
    return source


def _recipe_around(student: Path) -> dict[str, Any]:
    """The teacher block of the run that a student lies in; empty where there is none."""
    recipe = Path(os.path.abspath(student)).parent / "recipe.yaml"
    block = read_yaml(recipe).get("teacher") if recipe.is_file() else None
    return block if isinstance(block, dict) else {}


def teacher_lora(student: Path, recorded: dict[str, Any]) -> list[dict[str, Any]]:
    """The adapters of a student's teacher, as families take them: from the student's own folder, else where the recipe of the run around it says,
    else beside the student, else from the hub. UserError where one is not found or has another content."""
    return [_teacher_adapter(student, place, adapter) for place, adapter in enumerate(recorded.get("lora", ()))]


def _teacher_adapter(student: Path, place: int, adapter: dict[str, Any]) -> dict[str, Any]:
    name, listed = adapter["name"], _recipe_around(student).get("lora")
    said = listed[place].get("path") if isinstance(listed, list) and place < len(listed) and isinstance(listed[place], dict) else None
    around = Path(os.path.abspath(student)).parent / source_name(name)
    candidates = [str(student / adapter["file"])] if adapter.get("file") else [*([said] if isinstance(said, str) else []), str(around)]
    path = next((path for path in candidates if expanded(path).exists()), None)
    if path is None and (adapter.get("file") or not adapters.is_on_hub(name)):
        said = f"its teacher's adapter {name!r} is not there, nor does a run around the student say where"
        raise UserError(f"{str(student)!r}: {said}; put it into {str(around.parent)!r}")
    found = {"path": path or name, "weight": adapter["weight"]}
    if adapters.find([found])[0].sha256 != adapter["sha256"]:
        raise UserError(f"{str(student)!r}: its teacher's adapter {found['path']!r} has changed since the student was trained (its SHA-256 differs)")
    return found
