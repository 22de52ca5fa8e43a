"""Packages that only some recipes need; those of the extra `quantise`."""

from __future__ import annotations

from importlib.util import find_spec

from fastgen.errors import UserError


def check_package(package: str, what: str) -> None:
    """UserError unless a package is installed; what: what needs it."""
    if find_spec(package) is None:
        raise UserError(f"{what} needs the package {package}, which is not installed: pip install 'fastgen-distill[quantise]'")
