"""Where the features of evaluations are kept."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastgen.errors import UserError

STORES = Path(".cache/fastgen/evaluations")  # below the home folder


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="fastgen-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stores_folder() -> Path:
    """~/.cache/fastgen/evaluations, where features are kept unless somebody says where. UserError where there is no home."""
    try:
        return Path.home() / STORES
    except RuntimeError as error:
        raise UserError(f"--store: needed, for there is no home folder ({error})") from error
