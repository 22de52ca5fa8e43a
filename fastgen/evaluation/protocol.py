"""A protocol is data: a YAML file that names what is drawn, how pictures are prepared, and what is measured on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastgen.config import Block, Pixels, validate
from fastgen.errors import UserError, nearest
from fastgen.evaluation.metrics import find_metric, refuse_shared_rows
from fastgen.evaluation.metrics.base import Metric, Resources
from fastgen.evaluation.prompts import BUNDLED, read_prompts
from fastgen.files import expanded
from fastgen.rng import derive_seed
from fastgen.yaml_files import read_yaml

Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9_.-]*$")]  # also of files and folders
SHIPPED = Path(__file__).parent / "protocols"


@dataclass(frozen=True)
class SampleSet:
    """Prompts and, one for each, the seed of that picture's noise: a picture does not depend on the others that are drawn with it.

    first: the id of the first picture; ids go on from set to set. Pictures of one prompt lie side by side, `per_prompt` of them, and
    features are extracted `chunk` pictures at a time, counted from the set's first, in whole groups of a prompt. complete: the prompts are
    all that there are, such as classes, and not some of many.
    """

    name: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    first: int = 0
    per_prompt: int = 1
    chunk: int = 64
    complete: bool = False

    def __len__(self) -> int:
        return len(self.prompts)

    def head(self, count: int) -> SampleSet:
        """The first pictures, in whole groups: at least one group."""
        count = max(1, count // self.per_prompt) * self.per_prompt
        return self if count >= len(self) else replace(self, prompts=self.prompts[:count], seeds=self.seeds[:count])

    @cached_property
    def groups(self) -> list[int]:
        """For each picture, the number of the draw that it is part of: one a prompt's text, wherever its pictures lie.

        Without prompts, and where they are complete, nobody has drawn prompts: each picture is a draw, or each `per_prompt` that lie side by
        side (Abadie et al. 2023, "When should you adjust standard errors for clustering?").
        """
        if self.complete or not any(self.prompts):
            return [index // self.per_prompt for index in range(len(self))]
        numbers: dict[str, int] = {}
        return [numbers.setdefault(prompt, len(numbers)) for prompt in self.prompts]

    @property
    def repeats(self) -> bool:
        """Whether a draw has several pictures."""
        return len(set(self.groups)) < len(self)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over prompts, seeds and how they are grouped."""
        return hashlib.sha256(json.dumps([self.prompts, self.seeds, self.first, self.per_prompt, self.chunk]).encode()).hexdigest()


class SetBlock(Block):
    """prompts: a text file (a prompt a line), .jsonl or .csv in the data folder, `fastgen:…` for one that is bundled, None for unconditional
    models. count: pictures, None for one a prompt. per_prompt: pictures of each prompt, side by side. cycle: begin again where the prompts
    end. seed: from which, with a picture's id, its own seed is derived; first_seed: instead, seeds that count up from it."""

    prompts: str | None
    sha256: Hash | None = None
    source: str | None = None
    count: int | None = Field(None, ge=1, le=10**7)
    per_prompt: int = Field(1, ge=1, le=1000)
    cycle: bool = False
    seed: int = Field(0, ge=0, lt=2**63)
    first_seed: int | None = Field(None, ge=0, lt=2**62)


class PrepareBlock(Block):
    """What is done to every picture, generated or real, before extractors see it (each of them then resizes by its own convention). crop:
    the largest centre square. resize: to so many pixels a side, by Pillow's filter."""

    crop: Literal["none", "centre"] = "none"
    resize: Pixels | None = None
    filter: Literal["lanczos", "bicubic", "bilinear", "box"] = "lanczos"


class ReferenceBlock(Block):
    """file: statistics or pictures as .npz (EDM, pytorch-fid, clean-fid, ADM) or .pkl (EDM2). images: a folder of pictures. Both are looked
    up in the data folder. sha256: of the file, None where nobody has recorded it. source: where it can be had."""

    file: str | None = None
    images: str | None = None
    sha256: Hash | None = None
    source: str | None = None

    @model_validator(mode="after")
    def _one(self) -> ReferenceBlock:
        if (self.file is None) == (self.images is None):
            raise ValueError("give either file or images")
        return self


class ProtocolFile(Block):
    """A protocol file. size: [height, width] that pictures must have, None for any. quantisation: of floats y in [0, 1]: `edm` floor(255 y + .5)
    (EDM, and what a saved PNG holds), `truncate` floor(255 y) (DMD2, torchmetrics). seed: of subsets and permutations. chunk: pictures whose
    features are extracted together. batch_size: pictures drawn at once, unless told otherwise; it changes rounding alone."""

    name: Name
    description: str = ""
    size: Annotated[list[Pixels], Field(min_length=2, max_length=2)] | None = None
    sets: dict[Name, SetBlock] = Field(min_length=1)
    quantisation: Literal["edm", "truncate"] = "edm"
    prepare: PrepareBlock = PrepareBlock()
    reference: ReferenceBlock | None = None
    metrics: dict[str, dict[str, Any] | None] = Field(min_length=1)
    seed: int = Field(0, ge=0, lt=2**32)
    chunk: int = Field(64, ge=1, le=4096)
    batch_size: int = Field(16, ge=1, le=4096)


