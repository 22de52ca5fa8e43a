"""One component of a foreign pipeline as it is configured: what its class is called, and its options with that class's own defaults.

A configuration means nothing without its class: the same key can be missing, ignored, or have another default in the next one.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from fastgen.errors import UserError
from fastgen.files import reading

# What a scheduler's owner can change after it was built, and where the stock `set_timesteps` then reads it.
_SET_LATER = {"shift": "_shift", "scale_factors": "_scale_factors"}


@dataclass(frozen=True)
class Component:
    """name: the pipeline's attribute, and its sub-folder. classes: what model_index.json and the component's own configuration say its
    class is, so two when they disagree; with the library before it where that is not diffusers; empty for a live network of no
    diffusers class. given: the options as they stand there."""

    name: str
    classes: tuple[str, ...]
    given: Mapping[str, Any]

    def option(self, key: str) -> Any:
        """As given, else the class's own default; UserError where there is neither."""
        options = self.given if key in self.given or not self.classes else defaults(self.classes[0])
        if key not in options:
            raise UserError(f"recipe key teacher.pretrained: its {self.name} has no {key}")
        return options[key]


@lru_cache
def defaults(class_name: str) -> dict[str, Any]:
    """Options of a diffusers class with their defaults, from its signature in the installed version."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def read_component(source: Any, name: str) -> Component:
    """source: a diffusers folder as a Path, or a live pipeline. UserError where it has no such component, or none that can be read."""
    if isinstance(source, Path):
        return _stored(source, name)
    part = getattr(source, name, None)
    if part is None:
        raise UserError(f"recipe key teacher.pretrained: the live {type(source).__name__} has no {name}")
    config = dict(part.config)
    # Attributes, which is what diffusers' own code reads: assigning one leaves the dictionary behind it as it was.
    given = {key: getattr(part.config, key, value) for key, value in config.items()}
    given |= {key: getattr(part, where) for key, where in _SET_LATER.items() if hasattr(part, where)}
    return Component(name, _live_classes(part), given)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError when there is none."""
    with reading(path):
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
    return data


def _stored(folder: Path, name: str) -> Component:
    given = read_json(folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json"))
    index, own = _class_name(read_json(folder / "model_index.json").get(name)), _class_name(given.get("_class_name"))
    agree = index is not None and own is not None and index.endswith(f".{own}")  # for another library's class only the index names the library
    return Component(name, tuple(dict.fromkeys(said for said in (index, None if agree else own) if said)), given)


def _class_name(entry: Any) -> str | None:
    """Of `CLASS` or `[LIBRARY, CLASS]`; None for anything else, such as the `[null, null]` of a component that a pipeline goes without."""
    library, cls = entry if isinstance(entry, list) and len(entry) == 2 else ("diffusers", entry)
    if not (isinstance(library, str) and isinstance(cls, str)):
        return None
    return cls if library == "diffusers" else f"{library}.{cls}"


def _live_classes(part: Any) -> tuple[str, ...]:
    """A network is called like the diffusers class it derives from; a scheduler's subclass may step elsewhere, so that counts itself."""
    if hasattr(part, "set_timesteps"):
        cls = type(part)
        return (cls.__name__ if cls.__module__.startswith("diffusers.") else f"{cls.__module__}.{cls.__name__}",)
    network = part._orig_mod if isinstance(part, nn.Module) and "_orig_mod" in part._modules else part  # torch.compile's wrapper
    return tuple(cls.__name__ for cls in type(network).__mro__ if cls.__module__.startswith("diffusers."))[:1]
