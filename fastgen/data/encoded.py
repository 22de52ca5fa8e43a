"""What a run trains on, encoded: before training, into memory or into a store, or batch by batch when it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import conditioning
from fastgen.config import DataBlock, TeacherBlock
from fastgen.data import store
from fastgen.data.images import CaptionedImages
from fastgen.data.rows import Held, Rows, narrowed
from fastgen.data.store import DTYPES, Encoded, Kind, Manifest, Store
from fastgen.errors import UserError
from fastgen.families import parts_hash
from fastgen.families.base import Family
from fastgen.files import expanded
from fastgen.progress import Progress

_FITS = 0.25  # of the free memory, up to which a store's rows are read into it
_MADE_BY: Mapping[Kind, tuple[str, ...]] = {"prompts": ("text_encoder", "tokenizer"), "latents": ("vae",)}


@dataclass(frozen=True)
class Encoder:
    """Encodes one kind of a run's data. identify: the hash of the first so many rows. encode: rows of the whole. left_out: why of those that could
    not be encoded, where they may be left out; a store's are added."""

    kind: Kind
    count: int
    fields: Mapping[str, tuple[Any, tuple[int, ...]]]
    identify: Callable[[int], str]
    encode: Callable[[Sequence[int]], Encoded]
    left_out: dict[int, str] | None = None

    @property
    def what(self) -> str:
        return "images" if self.kind == "latents" else self.kind


@dataclass(frozen=True)
class Online:
    """Rows that are encoded each time they are drawn, each of a batch once."""

    encoder: Encoder
    device: torch.device
    read_ahead = False

    def __len__(self) -> int:
        return self.encoder.count

    def select(self, index: Tensor) -> dict[str, Tensor]:
        distinct, place = torch.unique(index.cpu(), return_inverse=True)
        made = self.encoder.encode(distinct.tolist())
        if made.left_out:
            raise UserError(f"recipe key data.encode: online leaves out no picture once training has begun: {next(iter(made.left_out.values()))}")
        return conditioning.to(conditioning.select(dict(made.tensors), place), self.device)


