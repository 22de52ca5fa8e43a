"""How an evaluation is done, as far as the protocol does not say, and where its features are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fastgen.errors import UserError, shown
from fastgen.evaluation.extraction import WHOLE, Part
from fastgen.evaluation.places import stores_folder, temporary
from fastgen.files import check_writable
from fastgen.progress import Progress


@dataclass(frozen=True)
class Settings:
    """root: the folder of stores, None for ~/.cache/fastgen/evaluations. part: draws only these chunks. stop_after: only the first pictures of
    each set, for a quick look. batch_size: pictures drawn at once, None for the protocol's own; it changes rounding alone. allow_pickle: read
    a reference that is a pickle, of numbers alone. references: the folder of real pictures' stores, None for the same one."""

    root: Path | None = None
    part: Part = WHOLE
    stop_after: int | None = None
    batch_size: int | None = None
    allow_pickle: bool = False
    references: Path | None = None

    @property
    def stores(self) -> Path:
        """UserError where there is no home."""
        return stores_folder() if self.root is None else self.root

    @property
    def reference_stores(self) -> Path:
        return self.stores if self.references is None else self.references


def part_of(text: str) -> Part:
    """The part that `i/n` names, from 1/1. UserError for anything else."""
    index, _, of = text.partition("/")
    if not (index.isdecimal() and of.isdecimal() and max(len(index), len(of)) <= 7 and 1 <= int(index) <= int(of) <= 10**6):
        raise UserError(f"--part: {shown(text, 40)} is not i/n, such as 1/4 to 4/4")
    return Part(int(index) - 1, int(of))


@contextmanager
def with_root(settings: Settings, progress: Progress) -> Iterator[Settings]:
    """The settings with a folder of stores that can be written. Unless somebody says where, features are kept for this evaluation only where
    there is no such place, and that is said; parts have to be kept. UserError where they cannot be."""
    try:
        root = settings.root or stores_folder()
        check_writable(root, "--store")
    except UserError as error:
        if settings.root is not None or settings.part != WHOLE:
            raise
        progress.warn(f"warning: features are not kept: {str(error).removeprefix('--store: ')}")
        with temporary() as root:
            yield replace(settings, root=root)
    else:
        yield replace(settings, root=root)
