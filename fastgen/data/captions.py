"""The captions of a set of pictures: `metadata.jsonl`, `.csv` or `.parquet` as Hugging Face's `imagefolder` has it, `a.txt` beside `a.png`, tar
archives, or a data set's own tables."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from fastgen.config import DataBlock
from fastgen.data import archives, saved
from fastgen.data.archives import SUFFIX, Member, samples
from fastgen.data.pixels import picture_suffixes
from fastgen.data.saved import Cell, Table
from fastgen.data.tables import csv_rows, parquet_rows
from fastgen.data.texts import flaw, missing, parse_json, read_lines, read_text, short
from fastgen.errors import UserError

KEY = "recipe key data.images"
FORMS = "metadata.jsonl, metadata.csv, metadata.parquet, .txt files beside the pictures, .tar archives of these, or tables of Hugging Face's datasets"

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # where several are, the first is read
_USUAL = ("text", "caption", "captions", "prompt", "description", "label")  # what others call it
_NAMED = 6  # kinds of files that a message lists
_PACKED = "compressed archives give no picture on its own: unpack them, or make .tar of them"
_NOT_READ: dict[str, str] = dict.fromkeys((".gz", ".tgz", ".bz2", ".xz", ".zst"), _PACKED)

Captions = dict[str, float]  # with their probabilities
Found = tuple[list[tuple[Path | Member | Cell, Captions]], list[str]]  # pictures with their captions, and warnings


@dataclass
class Faults:
    """What is wrong with single pictures of a set. The first is a UserError, unless they are to be skipped: then they are collected."""

    skip: bool
    found: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        if not self.skip:
            raise UserError(f"{KEY}: {problem}; data.skip_broken: true leaves such pictures out")
        self.found.append(problem)

    def warnings(self, kept: int) -> list[str]:
        """A line about what is left out of a set of which `kept` pictures remain; UserError where none does."""
        count = len(self.found)
        if not kept:
            raise UserError(f"{KEY}: all of {count} pictures are broken, the first: {self.found[0]}")
        return [f"{KEY}: {count} of {count + kept} pictures are left out, such as: {self.found[0]}"] if count else []


def read_captions(folder: Path, caption_key: str, faults: Faults) -> Found:
    """Picture files with their captions, in the order of the metadata or of the names, and warnings; from `train/` or `data/` where the folder
    itself has none. folder: may be a .tar archive or a .parquet file too. UserError names the file and the row, or says what is there instead."""
    if folder.suffix.lower() == SUFFIX and folder.is_file():
        return list(_from_archives([folder], caption_key, faults)), []
    if folder.suffix.lower() == ".parquet" and folder.is_file():
        return list(_from_table(saved.open_parquet(folder, [folder], KEY), caption_key, faults)), []
    for home in (folder, folder / "train", folder / "data"):
        names = _names(home)
        metadata = sorted(
            (name for name in names if name.lower() in _METADATA), key=lambda name: (_METADATA.index(name.lower()), name.lower() != name)
        )
        tars = [name for name in names if name.lower().endswith(SUFFIX)]
        if metadata:
            return list(_from_metadata(home, home / metadata[0], caption_key, faults)), _unread(metadata[0], [*metadata[1:], *tars])
        if texts := _texts(home, names):
            return list(_from_texts(home, names, texts, faults)), _unread(min(texts.values()), tars)
        if tars:
            return list(_from_archives([home / name for name in tars], caption_key, faults)), []
        if saved.STATE in names:
            return list(_from_table(saved.open_saved(home, KEY), caption_key, faults)), []
        if tables := [name for name in names if name.lower().endswith(".parquet")]:
            return _from_parquet(home, tables, caption_key, faults)
    raise UserError(f"{KEY}: {str(folder)!r} is neither fastgen:digits, fastgen:scenes nor a folder with {FORMS}: {contents(folder)}")


def _unread(read: str, others: Sequence[str]) -> list[str]:
    return [f"{KEY}: {read} is read, {', '.join(others[:_NAMED])}{', …' * (len(others) > _NAMED)} beside it is not"] if others else []


def _names(folder: Path) -> list[str]:
    """What a folder holds, hidden names apart; nothing where there is none."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return []
    except OSError as error:
        raise UserError(f"{KEY}: cannot read {str(folder)!r}: {error.strerror or error}") from error


