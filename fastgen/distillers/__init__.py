"""One file per method. `distiller.name: x` takes the one Distiller of `fastgen.distillers.x`; there is no registry to edit."""

from __future__ import annotations

from fastgen.discovery import find_class, module_names
from fastgen.distillers.base import Distiller

# What several methods are made of.
SHARED = (
    *("anchor", "base", "by_size", "divergences", "gan", "losses", "matching", "points", "premetrics", "regression", "rollout", "running", "solver"),
    "tangents",
)


def distiller_names() -> list[str]:
    """Names that `distiller.name` accepts."""
    return module_names(__name__, shared=SHARED)


def distiller_class(name: str) -> type[Distiller]:
    """The method's class; UserError for an unknown name."""
    return find_class(__name__, name, Distiller, distiller_names(), f"recipe key distiller.name: {name!r} is not a method")
