"""Rows of CSV and parquet files that anybody may have written, each with where it stands; what cannot be read is a UserError."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastgen.data.texts import read_text, short
from fastgen.errors import UserError

Row = tuple[Mapping[str, Any], str]


def csv_rows(path: Path, key: str, needed: str) -> Iterator[Row]:
    """Rows by the names of the first, `needed` among them; a field may hold commas and newlines inside quotes."""
    reader = csv.reader(io.StringIO(read_text(path, key), newline=""), strict=True, skipinitialspace=True)
    columns: list[str] = []
    while True:
        number = reader.line_num + 1
        where = f"{str(path)!r} line {number}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{key}: {where} is not CSV ({error})") from error
        if not any(fields):
            continue
        if not columns:
            columns = [name.strip() for name in fields]
            if needed not in columns or len(set(columns)) < len(columns):
                raise UserError(
                    f"{key}: {where} must name the columns, once each and separated by commas, {needed} among them; it is {short(columns)}"
                )
        elif len(fields) != len(columns):
            raise UserError(f"{key}: {where} has {len(fields)} fields for {len(columns)} columns; a text with commas needs quotes around it")
        else:
            yield dict(zip(columns, fields, strict=True)), where


def parquet_rows(path: Path, key: str, needed: str, others: Collection[str] | None = None) -> Iterator[Row]:
    """Rows with the column `needed` and those of `others` that are there; None: with all."""
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{key}: reading {str(path)!r} needs pyarrow: pip install 'fastgen-distill[data]'") from error
    try:
        # Not `read_table`: a folder called `prompt=cat` would give it a column of that name.
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        rows = file.read([name for name in columns if others is None or name == needed or name in others]).to_pylist()
    except Exception as error:  # pyarrow raises whatever its readers of a foreign file come to
        raise UserError(f"{key}: {str(path)!r} is not a parquet file that can be read ({' '.join(str(error).split())[:300]})") from error
    if needed not in columns:
        raise UserError(f"{key}: {str(path)!r} has no column {needed!r}, but {short(columns)}")
    return ((row, f"{str(path)!r} row {number}") for number, row in enumerate(rows, 1))
