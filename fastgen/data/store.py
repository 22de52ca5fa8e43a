"""A store: encoded rows in shards that are mapped into memory, with what encoded them and the hash of every row.

`store.json` says what the folder is to hold; `shard_NNNNNN.safetensors` hold ROWS rows each, and in their header the rows' texts or captions and
hashes. So a shard is whole in itself: shards can be made in any order, by several processes, and one that is missing or broken is made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fastgen import records
from fastgen.data.rows import widened
from fastgen.errors import UserError
from fastgen.files import check_writable, reading, write_atomically
from fastgen.fingerprints import digest, sealed, unsealed

ROWS = 256  # of a shard
FILE = "store.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_HEADER = 1 << 17  # bytes of a shard beside its rows, about

Kind = Literal["prompts", "latents", "pairs"]


def what_of(kind: Kind) -> str:
    """What people call the rows of a store of this kind."""
    return "images" if kind == "latents" else kind


def key_of(kind: Kind) -> str:
    """The recipe key that a store of this kind belongs to, as messages name it."""
    return f"recipe key data.{'pairs' if kind == 'pairs' else 'store'}"


class Manifest(BaseModel):
    """store.json. fields: type and shape of one row's tensors by name, where `float` is kept in `dtype`. origin: what encoded them, by what it is
    called in messages. rows: hash of what was encoded, in order. teacher: the name of what drew pairs, for messages."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    format: Literal[2] = 2  # the headers of format 1 had no seal
    kind: Kind
    count: Annotated[int, Field(ge=1, le=10**10)]
    dtype: Literal["fp32", "bf16"]
    fields: dict[str, tuple[Literal["float", "int64", "bool"], tuple[Annotated[int, Field(ge=1, le=2**20)], ...]]]
    origin: dict[str, Any]
    rows: str
    teacher: str = ""

    @property
    def key(self) -> str:
        return key_of(self.kind)

    @property
    def row_bytes(self) -> int:
        """Of one row's tensors."""
        width = {"float": DTYPES[self.dtype].itemsize, "int64": 8, "bool": 1}
        return sum(math.prod(shape) * width[kind] for kind, shape in self.fields.values())

    def difference(self, other: Manifest) -> tuple[str, Any, Any] | None:
        """The first thing, and its value in each, in which two stores differ beyond what was encoded."""
        parts = [{"kind": each.kind, "data.dtype": each.dtype, **each.origin, "the rows' shapes": each.fields} for each in (self, other)]
        key = next((key for key in dict.fromkeys([*parts[0], *parts[1]]) if parts[0].get(key) != parts[1].get(key)), None)
        if key is None:
            return None
        if key == "teacher.pretrained" and self.teacher:  # compared by content, and said by name
            return key, self.teacher, other.teacher
        return key, parts[0].get(key), parts[1].get(key)


class Encoded(NamedTuple):
    """A shard's rows: tensors (R, ...) by name, each row's text or captions, and of rows that are left out why, by their place in the shard."""

    tensors: Mapping[str, Tensor]
    about: Sequence[Any]
    left_out: Mapping[int, str]


class _Shard(NamedTuple):
    """An open shard. places: by tensor where in the file its rows begin, and the bytes of one. checked: rows whose hash has been found right."""

    file: Path
    tensors: Mapping[str, Any]
    places: Mapping[str, tuple[int, int]]
    hashes: Sequence[bytes]
    checked: set[int]

    def announce(self, place: int) -> None:
        """Have the system read a row at once: page by page, as memory that is mapped asks for it, takes ten times as long."""
        if hasattr(os, "posix_fadvise"):
            with self.file.open("rb") as file:
                for start, size in self.places.values():
                    os.posix_fadvise(file.fileno(), start + place * size, size, os.POSIX_FADV_WILLNEED)


