"""One file per method. `distiller.name: x` takes the one Distiller of `fastgen.distillers.x`; there is no registry to edit."""

from __future__ import annotations

import importlib
import pkgutil

from fastgen.distillers.base import Distiller
from fastgen.errors import UserError, nearest


def distiller_names() -> list[str]:
    """Modules of this package that define a Distiller."""
    shared = {"base", "losses", "points", "rollout"}
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in shared)


def distiller_class(name: str) -> type[Distiller]:
    """The method's class; UserError for an unknown name."""
    if name not in distiller_names():
        raise UserError(f"recipe key distiller.name: {name!r} is not a method; {nearest(name, distiller_names())}")
    module = importlib.import_module(f"fastgen.distillers.{name}")
    found = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Distiller) and v.__module__ == module.__name__]
    assert len(found) == 1, f"{module.__name__} must define exactly one Distiller"
    return found[0]
