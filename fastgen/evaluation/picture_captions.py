"""One caption for each picture of a folder: what it was drawn for, or what it shows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastgen.data.texts import flaw, missing, parse_json, read_lines, read_text, short
from fastgen.errors import UserError
from fastgen.evaluation.picture_folder import PictureFolder

BESIDE = ("prompts.jsonl", "metadata.jsonl", "metadata.csv")  # the first of these is read; then a.txt beside a.png
_FIELDS = ("prompt", "caption", "text")
_KINDS = (".txt", ".jsonl", ".csv", ".tsv")

_Row = tuple[str | None, str]  # file_name and caption


def read_captions(pictures: PictureFolder, file: Path | None = None, key: str = "--captions") -> list[str] | None:
    """A caption for each picture, in the order of its ids: from `file`, named by `key`, or from what lies beside the pictures; None where
    nothing does.

    A line each of .txt is in the order of the pictures' names, and so are .jsonl and .csv without `file_name`. UserError for a picture without
    caption or with several, and for a file that cannot be read.
    """
    key = key if file is not None else pictures.key
    found = file or next((path for name in BESIDE if (path := pictures.folder / name).is_file()), None)
    if found is None:
        captions = _from_texts(pictures, key)
    else:
        if problem := missing(found):
            raise UserError(f"{key}: {problem}")
        rows = list(_rows(found, key))
        captions = _by_name(rows, pictures, found, key) if any(name is not None for name, _ in rows) else _in_order(rows, pictures, found, key)
    for index, caption in enumerate(captions or ()):
        if problem := flaw(caption):
            raise UserError(f"{key}: the caption of {pictures.names[index]!r} {problem}")
    return captions


def _rows(path: Path, key: str) -> Iterator[_Row]:
    suffix, name = path.suffix.lower(), f"{key}: {str(path)!r}"
    if suffix not in _KINDS:
        raise UserError(f"{name} is none of {', '.join(f'*{each}' for each in _KINDS)}")
    if suffix == ".txt":
        lines = read_lines(path, key)
        # Empty lines are captions of pictures that were drawn for none; what ends the last line is no line.
        yield from ((None, line.strip()) for line in (lines[:-1] if not lines[-1].strip() else lines))
    elif suffix == ".jsonl":
        for number, line in enumerate(read_lines(path, key), 1):
            if line.strip():
                yield _row(parse_json(line, f"{name} line {number}"), f"{name} line {number}")
    else:
        rows = csv.DictReader(io.StringIO(read_text(path, key), newline=""), delimiter="\t" if suffix == ".tsv" else ",", skipinitialspace=True)
        try:
            yield from (_row(row, f"{name} row {number}") for number, row in enumerate(rows, 1))
        except csv.Error as error:
            raise UserError(f"{name} is not CSV ({error})") from error


def _row(row: Any, where: str) -> _Row:
    content: Mapping[str, Any] = row if isinstance(row, dict) else {}
    caption = next((content[name] for name in _FIELDS if name in content), None)
    if isinstance(caption, list) and len(caption) == 1:
        caption = caption[0]
    if not isinstance(caption, str):
        raise UserError(f"{where} has no one caption, which is a text {', '.join(_FIELDS[:-1])} or {_FIELDS[-1]}: {short(row)}")
    name = content.get("file_name")
    if name is not None and not isinstance(name, str):
        raise UserError(f"{where} has the file_name {short(name)}, which is no name of a file")
    return name, caption.strip()


def _in_order(rows: list[_Row], pictures: PictureFolder, path: Path, key: str) -> list[str]:
    if len(rows) != len(pictures):
        raise UserError(f"{key}: {str(path)!r} holds {len(rows)} captions, {str(pictures.folder)!r} {len(pictures)} pictures; give one for each")
    return [caption for _, caption in rows]


def _by_name(rows: list[_Row], pictures: PictureFolder, path: Path, key: str) -> list[str]:
    """Captions of pictures that are not in the folder are left aside, as those of a data set of which it is a part."""
    found: dict[str, str] = {}
    for name, caption in rows:
        if name is None:
            raise UserError(f"{key}: {str(path)!r} has a file_name in some rows and none in others")
        name = Path(name).as_posix()
        if found.setdefault(name, caption) != caption:
            raise UserError(f"{key}: {str(path)!r} has two captions of {name!r}; an evaluation needs one")
    return _complete({name: found[name] for name in pictures.names if name in found}, pictures, f"{key}: {str(path)!r}")


def _from_texts(pictures: PictureFolder, key: str) -> list[str] | None:
    found: dict[str, str] = {}
    for name in pictures.names:
        if (text := (pictures.folder / name).with_suffix(".txt")).is_file():
            found[name] = " ".join(read_text(text, key).split())
    return _complete(found, pictures, f"{key}: {str(pictures.folder)!r}") if found else None


def _complete(found: Mapping[str, str], pictures: PictureFolder, where: str) -> list[str]:
    lacking = [name for name in pictures.names if name not in found]
    if lacking:
        raise UserError(f"{where} has no captions for {len(lacking)} of {len(pictures)} pictures, the first: {lacking[0]!r}")
    return [found[name] for name in pictures.names]