class Protocol:
    """A protocol file with its prompts read. The metrics' options are checked; their extractors are not built yet."""

    def __init__(self, spec: ProtocolFile, data_dir: Path | None = None, where: str = "") -> None:
        """data_dir: where prompts and references are looked up. where: what to begin messages with. UserError for what cannot be measured."""
        self.spec, self.name, self.where = spec, spec.name, where or f"protocol {spec.name}: "
        self.resources = Resources(data_dir=data_dir)
        self.sets: dict[str, SampleSet] = {}
        for name, block in spec.sets.items():
            first = sum(map(len, self.sets.values()))
            self.sets[name] = _sample_set(name, block, first, spec.chunk, data_dir, f"{self.where}sets.{name}")
        self.metrics(self.resources)  # refuses what is wrong in them

    @property
    def files(self) -> list[str]:
        """What it reads from the data folder, by the names that it gives."""
        reference = self.spec.reference or ReferenceBlock(file="")
        named = [*(each.prompts for each in self.spec.sets.values()), reference.file, reference.images]
        return [name for name in named if name and not name.startswith(BUNDLED)]

    def metrics(self, resources: Resources) -> dict[str, Metric]:
        """The metrics by name, built; UserError for an unknown one, for options that it does not have, for a set that is none, and for two with
        a row of one name."""
        built: dict[str, Metric] = {}
        for name, options in self.spec.metrics.items():
            kind = find_metric(name, f"{self.where}metrics.{name}: ")
            config = validate(kind.Config, options or {}, f"metrics.{name}", of=self.where.removesuffix(": "))
            if config.set is not None and config.set not in self.sets:
                raise UserError(f"{self.where}metrics.{name}.set: {config.set!r}; {nearest(config.set, self.sets)}")
            try:
                built[name] = kind(config, list(self.sets), resources)
            except UserError as error:
                raise UserError(f"{self.where}{error}") from error
        refuse_shared_rows(built, self.where)
        return built

    def check_image(self, shape: Sequence[int], key: str = "") -> None:
        """Raise UserError unless pictures of this shape (3, H, W) are what the protocol measures; key: what named the protocol."""
        wanted = None if self.spec.size is None else (3, *self.spec.size)
        if len(shape) != 3 or (wanted is not None and tuple(shape) != wanted):
            where, what = key and f"{key}: ", "pictures (3, H, W)" if wanted is None else f"images of shape {wanted}"
            raise UserError(f"{where}protocol {self.name} measures {what}, the model makes {tuple(shape)}")

    def hash(self) -> str:
        """SHA-256 over everything that numbers depend on, as far as the file decides it: the prompts themselves, and the metrics' options with
        their defaults. Not over what it only says: descriptions, where files are to be had, and which hashes they have; nor over the reference,
        which lies elsewhere with everybody: results.json has its content's own hash, and without one what needs it is missing."""
        spec = self.spec.model_dump(exclude={"description", "batch_size", "sets", "metrics", "reference"})
        metrics = {name: {**metric.config.model_dump(mode="json"), "set": metric.set} for name, metric in self.metrics(self.resources).items()}
        content = {"spec": spec, "metrics": metrics, "sets": {name: each.hash for name, each in self.sets.items()}}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sample_set(name: str, block: SetBlock, first: int, chunk: int, data_dir: Path | None, where: str) -> SampleSet:
    texts = read_prompts(block, data_dir, where)
    if block.count is not None and block.count % block.per_prompt:
        raise UserError(f"{where}.count: {block.count} pictures are no whole number of groups of per_prompt: {block.per_prompt}")
    count = block.count or len(texts) * block.per_prompt
    needed = count // block.per_prompt
    if len(texts) < needed and not block.cycle:
        raise UserError(f"{where}.count: {count} pictures need {needed} prompts, {block.prompts!r} holds {len(texts)}; lower it, or set cycle: true")
    prompts = tuple(texts[index // block.per_prompt % len(texts)] for index in range(count))
    if block.first_seed is not None:
        seeds = tuple(range(block.first_seed, block.first_seed + count))
    else:
        seeds = tuple(derive_seed("evaluation", block.seed, first + index) for index in range(count))
    complete = block.prompts is not None and block.prompts.startswith(BUNDLED)
    return SampleSet(name, prompts, seeds, first, block.per_prompt, -(-chunk // block.per_prompt) * block.per_prompt, complete)


def shipped_protocols() -> dict[str, Path]:
    """The protocols that come with fastgen, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find_protocol(name: str, key: str = "recipe key evaluate.protocol") -> Path:
    """The file of a shipped protocol, or the path itself where it ends in .yaml; UserError for neither."""
    if name in (shipped := shipped_protocols()):
        return shipped[name]
    if name.lower().endswith((".yaml", ".yml")):
        return expanded(name)
    raise UserError(f"unknown protocol {name!r} ({key}): {nearest(name, shipped)}, or a .yaml file")


def load_protocol(name: str, *, data_dir: str | Path | None = None, key: str = "recipe key evaluate.protocol") -> Protocol:
    """The protocol called `name`, or in that YAML file, with prompts and references from `data_dir`; key: what named it. UserError names it."""
    path = find_protocol(name, key)
    return protocol_from(
        read_yaml(path, "protocol", "sets and metrics"), data_dir=data_dir, where="" if path.parent == SHIPPED else f"{str(path)!r}: "
    )


def protocol_from(content: Mapping[str, Any], *, data_dir: str | Path | None = None, where: str = "") -> Protocol:
    """A protocol from the content of a protocol file."""
    spec = validate(ProtocolFile, dict(content), of=where.removesuffix(": ") or "protocol")
    return Protocol(spec, None if data_dir is None else expanded(data_dir), where)
