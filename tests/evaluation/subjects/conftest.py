"""Tiny pipelines of every kind as folders, saved once a session; read-only by agreement."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_MODULES = {"tiny_sd3": "pipelines"} | dict.fromkeys(("tiny_ddpm", "tiny_grey_ddim", "tiny_consistency"), "tiny_unconditional")


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline, by the name of the function that makes it: most of them are among the tests of families."""
    families = str(Path(__file__).parents[2] / "families")
    if families not in sys.path:
        sys.path.append(families)

    def folder(name: str) -> Path:
        path = tmp_path_factory.getbasetemp() / "subjects" / name
        if not path.exists():
            getattr(importlib.import_module(_MODULES.get(name, name)), name)().save_pretrained(path)
        return path

    return folder
