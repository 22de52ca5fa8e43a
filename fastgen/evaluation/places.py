"""Where the features of evaluations are kept."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastgen.errors import UserError
from fastgen.files import check_writable
from fastgen.progress import Progress

STORES = Path(".cache/fastgen/evaluations")  # below the home folder


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="fastgen-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def default_stores(progress: Progress) -> Iterator[Path]:
    """Where features are kept unless somebody says where; for this evaluation only where that is no place to write to."""
    try:
        check_writable(root := stores_folder(), "")
    except UserError as error:
        progress.warn(f"features are not kept: {str(error).removeprefix('--store: ')}")
        with temporary() as root:
            yield root
    else:
        yield root


def stores_folder(given: Path | None = None) -> Path:
    """Where features are kept: the given folder, or ~/.cache/fastgen/evaluations. UserError where there is no home."""
    if given is not None:
        return given
    try:
        return Path.home() / STORES
    except RuntimeError as error:
        raise UserError(f"--store: needed, for there is no home folder ({error})") from error
