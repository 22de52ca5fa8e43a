"""What processes of one command need to have alike."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import fastgen
from fastgen.config import flatten
from fastgen.group import Alone

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")


def agree(members: Alone, what: Mapping[str, object]) -> None:
    """UserError where processes have other versions, or other values of these, by what they are called."""
    if members.world_size > 1:
        versions = {"Python": platform.python_version(), "fastgen": fastgen.__version__}
        versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
        members.same(versions | {name: repr(value) for name, value in what.items()})


def by_key(resolved: Mapping[str, Any]) -> dict[str, object]:
    """The values of a recipe, as `agree` takes them."""
    return {f"recipe key {key}": value for key, value in flatten(resolved).items()}
