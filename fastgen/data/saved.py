"""Pictures in tables as Hugging Face's `datasets` has them: a folder that `save_to_disk` wrote, or parquet files of a data set's repository.

The tables stay on the disk, mapped into memory; a picture is read where it lies, so that any one can be drawn at any time.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from fastgen.data.archives import Window
from fastgen.data.texts import missing, short
from fastgen.errors import UserError
from fastgen.fingerprints import digest, known_hash

STATE = "state.json"  # beside the tables of `save_to_disk`
_USUAL = ("image", "img", "picture", "jpg", "png")  # which of several columns of pictures is taken


@dataclass(frozen=True, eq=False)
class Table:
    """A data set's rows, as Arrow has them; column: that of the pictures; files: what it was read from."""

    path: Path
    rows: Any
    column: str
    files: tuple[Path, ...]

    @cached_property
    def content(self) -> str:
        return digest([known_hash(file) for file in self.files])


@dataclass(frozen=True)
class Cell:
    """The picture of one row."""

    table: Table
    index: int

    def open(self, mode: str = "rb") -> BinaryIO:
        """Its file, for reading. OSError where the row has none."""
        assert mode == "rb"
        import pyarrow  # pyright: ignore[reportMissingImports]

        value = self.table.rows[self.index].column(self.table.column)[0]
        fields = {"bytes": value} if not pyarrow.types.is_struct(value.type) else dict(value.items()) if value.is_valid else {}
        packed, path = (None if (each := fields.get(name)) is None or not each.is_valid else each for name in ("bytes", "path"))
        if packed is not None:
            buffer = packed.as_buffer()
            return io.BufferedReader(Window(pyarrow.BufferReader(buffer), 0, buffer.size))
        if path is None:
            raise FileNotFoundError("the row has no picture")
        return (self.table.path / path.as_py()).open("rb")

    def content(self) -> str:
        return f"{self.table.content}/{self.index}"

    def __str__(self) -> str:
        return f"{self.table.path} row {self.index + 1}"


def open_saved(folder: Path, key: str) -> Table:
    """What `save_to_disk` wrote. UserError that begins with `key` for what cannot be read."""
    _check_there([folder / STATE], key)
    return _table(folder, key, lambda datasets: datasets.load_from_disk(str(folder)), ())


def open_parquet(folder: Path, files: Sequence[Path], key: str) -> Table:
    """The rows of parquet files, one after the other, from `datasets`' cache, where they lie uncompressed."""
    _check_there(files, key)
    names = [str(file) for file in files]
    return _table(folder, key, lambda datasets: datasets.load_dataset("parquet", data_files=names, split="train"), tuple(files))


def _check_there(files: Sequence[Path], key: str) -> None:
    """UserError for a device or a pipe, which would be waited for."""
    if problem := next(filter(None, map(missing, files)), None):
        raise UserError(f"{key}: {problem}")


def _table(folder: Path, key: str, load: Any, files: tuple[Path, ...]) -> Table:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{key}: reading {str(folder)!r} needs Hugging Face's datasets: pip install 'fastgen-distill[data]'") from error
    try:
        found = load(datasets)
        rows = found.with_format("arrow")
        read = files or tuple(Path(each["filename"]) for each in found.cache_files)
        schema = rows.data.schema
    except Exception as error:  # readers of foreign files raise whatever they come to
        raise UserError(f"{key}: {str(folder)!r} is no data set that can be read ({' '.join(str(error).split())[:300]})") from error
    return Table(folder, rows, _picture_column(folder, schema, key), read)


def _picture_column(folder: Path, schema: Any, key: str) -> str:
    import pyarrow  # pyright: ignore[reportMissingImports]

    def holds_files(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return "bytes" in {kind.field(i).name for i in range(kind.num_fields)}
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    names = [field.name for field in schema if holds_files(field.type)]
    chosen = names if len(names) == 1 else [name for name in _USUAL if name in names]
    if not chosen:
        several = f"several columns of pictures, {short(names)}: call one of them 'image'"
        raise UserError(f"{key}: {str(folder)!r} has {several if names else f'no column of pictures, but {short(schema.names)}'}")
    return chosen[0]


def captions(table: Table) -> Iterator[tuple[Mapping[str, Any], Cell]]:
    """Each row's values but for its pictures, and its picture."""
    others = [name for name in table.rows.data.schema.names if name != table.column]
    for start in range(0, len(table.rows), 1000):
        block = table.rows.select_columns(others)[start : start + 1000] if others else None
        count = min(1000, len(table.rows) - start)
        for offset, row in enumerate([{}] * count if block is None else block.to_pylist()):
            yield row, Cell(table, start + offset)
