"""Weights of feature extractors: files that are looked up in one folder, checked by their SHA-256, and never downloaded behind one's back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgen.errors import UserError
from fastgen.fingerprints import known_hash


class Unavailable(UserError):
    """A metric cannot be measured here, for lack of a file, a package, a reference or enough images: the message says of what, and the
    way on. The other metrics are measured."""


@dataclass(frozen=True)
class Weights:
    """Where weights lie; folder: `--weights-dir`, None where none was given. UserError for a name that leads out of it."""

    folder: Path | None = None

    def file(self, name: str, *, source: str, sha256: str | None = None) -> Path:
        """The file `name` below the folder. source: where it can be had, for the message. sha256: what its hash must begin with, None
        where nobody has recorded it. Unavailable where it is missing or another."""
        path = self._place(name, source)
        if not path.is_file():
            raise Unavailable(f"needs {name}, which is not in {str(self.folder)!r}: get it from {source} and put it there")
        if sha256 is not None and not (found := known_hash(path)).startswith(sha256):
            raise Unavailable(f"{str(path)!r} is not the file that is needed: its SHA-256 is {found}, not {sha256}; get it from {source}")
        return path

    def directory(self, name: str, *, source: str, files: Sequence[str] = ()) -> Path:
        """The folder `name` below the folder, as model hubs have it, with these files in it. Unavailable where it, or one of them, is missing."""
        path = self._place(name, source)
        if not path.is_dir():
            raise Unavailable(f"needs the folder {name}, which is not in {str(self.folder)!r}: get it from {source} and put it there")
        for file in files:
            self.file(f"{name}/{file}", source=source)
        return path

    def _place(self, name: str, source: str) -> Path:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"weights {name!r}: they are looked up below --weights-dir; give their name there, without .. and not from the root")
        if self.folder is None:
            raise Unavailable(f"needs {name} from {source}: put it into a folder and name that with --weights-dir (recipe key evaluate.weights_dir)")
        return self.folder / name
