"""Training images that are latents already: of a store that `fastgen cache latents` made, or of pairs that a teacher drew."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgen.data import pair_folder
from fastgen.data.encoded import Keeping
from fastgen.data.older_pairs import FILE as OLDER_PAIRS
from fastgen.data.pair_folder import PairFolder, open_folder
from fastgen.data.rows import Chosen, Column, Rows
from fastgen.data.store import FILE, Store, open_store
from fastgen.errors import UserError
from fastgen.families import parts_hash
from fastgen.families.base import Family
from fastgen.fingerprints import digest
from fastgen.progress import Progress

KEY = "recipe key data.images"


@dataclass(frozen=True)
class LatentImages:
    """captions[i]: every caption of image i with its probability. latents: the rows, as a run keeps them. content: what they are.
    check: UserError where a family, as a recipe's teacher block describes it, does not decode them, or where they are not in the
    recipe's data.dtype."""

    captions: list[dict[str, float]]
    latents: Callable[[Keeping, Progress], Rows]
    content: Callable[[], str]
    check: Callable[[Family, Mapping[str, Any], str], None]
    warnings: tuple[str, ...] = ()
    parts: tuple[LatentImages, ...] = ()  # those of each size, where there are several

    def __len__(self) -> int:
        return len(self.captions)


def latents_in(folder: Path) -> LatentImages | None:
    """What a folder holds; None where that is neither."""
    if (folder / OLDER_PAIRS).is_file():
        return _of_pairs(open_folder(folder))
    for home in (folder, folder / "latents", folder / "pairs"):
        if (home / FILE).is_file():
            found = open_store(home, key=KEY)
            return _of_pairs(open_folder(home)) if found is not None and found.manifest.kind == "pairs" else _of_store(home)
    return None


def latents_of_sizes(folder: Path, sizes: Sequence[Sequence[int]]) -> LatentImages | None:
    """What a folder holds in a folder for each size, `768x1024` (height x width); None where it has no such folders. UserError where one is
    missing."""
    there = _sizes_in(folder)
    if not there:
        return None
    if not sizes:
        often = sorted(there, key=lambda size: -len(latents_in(folder / name_of(size)) or ()))
        way_on = f"say which in student.sizes: it has {[list(size) for size in often]}, the most frequent first"
        raise UserError(f"{KEY}: {str(folder)!r} holds latents by size; {way_on}, and remove teacher.size and data.buckets")
    found = {name_of(size): latents_in(folder / name_of(size)) for size in sizes}
    for name, one in found.items():
        if one is None:
            held = ", ".join(map(name_of, there))
            raise UserError(f"{KEY}: {str(folder)!r} holds latents by size, but none of {name} (it has {held}); fill it with `fastgen cache latents`")
    parts = tuple(one for one in found.values() if one is not None)

    def of_all(*_: Any) -> Any:
        raise AssertionError("latents of several sizes are read by size")

    captions = [each for part in parts for each in part.captions]
    return LatentImages(captions, of_all, lambda: digest([part.content() for part in parts]), of_all, parts=parts)


def _sizes_in(folder: Path) -> list[tuple[int, int]]:
    """(height, width) of each size that a folder has latents of."""
    if not folder.is_dir():
        return []
    named = [(int(found[1]), int(found[2])) for each in folder.iterdir() if (found := re.fullmatch(r"(\d{1,5})x(\d{1,5})", each.name, re.ASCII))]
    return [size for size in sorted(named) if latents_in(folder / name_of(size)) is not None]


def name_of(size: Sequence[int]) -> str:
    """What the folder of a size, (height, width) in pixels, is called."""
    height, width = size
    return f"{height}x{width}"


def _of_pairs(pairs: PairFolder) -> LatentImages:
    pair_folder.check_whole(pairs, KEY)

    def check(family: Family, teacher: Mapping[str, Any], dtype: str) -> None:
        pair_folder.check(pairs, teacher, family.latent.shape, dtype, KEY)

    return LatentImages(
        captions=[{prompt: 1.0} for prompt in pairs.prompts()],
        latents=lambda keeping, progress: Column(pairs.load(keeping, progress).rows, "x0", "latents", keeping.device),
        content=lambda: pair_folder.content(pairs, pairs.count),
        check=check,
    )


def _of_store(home: Path) -> LatentImages:
    found = open_store(home, key=KEY)
    assert found is not None
    path, manifest = found.path, found.manifest
    if manifest.kind != "latents":
        raise UserError(f"{KEY}: {str(path)!r} is a store of {manifest.kind}, not of latents")
    if missing := found.missing():
        raise UserError(
            f"{KEY}: {str(path)!r} lacks {len(missing)} of {len(found.shards())} shards; finish it with the same `fastgen cache latents` command"
        )
    about = list(found.about())

    def rows(keeping: Keeping, progress: Progress) -> Rows:
        stored = keeping.opened(Store(path, manifest, keeping.device), progress)
        return stored if len(about) == len(found) else Chosen(stored, torch.tensor([i for i, _ in about]))

    def check(family: Family, teacher: Mapping[str, Any], dtype: str) -> None:
        own: dict[str, Any] = {
            "vae": parts_hash(teacher["pretrained"], teacher.get("revision"), ("vae",)),
            "teacher.size": list(family.picture_shape[-2:]),
        }
        if manifest.dtype != dtype:
            raise UserError(f"{KEY}: {str(path)!r} holds latents in {manifest.dtype}, this recipe has data.dtype {dtype!r}")
        for key, needed in own.items():
            if (there := manifest.origin.get(key)) != needed:
                raise UserError(f"{KEY}: {str(path)!r} was encoded with {key} {there!r}, this recipe needs {needed!r}")

    return LatentImages(
        captions=[captions for _, captions in about],
        latents=rows,
        content=lambda: digest([manifest.rows, manifest.dtype, manifest.origin, len(about)]),
        check=check,
    )
