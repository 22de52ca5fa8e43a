"""One small file per diffusers pipeline family; `find_family` picks it from the pipeline's class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastgen.discovery import find_class, module_names
from fastgen.errors import UserError, nearest
from fastgen.families.base import Family


def family_names() -> list[str]:
    """Names that `teacher.family` accepts beside `auto`."""
    return module_names(__name__, shared=("base", "components", "schedules"))


def family_class(name: str) -> type[Family]:
    """The one Family that `fastgen.families.<name>` defines; UserError for an unknown name."""
    names = [*family_names(), "auto"]  # `auto` is resolved before, in find_family
    return find_class(__name__, name, Family, names, f"recipe key teacher.family: {name!r} is not a family")


def find_family(source: Any, name: str = "auto", **options: Any) -> Family:
    """The family of a teacher or student. source: `fastgen:NAME`, `toy:NAME`, a diffusers folder, a hub id, or a live pipeline."""
    if name == "auto":
        name = "toy" if isinstance(source, str) and source.startswith("toy:") else _family_of(_pipeline_class(source))
    family = family_class(name)(source, **options)
    _ = family.shift  # read now, so that a schedule which cannot be followed is refused before anything is loaded
    return family


def _family_of(pipeline_class: str) -> str:
    by_class = {cls: name for name in family_names() for cls in family_class(name).pipeline_classes}
    if pipeline_class not in by_class:
        raise UserError(f"recipe key teacher.pretrained: no family for pipeline class {pipeline_class!r}; supported: {', '.join(sorted(by_class))}")
    return by_class[pipeline_class]


def _pipeline_class(source: Any) -> str:
    if not isinstance(source, (str, Path)):
        return type(source).__name__
    path = resolve_source(source) / "model_index.json"
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["_class_name"]
        return name[-1] if isinstance(name, list) else str(name)
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"recipe key teacher.pretrained: {str(path)!r} is not JSON with a '_class_name'") from error


def resolve_source(source: str | Path) -> Path:
    """The local diffusers folder behind a source; hub ids are downloaded into the hub's cache. UserError when there is none."""
    text = str(source)
    if text.startswith("fastgen:"):
        return _bundled(text.removeprefix("fastgen:"))
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"recipe key teacher.pretrained: {text!r} is a folder without model_index.json, so not a diffusers pipeline")
        return folder
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise UserError(f"recipe key teacher.pretrained: no folder {text!r}; allowed: fastgen:NAME, a hub id 'owner/name', or a diffusers folder")
    return _download(text)


def _bundled(name: str) -> Path:
    assets = Path(__file__).parent.parent / "assets"
    names = [folder.parent.name for folder in sorted(assets.glob("*/model_index.json"))]
    if name not in names:
        raise UserError(f"recipe key teacher.pretrained: no bundled teacher {name!r}; {nearest(name, names)}")
    return assets / name


def _download(hub_id: str) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(hub_id))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"recipe key teacher.pretrained: cannot get {hub_id!r} from the hub ({reason})") from error
