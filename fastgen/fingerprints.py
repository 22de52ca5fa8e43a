"""What a file, a folder or a record is, whatever its name: SHA-256 of contents, and seals inside JSON files.

There are two purposes. *Loading* what fastgen wrote reads every byte again (`file_hash`, `check_files`): a bit that flips on a disk
changes neither the size nor the times of its file. *Identifying* what a run is given (`known_hash`) asks whether somebody has put
something else there, so it may remember the hash of a large file by its size, times and inode.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastgen import records
from fastgen.errors import UserError
from fastgen.files import reading, write_atomically

SEAL = "seal"
CACHE = Path(".cache/fastgen/hashes")  # below the home folder
_LARGE = 2**24  # bytes from which a hash is worth remembering: smaller files take milliseconds, and there may be very many
_SETTLED = 2.0  # seconds; a file changed more recently may change again within one tick of its file system's clock
_THREADS = 4  # hashing leaves Python's lock


def digest(content: Any) -> str:
    """SHA-256 of JSON data: equal for equal data, in whichever order its keys stand."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the digest of everything else in it, as its last key."""
    return {**content, SEAL: digest(content)}


def unsealed(record: Any) -> dict[str, Any]:
    """The content of a record that `sealed` made; ValueError when it is not what was sealed."""
    if not isinstance(record, dict) or SEAL not in record:
        raise ValueError("it has no seal")
    content = {key: value for key, value in record.items() if key != SEAL}
    if record[SEAL] != digest(content):
        raise ValueError("its content is not what was written: the seal does not fit")
    return content


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, read now; UserError when they cannot be read."""
    with reading(path), path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def file_hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """`file_hash` of several files below `folder`, by name, some at a time."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: file_hash(folder / name), names), strict=True))


def check_files(folder: Path, recorded: Mapping[str, str], done: str) -> None:
    """UserError for the first file below `folder` whose bytes are not those recorded; done: what was done with it, such as `saved`."""
    found = file_hashes(folder, sorted(recorded))
    for name, value in found.items():
        if value != recorded[name]:
            raise UserError(f"cannot read {str(folder / name)!r}: it is not the file that was {done}, but damaged or another (its SHA-256 differs)")


def file_names(folder: Path) -> list[str]:
    """Relative POSIX names of the files below `folder`, sorted. Hidden files and folders do not count; links are followed."""
    found: list[str] = []
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and not leads_back(here, name)]
        found += [(Path(here) / name).relative_to(folder).as_posix() for name in files if not name.startswith(".") and (Path(here) / name).is_file()]
    return sorted(found)


def folder_hash(folder: str | Path, names: Iterable[str] | None = None, *, of: Callable[[Path], str] = file_hash) -> str:
    """SHA-256 over relative names and contents of a model folder's files; names: which, by default all but README.md and results.json at its top.

    of: the hash of one file. Raises UserError when `folder` is none or has no file to hash.
    """
    root = Path(folder)
    chosen = [name for name in file_names(root) if name not in ("README.md", "results.json")] if names is None else sorted(names)
    if not chosen:
        raise UserError(f"{folder} is not a model folder: there are no files in it")
    whole = hashlib.sha256()
    for name in chosen:
        whole.update(name.encode() + b"\0" + bytes.fromhex(of(root / name)))
    return whole.hexdigest()


def known_hash(path: Path) -> str:
    """`file_hash`, remembered for large files in ~/.cache/fastgen/hashes, an entry a file: to identify what is read, not to check a disk.

    An entry holds for one device, inode, size and time of change. Without a home, or with a folder or an entry that cannot be used,
    the file is read.
    """
    with reading(path):
        key = _identity(path)
    entry = _entry(key) if key["size"] >= _LARGE else None
    known = None if entry is None else _recall(entry, key)
    if known is None:
        known = file_hash(path)
        if entry is not None and _identity(path) == key and time.time_ns() - max(key["mtime"], key["ctime"]) > _SETTLED * 1e9:
            _remember(entry, {"file": key, "sha256": known})
    return known


def leads_back(here: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in."""
    path, own = os.path.join(here, name), os.path.realpath(here)
    return os.path.islink(path) and os.path.commonpath([own, target := os.path.realpath(path)]) == target


def _identity(path: Path) -> dict[str, int]:
    """What changes with a file's content, short of reading it; ctime because a copy can keep mtime."""
    stat = path.stat()
    return {"device": stat.st_dev, "inode": stat.st_ino, "size": stat.st_size, "mtime": stat.st_mtime_ns, "ctime": stat.st_ctime_ns}


def _entry(key: dict[str, int]) -> Path | None:
    try:
        return Path.home() / CACHE / f"{digest(key)[:32]}.json"
    except RuntimeError:  # no home
        return None


def _recall(entry: Path, key: dict[str, int]) -> str | None:
    try:
        content = unsealed(records.read(entry))
    except ValueError:
        return None
    value = content.get("sha256")
    return value if content.get("file") == key and isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else None


def _remember(entry: Path, content: dict[str, Any]) -> None:
    with suppress(UserError):  # the file is read again next time
        write_atomically(entry, json.dumps(sealed(content)) + "\n")
