"""The weights of a component: whether they are those of the network that its configuration describes, by names and shapes alone, and some rows of
them, for a process that holds no more."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from fastgen import records
from fastgen.errors import UserError
from fastgen.families.components import of_teacher
from fastgen.files import reading

STEM = "diffusion_pytorch_model.safetensors"
# What diffusers itself renames when it loads the attention of an old VAE.
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class WeightsIndex(records.Schema):
    """*.safetensors.index.json of a network in several files."""

    weight_map: dict[str, str]


def check_weights(folder: Path, network: nn.Module, variant: str | None = None) -> None:
    """UserError where the tensors of a diffusers network (a meta one will do) are not those in a component's `folder`, by name and shape;
    variant: of the files. Nothing is said of weights that are not there at all: whoever loads them will."""
    found: dict[str, tuple[int, ...]] = {}
    for file in _files(folder, "" if variant is None else f".{variant}"):
        with reading(file), safe_open(file, "pt") as header:
            found |= {_renamed(key): tuple(header.get_slice(key).get_shape()) for key in header.keys()}  # noqa: SIM118
    for name, tensor in network.state_dict().items() if found else ():
        if found.get(name) != tuple(tensor.shape):
            is_there = f"has the shape {found[name]}" if name in found else "is missing"
            what = f"{name} {is_there} in its weights, where its config.json says {tuple(tensor.shape)}"
            raise UserError(f"recipe key teacher.pretrained: cannot read {str(folder)!r}: {what}")
    ignored = [re.compile(pattern) for pattern in getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()]
    more = [name for name in sorted(found.keys() - network.state_dict().keys()) if not any(pattern.search(name) for pattern in ignored)]
    if more:
        what = f"{more[0]} is among its weights, but not in the network of its config.json"
        raise UserError(f"recipe key teacher.pretrained: cannot read {str(folder)!r}: {what}")


@dataclass(frozen=True)
class WeightFiles:
    """Where a network's weights are read, by the names that it has for them."""

    places: Mapping[str, Path]

    def read(self, rows: Mapping[str, range | None]) -> Iterator[tuple[str, Tensor]]:
        """These rows of these weights, None for all, in the dtype of their file, each file opened once: nothing else of it is read."""
        for file, names in groupby(sorted(rows, key=lambda name: (self.places[name], name)), key=self.places.__getitem__):
            with reading(file), safe_open(file, "pt") as content:
                for name in names:
                    if (own := rows[name]) is None:
                        yield name, content.get_tensor(name)
                    else:
                        part = content.get_slice(name)
                        yield name, part[own.start : own.stop] if own else part[:1][:0]


def weight_files(folder: Path, names: Iterable[str], variant: str | None = None) -> WeightFiles | None:
    """Where all weights of these names lie below a component's `folder`; None where they do not, by these names."""
    places: dict[str, Path] = {}
    for file in _files(folder, "" if variant is None else f".{variant}"):
        with reading(file), safe_open(file, "pt") as header:
            places |= dict.fromkeys(header.keys(), file)
    return WeightFiles(places) if set(names) <= places.keys() else None


def _files(folder: Path, variant: str) -> list[Path]:
    index = folder / f"{STEM}.index{variant}.json"
    if index.is_file():
        return [folder / name for name in sorted(set(of_teacher(index, WeightsIndex)["weight_map"].values()))]
    single = folder / STEM.replace(".safetensors", f"{variant}.safetensors")
    return [single] if single.exists() else []


def _renamed(key: str) -> str:
    for old, new in _OLD_NAMES.items():
        key = key.replace(old, new)
    return key
