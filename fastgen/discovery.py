"""Methods and families are found by file name: one module, one class, no registry to edit."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import TypeVar

from fastgen.errors import UserError, nearest

T = TypeVar("T")


def module_names(package: str, *, shared: Iterable[str]) -> list[str]:
    """Modules of a package, without those in `shared`."""
    path = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if module.name not in set(shared))


def find_class(package: str, name: str, base: type[T], names: list[str], refusal: str) -> type[T]:
    """The one subclass of `base` that `package.name` defines; UserError with `refusal` unless `name` is among `names`."""
    if name not in names:
        raise UserError(f"{refusal}; {nearest(name, names)}")
    module = importlib.import_module(f"{package}.{name}")
    found = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, base) and v.__module__ == module.__name__]
    assert len(found) == 1, f"{module.__name__} must define exactly one {base.__name__}"
    return found[0]
