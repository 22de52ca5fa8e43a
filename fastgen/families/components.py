"""One component of a foreign pipeline as it is configured: what its class is called, and its options with that class's own defaults.

A configuration means nothing without its class: the same key can be missing, ignored, or have another default in the next one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from torch import nn

from fastgen import records
from fastgen.errors import UserError
from fastgen.surgery.moe import stored

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
    file: Path | None = None  # None: of a live pipeline
    experts: Mapping[str, Any] | None = None  # of a network whose layers were split (`moe.stored.Description`)

    def check(self, schema: type[records.Schema]) -> None:
        """UserError unless the options that are given are as a schema says, which has bounds for what sizes a network."""
        given = {key: list(value) if isinstance(value, tuple) else value for key, value in self.given.items()}
        try:
            records.checked(given, schema)
        except ValueError as error:
            where = f"its {self.name}" if self.file is None else f"{str(self.file)!r}"
            raise UserError(f"recipe key teacher.pretrained: {where}: {error}") from error

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


class Index(records.Schema):
    """model_index.json. Its components are [library, class], or [null, null] where a pipeline goes without."""

    class_name: str | list[str] | None = Field(default=None, alias="_class_name", min_length=1)
    __pydantic_extra__: dict[str, Any]

    @model_validator(mode="after")
    def _components(self) -> Index:
        for key, value in self.__pydantic_extra__.items():
            if isinstance(value, list) and not (len(value) == 2 and all(part is None or (isinstance(part, str) and part) for part in value)):
                raise ValueError(f"{key} is {records.shown(value)}, not [library, class]")
        return self


def read_index(folder: Path) -> dict[str, Any]:
    """A pipeline folder's model_index.json; UserError unless it names a library and a class for each component."""
    return of_teacher(folder / "model_index.json", Index)


def of_teacher(path: Path, schema: Any = dict[str, Any]) -> dict[str, Any]:
    """`records.read` of a file in a pipeline's folder; the UserError names the recipe key."""
    try:
        return records.read(path, schema)
    except UserError as error:
        raise UserError(f"recipe key teacher.pretrained: {error}") from error


def check_sizes(folder: Path) -> None:
    """UserError for a number in a component's configuration with which building it, which comes before reading its weights, would not end."""
    for name, entry in read_index(folder).items():
        file = folder / name / "config.json"
        if isinstance(entry, list) and file.is_file():
            for key, value in _numbers(of_teacher(file)):
                least, most = next(((least, most) for pattern, least, most in _LIMITS if re.search(pattern, key)), (value, value))
                if not least <= value <= most:
                    what = f"key {key} is {records.shown(value)}, not a number from {least:,} to {most:,}"
                    raise UserError(f"recipe key teacher.pretrained: {str(file)!r}: {what}")


_SIZE = r"(size|dims?|d_\w+|width|channels|heads?|embeddings|buckets|groups|vocab|length|positions?)(\.\d+)?$"
# By what ends a key: how many layers or blocks, how large a dimension; all else is only a number.
_LIMITS = (
    (r"(^|\.)num_(hidden_)?layers$", 1, 1000),
    (r"(layers?|blocks?|per_block|depth)(\.\d+)?$", -1000, 1000),
    (rf"(^|[._]){_SIZE}", -1, 2**22),
)


def _numbers(node: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number in JSON data with its dotted key."""
    if isinstance(node, (int, float)) and not isinstance(node, bool):
        yield key, node
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, below in pairs:
        yield from _numbers(below, f"{key}.{name}" if key else str(name))


def _stored(folder: Path, name: str) -> Component:
    file = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
    given = of_teacher(file)
    if "experts" in given:
        return _of_experts(folder, name, given, file)
    index, own = _class_name(read_index(folder).get(name)), _class_name(given.get("_class_name"))
    agree = index is not None and own is not None and index.endswith(f".{own}")  # for another library's class only the index names the library
    return Component(name, tuple(dict.fromkeys(said for said in (index, None if agree else own) if said)), given, file)


def _of_experts(folder: Path, name: str, given: dict[str, Any], file: Path) -> Component:
    """A network as fastgen exports it with experts: as if it were the dense one, and what became of its layers. None of the folder's code runs."""
    description, entry = of_teacher(file, WithExperts)["experts"], read_index(folder).get(name)
    dense = description["dense"]
    if not (isinstance(entry, list) and entry == stored.entry(dense)):
        raise UserError(f"recipe key teacher.pretrained: {str(file)!r} describes experts, and model_index.json names another class, {entry}")
    return Component(name, (dense,), without_experts(given), file, description)


class WithExperts(records.Schema):
    """config.json of a network whose layers were split."""

    experts: stored.Description


def without_experts(given: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's options of the dense class."""
    return {key: value for key, value in given.items() if key not in ("experts", "quantization_config", "_class_name")}


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