@dataclass(frozen=True)
class Keeping:
    """How a run keeps what is encoded. device: that it computes on; origin: what encodes each kind, which a store records."""

    device: torch.device
    block: DataBlock = field(default_factory=DataBlock)
    origin: Callable[[Kind], Mapping[str, Any]] = lambda kind: {}

    @property
    def folder(self) -> Path | None:
        return None if self.block.store is None else expanded(self.block.store)

    def rows(self, encoder: Encoder, progress: Progress) -> Rows:
        """All rows of an encoder: made now, as far as they are not there already, or when they are drawn."""
        if self.block.encode == "online":
            return Online(encoder, self.device)
        if self.folder is None:
            progress.stage(f"encoding {encoder.count} {encoder.what}")
            cuts, parts = store.cuts(encoder.count), list[dict[str, Tensor]]()
            self._counted(encoder, progress, cuts, lambda ids: parts.append(dict(self._narrowed(encoder, ids).tensors)))
            return self._held(parts)
        kept, _ = self.fill(encoder, progress)
        if encoder.left_out is not None:
            encoder.left_out.update(kept.left_out())
        held, size = self._fits(kept), f"{kept.manifest.count * kept.manifest.row_bytes / 1e9:.2f} GB"
        progress.stage(f"{encoder.count} {encoder.what} in {str(kept.path)!r}: {size}, {'read into memory' if held else 'read batch by batch'}")
        return self._held([kept.read(ids) for ids in store.cuts(len(kept))]) if held else kept

    def _counted(self, encoder: Encoder, progress: Progress, cuts: Sequence[range], make: Callable[[range], object], done: int = 0) -> None:
        """Make the rows of each cut, and say how far it has come where there are several. done: rows of the same that are there already."""
        if len(cuts) == 1 and not done:
            make(cuts[0])
            return
        progress.start(f"encoding {encoder.what}", done + sum(map(len, cuts)), done)
        try:
            for ids in cuts:
                make(ids)
                done += len(ids)
                progress.update(done, {})
        finally:  # a bar left running hides the terminal's cursor
            progress.finish()

    def _held(self, parts: list[dict[str, Tensor]]) -> Held:
        return Held(conditioning.to(conditioning.cat(parts), self.device))

    def _narrowed(self, encoder: Encoder, ids: range) -> Encoded:
        made = encoder.encode(ids)
        return made._replace(tensors=narrowed(made.tensors, DTYPES[self.block.dtype]))

    def manifest(self, encoder: Encoder, *, identified: bool = True) -> Manifest:
        rows = encoder.identify(encoder.count) if identified else ""
        block = self.block
        return Manifest(
            kind=encoder.kind, count=encoder.count, dtype=block.dtype, fields=dict(encoder.fields), origin=dict(self.origin(encoder.kind)), rows=rows
        )

    def fill(self, encoder: Encoder, progress: Progress, part: tuple[int, int] = (0, 1), *, thorough: bool = False) -> tuple[Store, int]:
        """The store of an encoder's rows, with those of a part made that are missing, and how many these were; thorough: also those that are
        broken."""
        assert self.folder is not None
        kept = store.create(self.folder / encoder.kind, self.manifest(encoder), encoder.identify, self.device)
        if thorough and kept.file(0).is_file():
            progress.stage(f"reading what {str(kept.path)!r} holds")
        todo = kept.broken(part) if thorough else kept.missing(part)
        total, new = (sum(len(kept.ids(shard)) for shard in some) for some in (kept.shards(part), todo))
        if todo:
            cuts = [kept.ids(shard) for shard in todo]
            self._counted(
                encoder, progress, cuts, lambda ids: kept.make(ids.start // store.ROWS, lambda rows: self._narrowed(encoder, rows)), total - new
            )
        return kept, new

    def check(self, encoder: Encoder) -> None:
        """UserError where a store cannot take an encoder's rows. Of images it does not read the content, only what encodes them."""
        if self.folder is not None:
            identified = encoder.kind == "prompts"
            manifest = self.manifest(encoder, identified=identified)
            store.check(self.folder / encoder.kind, manifest, encoder.identify if identified else None)

    def _fits(self, kept: Store) -> bool:
        if self.block.keep != "auto":
            return self.block.keep == "memory"
        return len(kept) * kept.manifest.row_bytes <= _FITS * free_memory(self.device)


def free_memory(device: torch.device) -> int:
    """Bytes that are free where a run computes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def origin_of(family: Family, teacher: TeacherBlock, data: DataBlock, dtype: torch.dtype) -> Callable[[Kind], dict[str, Any]]:
    """What decides each kind's rows, beside what they are made of. A fine-tune with the same encoders has the same. dtype: of the text encoders."""

    def origin(kind: Kind) -> dict[str, Any]:
        made_by = parts_hash(teacher.pretrained, teacher.revision, _MADE_BY[kind])
        if kind == "prompts":
            return {
                "pipeline": family.pipeline_classes[0],
                "text encoders": made_by,
                "teacher.dtype": next(name for name, known in DTYPES.items() if known == dtype),
                "teacher.max_sequence_length": family.options.get("max_sequence_length"),
            }
        return {"vae": made_by, "teacher.size": list(family.picture_shape[-2:]), "data.crop": data.crop, "data.background": data.background}

    return origin


def of_prompts(family: Family, texts: Sequence[str], batch: int = 64) -> Encoder:
    """The conditioning of prompts."""

    def encode(ids: Sequence[int]) -> Encoded:
        some = [texts[i] for i in ids]
        return Encoded(family.encode_prompts(some, batch), some, {})

    return Encoder("prompts", len(texts), _fields(family.meta_conditioning(1)), lambda count: store.of_texts(texts[:count]), encode)


def of_images(family: Family, images: CaptionedImages, device: torch.device, batch: int = 64) -> Encoder:
    """The latents of images; of those that cannot be decoded, where they are to be skipped, zeros."""
    shape = family.latent.shape

    def encode(ids: Sequence[int]) -> Encoded:
        latents = torch.zeros((len(ids), *shape))
        for start in range(0, len(ids), batch):
            some = ids[start : start + batch]
            found = images.pixels(some, *family.picture_shape[-2:])
            if found:
                made = family.encode_latents(torch.stack(list(found.values())).to(device)).cpu()
                latents[[start + place for place, i in enumerate(some) if i in found]] = made
        left_out = {place: images.undecodable[i] for place, i in enumerate(ids) if i in images.undecodable}
        return Encoded({"latents": latents}, [images.captions[i] for i in ids], left_out)

    skipped = images.undecodable if images.skip_broken else None
    return Encoder("latents", len(images), {"latents": ("float", tuple(shape))}, images.content, encode, skipped)


def _fields(cond: Mapping[str, Tensor]) -> dict[str, tuple[Any, tuple[int, ...]]]:
    kinds = {torch.int64: "int64", torch.bool: "bool"}
    return {key: ("float" if value.is_floating_point() else kinds[value.dtype], tuple(value.shape[1:])) for key, value in cond.items()}
