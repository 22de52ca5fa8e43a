"""Where the parts of a diffusers pipeline come from: a folder, or a live pipeline, of which nothing is changed."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgen.errors import UserError
from fastgen.families import adapters
from fastgen.families.adapters import Adapter
from fastgen.families.complete import variants
from fastgen.families.components import Component, WithExperts, of_teacher, read_component, read_index, without_experts
from fastgen.families.weights import WeightFiles, weight_files
from fastgen.files import loading
from fastgen.surgery.moe import stored

# What diffusers itself makes of the class that older folders name, by the network's kind of norm.
_FORMER = "Transformer2DModel"
_RENAMED = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


class Source:
    """A folder, a hub id or a live pipeline. family: what messages call the reader; pipeline_class: of diffusers, which loads it; optional:
    components that it may go without."""

    def __init__(self, source: Any, family: str, pipeline_class: str, optional: Sequence[str] = ()) -> None:
        from fastgen.families import resolve_source

        self.live = None if isinstance(source, (str, Path)) else source
        self.folder = resolve_source(source) if self.live is None else None
        self.family, self.pipeline_class, self.optional = family, pipeline_class, optional
        self.adapters: tuple[Adapter, ...] = ()  # that are fused into whatever is loaded

    @cached_property
    def variants(self) -> dict[str, str]:
        """The components that a folder holds as a variant alone, such as fp16."""
        return {} if self.folder is None else variants(self.folder)

    @property
    def place(self) -> Any:
        """What `read_component` reads."""
        return self.folder if self.live is None else self.live

    def reading(self, name: str = "") -> AbstractContextManager[None]:
        """Around diffusers' own loading of a component, or of all."""
        return nullcontext() if self.folder is None else loading(self.folder / name)

    def component(self, name: str, class_name: str) -> Component:
        """A component's configuration; UserError for another class than `class_name`. A live network of no diffusers class is taken at its word."""
        component = read_component(self.place, name)
        renamed = _RENAMED.get(str(component.given.get("norm_type")), _FORMER)
        component = replace(component, classes=tuple(dict.fromkeys(renamed if cls == _FORMER else cls for cls in component.classes)))
        wrong = [cls for cls in component.classes if cls != class_name]
        if wrong:
            raise UserError(f"recipe key teacher.pretrained: its {name} is a {wrong[0]}, family {self.family} takes a {class_name}")
        return component

    def has(self, name: str) -> bool:
        """Whether the pipeline has a component, rather than going without it."""
        if self.folder is None:
            return getattr(self.live, name, None) is not None
        return (read_index(self.folder).get(name) or [None])[0] is not None

    @property
    def absent(self) -> list[str]:
        """The family's optional components that the pipeline goes without: diffusers loads it only when it is told so."""
        return [name for name in self.optional if not self.has(name)]

    def setting(self, name: str) -> Any:
        """An argument of the pipeline itself that is no component, else its class's own default."""
        given = self.live.config if self.live is not None else read_index(self.place)
        return given[name] if name in given else inspect.signature(self._diffusers(self.pipeline_class).__init__).parameters[name].default

    def names(self, prefix: str) -> list[str]:
        """The components whose names begin so, of those that the pipeline names, in order; it may go without some of them."""
        entries = self.live.components if self.live is not None else read_index(self.place)
        return sorted(name for name in entries if name.startswith(prefix))

    def network(self, name: str, class_name: str) -> nn.Module:
        """A network of its own, fp32, in eval mode: loaded, or a copy of the live pipeline's."""
        if self.live is not None:
            return copy.deepcopy(getattr(self.live, name)).float().eval()
        assert self.folder is not None
        with self.reading(name):
            network = load_network(self._diffusers(class_name), self.folder, name, self.variants.get(name))
        self._fuse({name: network})
        return network

    def outline(self, component: Component, class_name: str) -> tuple[nn.Module, WeightFiles] | None:
        """A network in eval mode with its buffers, but without its parameters, which are on the meta device as fp32, and where these are read; None
        where they are not those of files alone, under their own names."""
        if self.folder is None or self.adapters or component.experts is not None:
            return None
        from accelerate import init_empty_weights

        folder, cls = self.folder / component.name, self._diffusers(class_name)
        with loading(folder), init_empty_weights(include_buffers=False):
            network = cls.from_config(dict(component.given)).float().eval()
        files = weight_files(folder, network.state_dict(), self.variants.get(component.name))
        if files is None:
            return None
        buffers = dict(network.named_buffers())
        for name, value in files.read({name: None for name in network.state_dict() if name in buffers}):
            buffers[name].copy_(value)
        return network, files

    def meta_network(self, component: Component, class_name: str) -> Any:
        """The same as its configuration describes it, without weights."""
        with loading((self.folder or Path()) / component.name), torch.device("meta"):
            network = self._diffusers(class_name).from_config(dict(component.given)).eval()
            return network if component.experts is None else stored.rebuild(network, component.experts, f"{str(component.file)!r}")

    def meta_part(self, name: str) -> Any:
        """A component of a folder that is a network, as its class and its configuration in there describe it, without weights."""
        assert self.folder is not None
        library, class_name = read_index(self.folder)[name]
        cls: Any = getattr(importlib.import_module(library), class_name)
        with loading(self.folder / name), torch.device("meta"):
            if library == "transformers":
                return cls(cls.config_class.from_pretrained(self.folder / name)).eval()
            return cls.from_config(cls.load_config(self.folder, subfolder=name)).eval()

    def _fuse(self, parts: Mapping[str, nn.Module]) -> None:
        if self.adapters and (taking := {name: part for name, part in parts.items() if name in self.taking_adapters}):
            adapters.fuse(self, self.adapters, taking)

    @property
    def taking_adapters(self) -> Sequence[str]:
        """The pipeline's components that adapters go into."""
        return adapters.loadable(self._diffusers(self.pipeline_class))

    def pipeline(self, *, scheduler: Any = None, without: Sequence[str] = (), dtype: torch.dtype = torch.float32, **components: Any) -> Any:
        """The whole pipeline around other components and without some, in half precision as diffusers loads it; a live one's own are shared as they
        are."""
        cls, given = self._diffusers(self.pipeline_class), {**components, **dict.fromkeys((*without, *self.absent))}
        if self.live is not None:
            named = inspect.signature(cls.__init__).parameters.keys() & self.live.config.keys()
            settings = {key: self.live.config[key] for key in named - self.live.components.keys()}
            return cls(**{**settings, **self.live.components, **given, "scheduler": scheduler})
        with self.reading():  # its own scheduler is not needed, and with `teacher.shift` it may be of a class that diffusers does not know
            variant = next(iter(self.variants.values()), None)  # diffusers takes it where there is one
            given |= {} if dtype == torch.float32 else {"torch_dtype": dtype}
            # diffusers looks for the class of a component of code's own even where it is given one.
            split = {name: given[name] if name in given else self._split(name) for name in self.with_experts}
            given |= dict.fromkeys(split)
            pipeline = cls.from_pretrained(self.folder, use_safetensors=True, variant=variant, scheduler=None, **given)
        pipeline.register_modules(scheduler=scheduler, **split)
        self._fuse({name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module) and name not in given})
        for module in filter(lambda part: isinstance(part, nn.Module), pipeline.components.values()):
            if dtype == torch.float32:
                module.float()  # the pipeline's `to` warns of layers that are to stay in fp32
        return pipeline

    @property
    def with_experts(self) -> list[str]:
        """The components whose layers were split."""
        assert self.folder is not None
        entries = read_index(self.folder)
        return [name for name, entry in entries.items() if isinstance(entry, list) and entry[0] is not None and _is_split(self.folder / name)]

    def _split(self, name: str) -> nn.Module:
        assert self.folder is not None
        return load_network(self._diffusers(read_component(self.folder, name).classes[0]), self.folder, name)

    @staticmethod
    def _diffusers(class_name: str) -> Any:
        import diffusers

        return getattr(diffusers, class_name)


def load_network(cls: Any, folder: Path, name: str, variant: str | None = None) -> nn.Module:
    """A network below `folder`, fp32, in eval mode; one of experts as its configuration says, where none of the folder's code runs."""
    if not _is_split(folder / name):
        return cls.from_pretrained(folder, subfolder=name, use_safetensors=True, variant=variant).float().eval()
    from accelerate import init_empty_weights

    file = folder / name / "config.json"
    given = of_teacher(file, WithExperts)
    with init_empty_weights(include_buffers=False):
        network = stored.rebuild(cls.from_config(without_experts(given)), given["experts"], f"{str(file)!r}")
    stored.load_weights(network, folder / name)
    return network.float().eval()


def _is_split(folder: Path) -> bool:
    return (folder / "config.json").is_file() and "experts" in of_teacher(folder / "config.json")