@dataclass(frozen=True)
class Store:
    """Rows on disk. device: where what is read goes."""

    path: Path
    manifest: Manifest
    device: torch.device | str = "cpu"
    _open: dict[int, _Shard] = field(default_factory=dict, compare=False, repr=False)
    read_ahead = True

    def __len__(self) -> int:
        return self.manifest.count

    def shards(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """The numbers of the shards that part i of n makes, from 0 on."""
        return list(range(math.ceil(len(self) / ROWS)))[part[0] :: part[1]]

    def ids(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * ROWS, min((shard + 1) * ROWS, len(self)))

    def file(self, shard: int) -> Path:
        return self.path / f"shard_{shard:06d}.safetensors"

    def is_whole(self, shard: int) -> bool:
        """Whether the shard is there, with the bytes of all its rows, of which none is read."""
        try:
            with self.file(shard).open("rb") as file:
                header = int.from_bytes(file.read(8), "little")  # safetensors: its length, itself, the rows
                size = file.seek(0, 2)
        except OSError:
            return False
        return size == 8 + header + len(self.ids(shard)) * self.manifest.row_bytes

    def missing(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """The shards that are still to be made."""
        return [shard for shard in self.shards(part) if not self.is_whole(shard)]

    def broken(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """The same, and those whose content is not what was written; reads every byte."""
        return [shard for shard in self.shards(part) if not self.is_whole(shard) or not self._is_sound(shard)]

    def _is_sound(self, shard: int) -> bool:
        try:
            self.read(self.ids(shard))
        except UserError:
            return False
        finally:
            self._open.pop(shard, None)
        return True

    def make(self, shard: int, encode: Callable[[range], Encoded]) -> None:
        """Write a shard, in place of what is there. encode: rows of the whole."""
        self._open.pop(shard, None)
        self._write(shard, encode(self.ids(shard)))

    def _write(self, shard: int, encoded: Encoded) -> None:
        tensors = {key: value.contiguous() for key, value in encoded.tensors.items()}
        left_out = {str(place): why for place, why in encoded.left_out.items()}
        # One key: safetensors writes several in an order that differs from process to process.
        header = {"rows": json.dumps(sealed({"about": list(encoded.about), "sha256": _hashes(tensors), "left_out": left_out}))}
        write_atomically(self.file(shard), save(tensors, metadata=header))

    def select(self, index: Tensor) -> dict[str, Tensor]:
        """Rows (B, ...) fp32 on `device`. UserError for a row that is not what was written."""
        return {key: value.to(self.device) for key, value in widened(self.read(index.tolist())).items()}

    def read(self, index: Iterable[int]) -> dict[str, Tensor]:
        """The same as they are kept, on the CPU."""
        rows = [self._row(row) for row in index]
        return {key: torch.stack([row[key] for row in rows]) for key in self.manifest.fields}

    def _row(self, row: int) -> dict[str, Tensor]:
        shard, place = self._opened(row // ROWS), row % ROWS
        with reading(shard.file):
            if place not in shard.checked:
                shard.announce(place)
            tensors = {key: tensor[place : place + 1] for key, tensor in shard.tensors.items()}
        if place not in shard.checked:
            if bytes.fromhex(_hashes(tensors)[0]) != shard.hashes[place]:
                raise UserError(
                    f"{self.manifest.key}: row {row} in {str(shard.file)!r} is not what was written: its hash differs. The disk may be "
                    f"failing; delete the file, and the same `fastgen cache {self.manifest.kind}` command makes it again"
                )
            shard.checked.add(place)
        return {key: value[0] for key, value in tensors.items()}

    def about(self, count: int | None = None) -> Iterator[tuple[int, Any]]:
        """The text or captions of every row, or of the shards that hold the first `count`, with its number; left-out ones apart."""
        for shard in self.shards()[: None if count is None else math.ceil(count / ROWS)]:
            header = self._header(shard)
            for place, each in enumerate(header["about"]):
                if str(place) not in header["left_out"]:
                    yield shard * ROWS + place, each

    def left_out(self) -> dict[int, str]:
        """Of rows that could not be encoded, why."""
        return {shard * ROWS + int(place): why for shard in self.shards() for place, why in self._header(shard)["left_out"].items()}

    def hashes(self, count: int) -> list[str]:
        """Of the first `count` rows; reads headers only."""
        return [each for shard in self.shards() if shard * ROWS < count for each in self._header(shard)["sha256"]][:count]

    def _opened(self, shard: int) -> _Shard:
        if shard not in self._open:
            file = self.file(shard)
            with reading(file):
                mapped = safe_open(file, "pt")
                hashes = [bytes.fromhex(each) for each in _header_of(mapped)["sha256"]]
                if {*mapped.keys()} != {*self.manifest.fields}:
                    raise ValueError(f"it holds {sorted(mapped.keys())}, not {sorted(self.manifest.fields)}")
                tensors = {key: mapped.get_slice(key) for key in self.manifest.fields}
                for key, tensor in tensors.items():
                    if tensor.get_shape() != [len(hashes), *self.manifest.fields[key][1]]:
                        raise ValueError(f"its {key} has the shape {tensor.get_shape()}")
            self._open[shard] = _Shard(file, tensors, _places(file, len(hashes)), hashes, set())
        return self._open[shard]

    def open_all(self) -> None:
        """Open every shard that can be, ahead of reading; one that is broken or not there is left to who reads it.

        What stays in memory of each then lies together. Opened one by one between batches, it keeps the batches' room from being used again: with
        390 shards a run had 250 MB more.
        """
        for shard in self.shards():
            try:
                self._opened(shard)
            except UserError:
                continue

    def _header(self, shard: int) -> dict[str, Any]:
        with reading(self.file(shard)), safe_open(self.file(shard), "pt") as mapped:
            return _header_of(mapped)


class _Header(records.Schema):
    about: list[Any]
    sha256: list[str]
    left_out: dict[str, str]


def _header_of(mapped: Any) -> dict[str, Any]:
    """What a shard's header says of its rows."""
    try:
        record = records.parse((mapped.metadata() or {}).get("rows", "null"), dict[str, Any])
        return records.checked(unsealed(record), _Header)
    except ValueError as error:
        raise ValueError(f"its header: {error}") from error


def _places(file: Path, count: int) -> dict[str, tuple[int, int]]:
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(length))
    ranges = {key: value["data_offsets"] for key, value in header.items() if key != "__metadata__"}
    return {key: (8 + length + start, (end - start) // count) for key, (start, end) in ranges.items()}


def _hashes(tensors: Mapping[str, Tensor]) -> list[str]:
    """SHA-256 of each row: its tensors' names, types, shapes and bytes."""
    kinds = {key: f"{key} {value.dtype} {tuple(value.shape[1:])}".encode() for key, value in sorted(tensors.items())}
    found = []
    for row in range(len(next(iter(tensors.values())))):
        whole = hashlib.sha256()
        for key, kind in kinds.items():
            whole.update(kind)
            whole.update(tensors[key][row : row + 1].contiguous().view(torch.uint8).numpy().data)
        found.append(whole.hexdigest())
    return found


def open_store(path: Path, device: torch.device | str = "cpu", key: str = key_of("prompts")) -> Store | None:
    """The store in a folder; None where there is none. UserError, beginning with `key`, for one that cannot be read."""
    file = path / FILE
    if not file.is_file():
        return None
    try:
        return Store(path, Manifest.model_validate(unsealed(records.read(file))), device)
    except ValidationError as error:
        raise UserError(f"{key}: cannot read {str(file)!r}: {records.explained(error)}") from error
    except ValueError as error:
        raise UserError(f"{key}: cannot read {str(file)!r}: {error}") from error


def check(path: Path, manifest: Manifest, prefix: Callable[[int], str] | None) -> None:
    """That a folder is new, or a store of `manifest`'s rows or of the first of them. prefix: the hash of so many of these; None: not looked at.

    UserError for rows that something else encoded, or of something else, with both values; and where the disk has no room for what is missing.
    """
    key = manifest.key
    found = open_store(path, key=key)
    if found is None and path.is_dir() and any(not each.name.startswith(".") for each in path.iterdir()):
        raise UserError(f"{key}: {str(path)!r} holds other files and no store; choose an empty or new folder")
    if found is not None:
        if differs := found.manifest.difference(manifest):
            what, there, wanted = differs
            now = "which has changed since" if there == wanted else f"this recipe needs {wanted!r}"
            made = "drawn" if manifest.kind == "pairs" else "encoded"
            raise UserError(f"{key}: {str(path)!r} was {made} with {what} {there!r}, {now}; choose another folder")
        if prefix and (found.manifest.count > manifest.count or prefix(found.manifest.count) != found.manifest.rows):
            raise UserError(
                f"{key}: {str(path)!r} holds {found.manifest.count} other {manifest.kind} than this recipe's {manifest.count}; choose another folder"
            )
    _check_room(path, manifest)


def _check_room(path: Path, manifest: Manifest) -> None:
    wanted = Store(path, manifest)
    needed = sum(len(wanted.ids(shard)) * manifest.row_bytes + _HEADER for shard in wanted.missing())
    home = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(home).free
    if needed > free:
        raise UserError(
            f"{manifest.key}: {str(path)!r} needs {needed / 1e9:.2f} GB more for {manifest.count} {manifest.kind}, and its disk has "
            f"{free / 1e9:.2f} GB free"
        )


def create(path: Path, manifest: Manifest, prefix: Callable[[int], str], device: torch.device | str = "cpu") -> Store:
    """A folder for `manifest`'s rows: a new one, or one that `check` takes, which keeps what it has."""
    check(path, manifest, prefix)
    check_writable(path, manifest.key)
    if (found := open_store(path, key=manifest.key)) is not None:  # by the name that the teacher had then
        manifest = manifest.model_copy(update={"teacher": found.manifest.teacher})
    write_atomically(path / FILE, json.dumps(sealed(manifest.model_dump(mode="json")), indent=1) + "\n")
    return Store(path, manifest, device)


def cuts(count: int) -> list[range]:
    """The rows of each shard. What is encoded without a store is cut in the same places, so that batches and numbers are the same."""
    return [range(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]


def of_texts(texts: Sequence[str]) -> str:
    """The hash of what a store of prompts encodes."""
    return digest(list(texts))
