"""Archives at addresses that fsspec knows (https, s3, gs, hf, …): fetched whole, one after the other, to be read where they lie."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path, PurePosixPath

from fastgen.data.archives import SUFFIX
from fastgen.errors import UserError
from fastgen.files import PARTIAL, check_writable, writing
from fastgen.progress import Progress

KEY = "recipe key data.images"


def is_remote(source: str) -> bool:
    return "://" in source


def addresses(pattern: str) -> list[str]:
    """The archives that `…/{000..123}.tar`, `{a,b}` or `*` stand for, in order. UserError for what fsspec cannot list."""
    parts = [_choices(part) for part in re.split(r"(\{[^{}]*\})", pattern)]
    found = ["".join(chosen) for chosen in itertools.product(*parts)]
    if not any("*" in each or "?" in each for each in found):
        return found
    from fsspec.core import url_to_fs

    try:
        listed = []
        for each in found:
            system, path = url_to_fs(each)
            listed += [system.unstrip_protocol(name) for name in sorted(system.glob(path))]
    except Exception as error:  # every file system raises its own
        raise UserError(f"{KEY}: cannot list {pattern!r}: {' '.join(str(error).split())[:200]}") from error
    return listed


def fetch(pattern: str, folder: Path, progress: Progress) -> Path:
    """The archives in `folder`, each under its own name, those apart that are there already. UserError for one that cannot be fetched."""
    from fsspec.core import url_to_fs

    found = addresses(pattern)
    names = [PurePosixPath(each).name for each in found]
    if not found or len(set(names)) < len(names) or any(not name.endswith(SUFFIX) for name in names):
        raise UserError(f"{KEY}: {pattern!r} names {len(found)} archives; .tar archives with names of their own are needed")
    check_writable(folder, "--output")
    with writing(folder, "--output"):
        folder.mkdir(parents=True, exist_ok=True)
    progress.start("fetching archives", len(found))
    try:
        for count, (address, name) in enumerate(zip(found, names, strict=True), 1):
            if not (folder / name).is_file():
                try:
                    system, path = url_to_fs(address)
                    source = system.open(path, "rb")
                except Exception as error:
                    raise UserError(f"{KEY}: cannot fetch {address!r}: {' '.join(str(error).split())[:200]}") from error
                with writing(folder / name), source, (folder / f"{PARTIAL}{name}").open("wb") as file:
                    shutil.copyfileobj(source, file, 2**20)
                os.replace(folder / f"{PARTIAL}{name}", folder / name)
            progress.update(count, {})
    finally:
        progress.finish()
    return folder


def _choices(part: str) -> list[str]:
    if not part.startswith("{"):
        return [part]
    inside = part[1:-1]
    if found := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = found[1], found[2]
        return [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return inside.split(",")