def _from_metadata(home: Path, metadata: Path, caption_key: str, faults: Faults) -> Iterator[tuple[Path, Captions]]:
    readers = {".csv": partial(csv_rows, key=KEY, needed="file_name"), ".parquet": partial(parquet_rows, key=KEY, needed="file_name")}
    read, empty = readers.get(metadata.suffix.lower(), _json_rows), True
    for row, where in read(metadata):
        empty = False
        name = row.get("file_name")
        if problem := _name_problem(row) or _caption_problem(row, caption_key):
            faults.add(f"{where} {problem}")
        elif problem := missing(home / str(name)):
            faults.add(f"{where}: {problem}")
        else:
            yield home / str(name), _shares(row[caption_key])
    if empty:
        raise UserError(f"{KEY}: {str(metadata)!r} is empty")


def _json_rows(metadata: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    for number, line in enumerate(read_lines(metadata, KEY), 1):
        if line.strip():
            where = f"{str(metadata)!r} line {number}"
            row = parse_json(line, f"{KEY}: {where}")
            if not isinstance(row, dict):
                raise UserError(f"{KEY}: {where} is not a JSON object, but {short(row)}")
            yield row, where


def _name_problem(row: Mapping[str, Any]) -> str | None:
    name = row.get("file_name")
    if "file_name" not in row:
        return f"has no 'file_name' among its keys {_listed(row)}"
    return None if isinstance(name, str) and name.strip() else f"has the 'file_name' {short(name)}, which is no name of a file"


def _caption_problem(row: Mapping[str, Any], key: str) -> str | None:
    if key not in row:
        return f"has no caption: no {key!r} among its keys {_listed(row)}{_proposal(key, row)}"
    value = row[key]
    texts = value if isinstance(value, list) else [value]
    if any(not isinstance(text, str) for text in texts if text is not None):
        return f"has no caption: {key!r} must be a caption or a list of captions, not {short(value)}"
    if None in texts or not any(text.strip() for text in texts):  # '' beside others asks for nothing part of the time
        return f"has no caption: {key!r} is {short(value)}"
    problem = next(filter(None, map(flaw, texts)), None)
    return problem and f"has a caption that {problem}"


def _shares(value: str | list[str]) -> Captions:
    texts = [value] if isinstance(value, str) else value
    return {text: count / len(texts) for text, count in Counter(texts).items()}


def _listed(row: Mapping[str, Any]) -> str:
    shown = ", ".join(short(key) for key in list(row)[: 2 * _NAMED])
    return shown + (", …" if len(row) > 2 * _NAMED else "")


def _proposal(key: str, row: Mapping[str, Any]) -> str:
    others = [name for name in row if name != "file_name"]
    close = difflib.get_close_matches(key, others, n=1) or [name for name in _USUAL if name in others] or (others if len(others) == 1 else [])
    return f"; did you mean data.caption_key: {short(close[0])}?" if close else ""


def _texts(home: Path, names: list[str]) -> dict[str, str]:
    """The .txt files that have a picture beside them, by the name without the suffix."""
    stems = {Path(name).stem for name in _pictures(home, names)}
    return {stem: name for name in names if (stem := Path(name).stem) in stems and Path(name).suffix.lower() == ".txt"}


def _pictures(home: Path, names: list[str]) -> list[str]:
    return [name for name in names if Path(name).suffix.lower() in picture_suffixes() and not os.path.isdir(home / name)]


def _from_texts(home: Path, names: list[str], texts: Mapping[str, str], faults: Faults) -> Iterator[tuple[Path, Captions]]:
    for name in _pictures(home, names):
        picture = home / name
        if picture.stem not in texts:
            faults.add(f"{str(picture)!r} has no caption: there is no {picture.stem + '.txt'!r} beside it")
            continue
        caption = " ".join(read_text(home / texts[picture.stem], KEY).split())
        if not caption:
            faults.add(f"{str(picture)!r} has no caption: {str(home / texts[picture.stem])!r} is empty")
        elif problem := flaw(caption) or missing(picture):
            faults.add(f"{str(picture)!r}: {problem}")
        else:
            yield picture, {caption: 1.0}


def _from_archives(paths: Sequence[Path], caption_key: str, faults: Faults) -> Iterator[tuple[Member, Captions]]:
    """A .txt goes before a .json, unless the recipe names a key."""
    order = ("json", "txt") if caption_key != DataBlock.model_fields["caption_key"].default else ("txt", "json")
    for archive in paths:
        found, problems = samples(archive)
        for problem in problems:
            faults.add(problem)
        for name, files in found.items():
            where = f"{str(archive / name)!r}"
            pictures = [member for rest, member in files.items() if f".{rest}" in picture_suffixes()]
            told = [(rest, files[rest]) for rest in order if rest in files]
            if not pictures:
                continue
            if len(pictures) > 1:
                faults.add(f"{where} has {len(pictures)} pictures: {', '.join(PurePosixPath(each.name).name for each in pictures)}")
            elif not told:
                faults.add(f"{where} has no caption: there is no .txt and no .json beside the picture")
            else:
                try:
                    shares = _packed(*told[0], caption_key)
                except UserError as error:
                    faults.add(str(error).removeprefix(f"{KEY}: "))
                else:
                    yield pictures[0], shares


def _packed(kind: str, member: Member, caption_key: str) -> Captions:
    """The captions in a sample's file; UserError where there are none."""
    text = archives.text_in(member, KEY)
    row = {caption_key: " ".join(text.split())} if kind == "txt" else parse_json(text, f"{KEY}: {str(member)!r}")
    problem = _caption_problem(row, caption_key) if isinstance(row, dict) else f"is not a JSON object, but {short(row)}"
    if problem:
        raise UserError(f"{KEY}: {str(member)!r} {problem}")
    return _shares(row[caption_key])


def _from_parquet(home: Path, tables: Sequence[str], caption_key: str, faults: Faults) -> Found:
    """Those of the split for training, where names tell splits."""
    chosen = [name for name in tables if name.lower().startswith("train")] or list(tables)
    table = saved.open_parquet(home, [home / name for name in chosen], KEY)
    return list(_from_table(table, caption_key, faults)), _unread(chosen[0], [name for name in tables if name not in chosen])


def _from_table(table: Table, caption_key: str, faults: Faults) -> Iterator[tuple[Cell, Captions]]:
    for row, picture in saved.captions(table):
        if problem := _caption_problem(row, caption_key):
            faults.add(f"{str(picture)!r} {problem}")
        else:
            yield picture, _shares(row[caption_key])


def contents(folder: Path) -> str:
    """What is there in place of a folder of pictures that is as it should be, for a message."""
    if not os.path.isdir(folder):
        packed = f"; {_PACKED}" if _NOT_READ.get(folder.suffix.lower()) == _PACKED else ""
        return f"it is no folder{packed}" if os.path.exists(folder) else "there is nothing"
    names = _names(folder)
    kinds: dict[str, list[str]] = {}
    for name in names:
        is_folder = os.path.isdir(folder / name)
        kinds.setdefault("folders" if is_folder else f"{Path(name).suffix.lower()} files".strip(), []).append(name + "/" * is_folder)
    listed = [f"{len(some)} {kind}" if len(some) > 1 else some[0] for kind, some in sorted(kinds.items(), key=lambda item: -len(item[1]))]
    more = f" and {len(listed) - _NAMED} other kinds" if len(listed) > _NAMED else ""
    hint = next((f"; {what}" for suffix, what in _NOT_READ.items() if f"{suffix} files" in kinds), "")
    return f"it holds {', '.join(listed[:_NAMED])}{more}{hint}" if names else "it is empty"
