"""What a run trains on, encoded: before training, into memory or into a store, or batch by batch when it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import conditioning
from fastgen.config import DataBlock
from fastgen.data import store
from fastgen.data.rows import Held, Rows, narrowed
from fastgen.data.store import DTYPES, Encoded, Kind, Manifest, Store
from fastgen.errors import UserError
from fastgen.files import expanded
from fastgen.group import Alone
from fastgen.progress import Progress

_Tell = Callable[[int], None]
_FITS = 0.25  # of the free memory, up to which a store's rows are read into it


@dataclass(frozen=True)
class Encoder:
    """Encodes one kind of a run's data. identify: the hash of the first so many rows. encode: rows of the whole. left_out: why of those that could
    not be encoded, where they may be left out; a store's are added. batch: rows encoded at once; batches lie inside shards. origin: what decides the
    rows, where the run's Keeping does not know; teacher: as in a store's manifest."""

    kind: Kind
    count: int
    fields: Mapping[str, tuple[Any, tuple[int, ...]]]
    identify: Callable[[int], str]
    encode: Callable[[Sequence[int]], Encoded]
    left_out: dict[int, str] | None = None
    batch: int = 64
    origin: Mapping[str, Any] | None = None
    teacher: str = ""

    @property
    def what(self) -> str:
        return store.what_of(self.kind)

    @property
    def doing(self) -> str:
        return f"{'drawing' if self.kind == 'pairs' else 'encoding'} {self.what}"

    def made(self, ids: range, tell: Callable[[int], None] = lambda made: None) -> Encoded:
        """Rows of the whole, a batch at a time; `tell` hears how many each had."""
        tensors, about, left_out = list[Mapping[str, Tensor]](), list[Any](), dict[int, str]()
        for start in range(0, len(ids), self.batch):
            some = ids[start : start + self.batch]
            part = self.encode(some)
            tensors.append(part.tensors)
            about += part.about
            left_out |= {start + place: why for place, why in part.left_out.items()}
            tell(len(some))
        return Encoded(conditioning.cat([dict(each) for each in tensors]), about, left_out)


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
    """How a run keeps what is encoded. device: that it computes on; origin: what encodes each kind, which a store records. members: the
    run's processes, each of which makes a part of the rows."""

    device: torch.device
    block: DataBlock = field(default_factory=DataBlock)
    origin: Callable[[Kind], Mapping[str, Any]] = lambda kind: {}
    members: Alone = field(default_factory=Alone)

    @property
    def folder(self) -> Path | None:
        return None if self.block.store is None else expanded(self.block.store)

    def beside(self, name: str) -> Keeping:
        """The same for other rows of the same kinds, whose stores lie in a folder of this name."""
        return self if self.folder is None else replace(self, block=self.block.model_copy(update={"store": str(self.folder / name)}))

    def of_pairs(self) -> Keeping:
        """The same for pairs: on the CPU, drawn before training whenever prompts are encoded."""
        return replace(self, device=torch.device("cpu"), block=self.block.model_copy(update={"encode": "ahead"}))

    def rows(self, encoder: Encoder, progress: Progress) -> Rows:
        """All rows of an encoder: made now, as far as they are not there already, or when they are drawn."""
        if self.block.encode == "online":
            return Online(encoder, self.device)
        if self.folder is None:
            progress.stage(f"{encoder.doing.replace(' ', f' {encoder.count} ')}")
            return self._held(self._made(encoder, progress))
        if self.members.world_size > 1:
            self.fill_together(encoder, progress)
        kept, _ = self.fill(encoder, progress)
        if encoder.left_out is not None:
            encoder.left_out.update(kept.left_out())
        return self.opened(kept, progress)

    def _made(self, encoder: Encoder, progress: Progress) -> list[dict[str, Tensor]]:
        """The rows of every cut in turn, each made by one process."""
        cuts, parts = store.cuts(encoder.count), list[dict[str, Tensor]]()
        own = cuts[self.members.rank :: self.members.world_size]
        if own:
            self._counted(encoder, progress, own, lambda ids, tell: parts.append(dict(self._narrowed(encoder, ids, tell).tensors)))
        if encoder.left_out is not None:
            for left_out in self.members.gather(encoder.left_out):
                encoder.left_out.update(left_out)
        return self.members.in_turn(parts)

    def _place(self, encoder: Encoder) -> Path:
        assert self.folder is not None
        return self.folder / encoder.kind

    def opened(self, kept: Store, progress: Progress) -> Rows:
        """A store's rows, read into memory where it is whole and they fit."""
        held, size = not kept.missing() and self._fits(kept), f"{kept.manifest.count * kept.manifest.row_bytes / 1e9:.2f} GB"
        progress.stage(
            f"{len(kept)} {store.what_of(kept.manifest.kind)} in {str(kept.path)!r}: {size}, {'read into memory' if held else 'read batch by batch'}"
        )
        if held:
            return self._held([kept.read(ids) for ids in store.cuts(len(kept))])
        kept.open_all()
        return kept

    def _counted(self, encoder: Encoder, progress: Progress, cuts: Sequence[range], make: Callable[[range, _Tell], object], done: int = 0) -> None:
        """Make the rows of each cut, and say how far it has come where there are several batches. done: rows of the same that are there already."""
        total = sum(map(len, cuts))
        if total <= encoder.batch and not done:
            make(cuts[0], lambda made: None)
            return
        progress.start(encoder.doing, done + total, done)

        def tell(made: int) -> None:
            nonlocal done
            done += made
            progress.update(done, {})

        try:
            for ids in cuts:
                make(ids, tell)
        finally:  # a bar left running hides the terminal's cursor
            progress.finish()

    def _held(self, parts: list[dict[str, Tensor]]) -> Held:
        return Held(conditioning.to(conditioning.cat(parts), self.device))

    def _narrowed(self, encoder: Encoder, ids: range, tell: _Tell) -> Encoded:
        made = encoder.made(ids, tell)
        return made._replace(tensors=narrowed(made.tensors, DTYPES[self.block.dtype]))

    def manifest(self, encoder: Encoder, *, identified: bool = True) -> Manifest:
        rows = encoder.identify(encoder.count) if identified else ""
        block = self.block
        return Manifest(
            kind=encoder.kind,
            count=encoder.count,
            dtype=block.dtype,
            fields=dict(encoder.fields),
            origin=dict(self.origin(encoder.kind) if encoder.origin is None else encoder.origin),
            rows=rows,
            teacher=encoder.teacher,
        )

    def fill(self, encoder: Encoder, progress: Progress, part: tuple[int, int] = (0, 1), *, thorough: bool = False) -> tuple[Store, int]:
        """The store of an encoder's rows, with those of a part made that are missing, and how many these were; thorough: also those that are
        broken."""
        kept = store.create(self._place(encoder), self.manifest(encoder), encoder.identify, self.device)
        if thorough and kept.file(0).is_file():
            progress.stage(f"reading what {str(kept.path)!r} holds")
        todo = kept.broken(part) if thorough else kept.missing(part)
        total, new = (sum(len(kept.ids(shard)) for shard in some) for some in (kept.shards(part), todo))
        if todo:
            cuts = [kept.ids(shard) for shard in todo]
            self._counted(
                encoder,
                progress,
                cuts,
                lambda ids, tell: kept.make(ids.start // store.ROWS, lambda rows: self._narrowed(encoder, rows, tell)),
                total - new,
            )
        return kept, new

    def fill_together(self, encoder: Encoder, progress: Progress, *, thorough: bool = False) -> tuple[Store, int]:
        """The same by all processes, of which each makes a part, and how many rows all have made."""
        members = self.members
        members.lone(lambda: store.create(self._place(encoder), self.manifest(encoder), encoder.identify, self.device))
        kept, new = self.fill(encoder, progress, (members.rank, members.world_size), thorough=thorough)
        return kept, sum(members.each(new))

    def check(self, encoder: Encoder) -> None:
        """UserError where a store cannot take an encoder's rows. Of images it does not read the content, only what encodes them."""
        if self.folder is not None:
            identified = encoder.kind != "latents"
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
