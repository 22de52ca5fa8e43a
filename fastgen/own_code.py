"""Functions that a recipe names: bundled ones, `fastgen:name`, and the user's own, `module:function` or `path/to/file.py:function`.

A plan reads a function's file without running it (`check`); building a run imports it (`load`), which runs its module.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fastgen import static
from fastgen.errors import UserError, nearest, one_line
from fastgen.files import expanded
from fastgen.fingerprints import digest, known_hash


@dataclass(frozen=True)
class Named:
    """key: the recipe key, as messages begin; name: its value; what: it is; takes: what the function is called with; bundled: the names that are
    ours."""

    key: str
    name: str
    what: str
    takes: Sequence[str]
    bundled: Sequence[str]

    def own(self) -> str | None:
        """The name of one that is ours; None for the user's. UserError for what is neither."""
        source, function = self._parts()
        if source != "fastgen":
            return None
        if function not in self.bundled:
            raise UserError(f"{self.key}: no bundled {self.what} {self.name!r}; {nearest(function, list(self.bundled))}")
        return function

    def check(self) -> None:
        """UserError where `load` surely fails; runs nothing of the user's."""
        source, function = self._parts()
        file = None if self.own() else self._located(source)
        if file is None or file.suffix != ".py":
            return
        try:
            static.check_function(static.parse(file), function, len(self.takes))
        except SyntaxError as error:
            raise self._unimportable(source, error) from error
        except OSError as error:
            raise UserError(f"{self.key}: {self.name!r}: cannot read {str(file)!r} ({error.strerror})") from error
        except static.Unfit as error:
            what = f"{source} {error}" if str(error).startswith("has no") else f"no function of {self._signature}: {error}"
            raise UserError(f"{self.key}: {self.name!r}: {what}") from error

    def load(self) -> Callable[..., Any]:
        """The user's function, which raises UserError where it raises anything; UserError where there is none."""
        source, function = self._parts()
        module = self._module(source)
        found: Any = getattr(module, function, None)
        if found is None:
            functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise UserError(f"{self.key}: {self.name!r}: {module.__name__} has no {function!r}; {nearest(function, functions)}")
        if not callable(found):
            raise UserError(f"{self.key}: {self.name!r} is a {type(found).__name__}, not a function of {self._signature}")
        try:
            inspect.signature(found).bind(*(None for _ in self.takes))
        except TypeError as error:
            raise UserError(f"{self.key}: {self.name!r} is no function of {self._signature}: {error}") from error
        except ValueError:  # some builtins do not tell
            pass

        @functools.wraps(found)
        def called(*given: Any) -> Any:
            try:
                return found(*given)
            except Exception as error:  # of the user's own code
                raise UserError(f"{self.key}: {self.name!r} raised {type(error).__name__}: {one_line(str(error), 200)}") from error

        return called

    def content(self) -> str:
        """What it is, wherever it lies: SHA-256 of the function's name and of the file of its module; one of ours is its name."""
        source, function = self._parts()
        file = None if source == "fastgen" else self._located(source)
        return self.name if file is None else digest([function, known_hash(file)])

    @property
    def _signature(self) -> str:
        return f"({', '.join(self.takes)})"

    def _parts(self) -> tuple[str, str]:
        """What is left and right of the colon."""
        source, colon, function = self.name.rpartition(":")
        if not colon or not source or not function:
            ours = ", ".join(f"fastgen:{each}" for each in self.bundled)
            raise UserError(f"{self.key}: {self.name!r} is none of {ours}, module:function, path/to/file.py:function")
        return source, function

    def _located(self, source: str) -> Path | None:
        """The file of a function's module; None where it has none, or where only an import can tell."""
        file = Path(source).expanduser()
        if file.suffix == ".py":
            if not file.is_file():
                raise UserError(f"{self.key}: {self.name!r}: no file {source!r}")
            return file
        try:
            return static.source_file(static.find_module(source))
        except (ImportError, ValueError) as error:
            raise self._unimportable(source, error) from error

    def _module(self, source: str) -> ModuleType:
        file = expanded(source)
        if file.suffix == ".py" and not file.is_file():
            raise UserError(f"{self.key}: {self.name!r}: no file {source!r}")
        try:
            return _from_file(file) if file.suffix == ".py" else importlib.import_module(source)
        except Exception as error:  # the user's own code runs here and may raise anything
            raise self._unimportable(source, error) from error

    def _unimportable(self, source: str, error: Exception) -> UserError:
        return UserError(f"{self.key}: {self.name!r}: cannot import {source!r} ({type(error).__name__}: {error})")


def absolute(name: str) -> str:
    """A file that exists by its absolute path, which a resumed run finds from anywhere."""
    source, colon, function = name.rpartition(":")
    file = expanded(source)
    return f"{file.resolve()}:{function}" if colon and file.suffix == ".py" and file.is_file() else name


def _from_file(file: Path) -> ModuleType:
    return _executed(file.resolve(), file.stat().st_mtime_ns)


@lru_cache
def _executed(file: Path, changed: int) -> ModuleType:
    """A file run once as long as it does not change: it may load a model."""
    spec = importlib.util.spec_from_file_location(f"fastgen_own_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module
