"""fastgen: distil diffusion and flow models into students that generate in one to four network evaluations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen.config import Recipe as Recipe
    from fastgen.generator import load_student as load_student
    from fastgen.generator import load_teacher as load_teacher
    from fastgen.generator import load_teacher_of as load_teacher_of
    from fastgen.run import evaluate as evaluate
    from fastgen.run import train as train

__version__ = "0.1.0"
__all__ = ["Recipe", "evaluate", "load_student", "load_teacher", "load_teacher_of", "train"]

# Public names resolve on first use, so that `import fastgen` costs milliseconds and torch loads only when needed.
_HOMES = {
    "Recipe": "fastgen.config",
    "evaluate": "fastgen.run",
    "load_student": "fastgen.generator",
    "load_teacher": "fastgen.generator",
    "load_teacher_of": "fastgen.generator",
    "train": "fastgen.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
