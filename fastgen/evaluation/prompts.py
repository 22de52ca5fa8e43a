"""Prompt sets of a protocol: files in the data folder, checked by their hash, and bundled ones."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen.data.texts import flaw, missing, parse_json, read_lines, short
from fastgen.discovery import module_names
from fastgen.errors import UserError, nearest
from fastgen.files import expanded
from fastgen.fingerprints import known_hash

if TYPE_CHECKING:
    from fastgen.evaluation.protocol import SetBlock

BUNDLED = "fastgen:"
_WORLDS = "fastgen.evaluation.worlds"


def read_prompts(block: SetBlock, data_dir: Path | None, where: str) -> list[str]:
    """The prompts of a set, in order, repetitions included; [""] for an unconditional one. where: what to begin messages with. UserError for a
    file that is missing, is another than the recorded one, or cannot be read."""
    if block.prompts is None:
        return [""] * (block.count or 1)
    if block.prompts.startswith(BUNDLED):
        return bundled_prompts(block.prompts.removeprefix(BUNDLED), f"{where}.prompts")
    path = _found(block, data_dir, where)
    if block.sha256 is not None and (found := known_hash(path)) != block.sha256:
        raise UserError(f"{where}.prompts: {str(path)!r} is not the recorded file: its SHA-256 is {found}, not {block.sha256}")
    prompts = prompts_of(path, f"{where}.prompts")
    if not prompts:
        raise UserError(f"{where}.prompts: {str(path)!r} holds no prompts")
    return prompts


def _found(block: SetBlock, data_dir: Path | None, where: str) -> Path:
    """The file itself where the name leads to one, or below the data folder."""
    assert block.prompts is not None
    given = expanded(block.prompts)
    source = f": get it from {block.source}" if block.source else ""
    if given.is_absolute() or (data_dir is None and given.exists()):
        path = given
    elif data_dir is None:
        raise UserError(
            f"{where}.prompts: needs the file {block.prompts!r}{source} and name its folder with --data-dir (recipe key evaluate.data_dir)"
        )
    else:
        path = data_dir / block.prompts
    if problem := missing(path):
        raise UserError(f"{where}.prompts: {problem}{source}")
    return path


def prompts_of(path: Path, key: str) -> list[str]:
    """The prompts in a file, in order: a line each of .txt; `prompt`, `caption` or `text` of .jsonl and .csv. UserError names file and line."""
    readers = {".txt": _text, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise UserError(f"{key}: {str(path)!r} is none of {', '.join(f'*{each}' for each in readers)}")
    prompts = readers[suffix](path, key)
    for number, prompt in enumerate(prompts, 1):
        if problem := flaw(prompt):
            raise UserError(f"{key}: {str(path)!r}: prompt {number} {problem}")
    return prompts


def _text(path: Path, key: str) -> list[str]:
    return [line.strip() for line in read_lines(path, key) if line.strip()]


def _jsonl(path: Path, key: str) -> list[str]:
    lines = [(number, line) for number, line in enumerate(read_lines(path, key), 1) if line.strip()]
    return [_field(parse_json(line, f"{key}: {str(path)!r} line {number}"), f"{key}: {str(path)!r} line {number}") for number, line in lines]


def _csv(path: Path, key: str) -> list[str]:
    delimiter, between = ("\t", "tabs") if path.suffix.lower() == ".tsv" else (",", "commas")
    lines = [f"{line}\n" for line in read_lines(path, key)]  # a field in quotes may go on over several
    try:
        rows = list(csv.DictReader(lines, delimiter=delimiter))
    except csv.Error as error:
        raise UserError(f"{key}: {str(path)!r} is no table with fields between {between}: {error}") from error
    return [_field(row, f"{key}: {str(path)!r} row {number}") for number, row in enumerate(rows, 1)]


def _field(row: object, where: str) -> str:
    for name in ("prompt", "caption", "text"):
        if isinstance(row, dict) and isinstance(value := row.get(name), str):
            return value.strip()
    raise UserError(f"{where} has no text field prompt, caption or text: {short(row)}")


def bundled_prompts(name: str, key: str) -> list[str]:
    """`classes/N`: the numbers of N classes, for models that take classes; `WORLD/SET`: the prompts of a bundled world."""
    world, _, which = name.partition("/")
    if world == "classes" and which.isdecimal() and len(which) <= 6 and 0 < int(which) <= 10**5:
        return [str(number) for number in range(int(which))]
    worlds = module_names(_WORLDS, shared=())
    if world not in worlds:
        raise UserError(f"{key}: no bundled prompts {short(BUNDLED + name)}; {nearest(world, [*worlds, 'classes/N'])}")
    sets = importlib.import_module(f"{_WORLDS}.{world}").PROMPTS
    if which not in sets:
        raise UserError(f"{key}: {BUNDLED}{world} has no set {which!r}; {nearest(which, sets)}")
    return list(sets[which]())
