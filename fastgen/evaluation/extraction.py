"""Pictures are drawn, turned into features and forgotten, a chunk at a time: whatever is measured on them reads the features.

A chunk holds the same pictures in whichever process and however they are drawn, so its features are the same to the bit wherever the
pictures are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.config import validate
from fastgen.errors import NotFinite, UserError
from fastgen.evaluation.dumps import Dump
from fastgen.evaluation.extractors import find_extractor
from fastgen.evaluation.extractors.base import Extractor, Feature, Pictures, Resources
from fastgen.evaluation.preparation import prepared, quantised
from fastgen.evaluation.protocol import PrepareBlock, SampleSet
from fastgen.evaluation.speed import peak_memory_bytes, reset_peak_memory, synchronise
from fastgen.evaluation.store import Store
from fastgen.evaluation.weights import Unavailable
from fastgen.fingerprints import digest

# prompts, seeds, ids -> (B, 3, H, W), floats in [0, 1] or uint8; or pictures (3, h, w) uint8, each of its own size
Draw = Callable[[list[str], list[int], Sequence[int]], Tensor | list[Tensor]]


AS_IS = PrepareBlock()


class Part(NamedTuple):
    """Which chunks one of several processes draws: those whose number is `index` modulo `of`."""

    index: int = 0
    of: int = 1


WHOLE = Part()


class Extractors:
    """The extractors that some features come from, each built once. `failed` says why those are not here that are not."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.failed: dict[str, Unavailable] = {}
        self._built: dict[str, Extractor] = {}

    def require(self, features: Iterable[Feature]) -> None:
        """Build what these features need; Unavailable where that cannot be done."""
        for each in features:
            self.of(each)

    def of(self, each: Feature) -> Extractor:
        key = each.source
        if key in self.failed:
            raise self.failed[key]
        if key not in self._built:
            kind = find_extractor(each.extractor)
            config = validate(kind.Config, dict(each.options), of=f"extractor {each.extractor}")
            try:
                built = kind(config, self.resources)
                _ = built.hash  # read now: where weights are missing this says so
            except Unavailable as error:
                self.failed[key] = error
                raise
            self._built[key] = built
        return self._built[key]

    def name(self, each: Feature) -> str:
        """What a store calls a feature: whose extractor, with which options and weights, and which layer."""
        return stored_name(each, self.of(each).hash)

    def __call__(self, pictures: Pictures, features: Iterable[Feature]) -> dict[str, Tensor]:
        """Features of pictures by their names in a store. UserError where one is not finite."""
        layers: dict[str, list[Feature]] = {}
        for each in features:
            layers.setdefault(each.source, []).append(each)
        found: dict[str, Tensor] = {}
        for group in layers.values():
            made = self.of(group[0])(pictures, [each.layer for each in group])
            found |= {self.name(each): made[each.layer].cpu() for each in group}
        for name, rows in found.items():
            if rows.is_floating_point() and not bool(rows.isfinite().all()):
                broken = int((~rows.isfinite().flatten(1).all(1)).sum())
                raise UserError(f"features {name} of {broken} of {len(rows)} pictures are not finite: the extractor's weights are damaged")
        return found

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each that was built, by what features call it."""
        return {source: each.hash for source, each in self._built.items()}


def stored_name(each: Feature, sha256: str) -> str:
    """What a store calls a feature of an extractor with this hash."""
    return f"{each.extractor}-{digest([each.source, sha256])[:12]}-{each.layer}"


@dataclass(frozen=True)
class Drawing:
    """How the pictures of a set become 8-bit pictures. batch_size: drawn at once, within a chunk. dumps: where every 8-bit picture goes before
    it is prepared. check: refuses the shape (3, H, W) of drawn pictures."""

    draw: Draw
    batch_size: int
    quantisation: str = "edm"
    prepare: PrepareBlock = AS_IS
    dumps: Sequence[Dump] = ()
    check: Callable[[tuple[int, ...]], None] | None = None


def lacking(store: Store, names: Sequence[str], dumps: Sequence[Dump] = (), part: Part = WHOLE) -> list[int]:
    """The chunks, or those of this part, of which features are not in the store, or pictures not in a dump."""
    missing = set(store.missing(names)) | {chunk for chunk in store.chunks for dump in dumps if not dump.has(store.ids(chunk))}
    return [chunk for chunk in sorted(missing) if chunk % part.of == part.index]


def fill(
    store: Store,
    samples: SampleSet,
    chunks: Iterable[int],
    drawing: Drawing,
    extractors: Extractors,
    features: Sequence[Feature],
    *,
    tick: Callable[[int], None] | None = None,
) -> None:
    """Draw some chunks of a set and put their features into the store. tick: told how many pictures more are done.

    Costs of a chunk: `seconds` that drawing took (transfer to the CPU included), its `pictures`, and `peak` memory as in
    `speed.peak_memory_bytes`.
    """
    for chunk in chunks:
        ids = store.ids(chunk)
        pixels, costs = drawn(samples, ids, drawing, tick)
        for dump in drawing.dumps:
            dump.write(ids, pixels)
        batch = Pictures(_prepared(pixels, drawing.prepare), samples.prompts[ids.start : ids.stop], samples.per_prompt, pixels)
        store.write(chunk, extractors(batch, features), costs)


@torch.no_grad()
def drawn(
    samples: SampleSet, ids: range, drawing: Drawing, tick: Callable[[int], None] | None = None
) -> tuple[Tensor | list[Tensor], dict[str, float]]:
    """8-bit pictures (B, 3, H, W) of some rows of a set, or each of its own size, and what they cost."""
    parts: list[Tensor] = []
    seconds = 0.0
    reset_peak_memory()
    for start in range(ids.start, ids.stop, drawing.batch_size):
        rows = range(start, min(start + drawing.batch_size, ids.stop))
        prompts, seeds = list(samples.prompts[rows.start : rows.stop]), list(samples.seeds[rows.start : rows.stop])
        synchronise()
        began = time.perf_counter()
        made = drawing.draw(prompts, seeds, [samples.first + row for row in rows])
        images = [made.detach().cpu()] if isinstance(made, Tensor) else [each[None] for each in made]
        seconds += time.perf_counter() - began
        if len(made) != len(rows):
            raise ValueError(f"the generator returned {len(made)} images for {len(rows)} prompts")
        if drawing.check is not None:
            for each in images:
                drawing.check(tuple(each.shape[1:]))
        parts += [eight_bit(each, drawing.quantisation) for each in images]
        if tick is not None:
            tick(len(rows))
    pixels = torch.cat(parts) if len({part.shape[1:] for part in parts}) == 1 else [picture for part in parts for picture in part]
    return pixels, {"seconds": seconds, "pictures": len(ids), "peak": peak_memory_bytes()}


def _prepared(pixels: Tensor | list[Tensor], how: PrepareBlock) -> Tensor:
    """Of one size; UserError where they have several even so."""
    if isinstance(pixels, Tensor):
        return prepared(pixels, how)
    done = [prepared(each[None], how) for each in pixels]
    if len(sizes := {tuple(each.shape[2:]) for each in done}) > 1:
        some = " and ".join(f"{width} x {height}" for height, width in sorted(sizes)[:2])
        raise UserError(f"pictures of one set differ in size ({some} pixels, width x height); prepare.resize of a protocol brings them to one")
    return torch.cat(done)


def eight_bit(images: Tensor, quantisation: str) -> Tensor:
    """Pictures as uint8; NotFinite that says how many are none."""
    if images.dtype == torch.uint8:
        return images
    broken = ~images.isfinite().flatten(1).all(1)
    if bool(broken.any()):
        raise NotFinite(f"{int(broken.sum())} of {len(images)} images that the generator returned are not finite, so nothing can be measured")
    return quantised(images, quantisation)


def shared(features: Iterable[Sequence[Feature]]) -> list[Feature]:
    """Each feature once."""
    return list(dict.fromkeys(each for group in features for each in group))


def by_set(needs: Iterable[Mapping[str, Sequence[Feature]]]) -> dict[str, list[Feature]]:
    """The features of each set that several metrics need, each once."""
    found: dict[str, list[Feature]] = {}
    for need in needs:
        for name, features in need.items():
            found[name] = shared([found.get(name, []), features])
    return found
