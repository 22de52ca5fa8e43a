"""What every family with a diffusers pipeline shares. A family states what it is in class variables, and writes `call`, `encode` and
`text_shapes`; whatever else its pipeline does differently it overrides.

Where parts come from is source.py, the VAE codec.py, the schedule's shift schedules.py, and whether the parts fit fitting.py.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fastgen import manifest
from fastgen.conditioning import Conditioning
from fastgen.errors import UserError, shown
from fastgen.families import adapters, fitting, schedules
from fastgen.families.base import OPTIONS, Family, LatentSpec
from fastgen.families.codec import Codec
from fastgen.families.components import Component, of_teacher
from fastgen.families.source import Source
from fastgen.legibility import Legibility, Reader, read
from fastgen.path import Flow, Path


class _Found(Exception):
    """Ends a network's call once its time features are known."""


@dataclass
class _Loaded:
    """What one pipeline at several sizes loads once."""

    encoders: Any = None


class Pipelined(Family):
    """source: a folder, a hub id or a live pipeline."""

    network: ClassVar[str]  # diffusers class of `component`
    own: ClassVar[Mapping[str, Any]]  # num_inference_steps and guidance_scale of the pipeline's signature
    vae_network: ClassVar[str] = "AutoencoderKL"
    codec_class: ClassVar[type[Codec]] = Codec
    normalised_by: ClassVar[tuple[str, ...]] = ("scaling_factor",)  # options of the VAE, see Codec
    text_length: ClassVar[int | None] = None  # default of the call's max_sequence_length; None: the call has none
    longest_text: ClassVar[int | None] = None  # the most that the call takes
    text_widths: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # see fitting.check_encoders
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)  # the network's attributes that hold its blocks, in order
    pack: ClassVar[int] = 1  # latents on a side that `call` packs into channels
    own_size: ClassVar[tuple[int, int] | None] = None  # the call's default height and width; None: what the network's sample_size says
    own_frames: ClassVar[int | None] = None  # of a video's call; None: pictures
    own_embedded_guidance: ClassVar[float | None] = None  # the call's, for networks with `guidance_embeds`; None: it has none
    sized: ClassVar[bool] = True  # the call takes height and width
    side_unit: ClassVar[int] = 1  # of which the call wants them to be multiples, whatever its network takes
    grid_argument: ClassVar[str | None] = "sigmas"  # of the call, for explicit times; None: it takes none
    gives_sigmas: ClassVar[bool] = False  # the call hands its scheduler mu and evenly spaced times, which the scheduler shifts
    fixed_call: ClassVar[Mapping[str, Any]] = {}  # what the call must always be passed
    grid_ends: ClassVar[tuple[str, ...]] = ()  # options of its scheduler that move the ends of its grid and are not ours, see schedules.py
    after_drawing: ClassVar[tuple[str, ...]] = ()  # components that only look at finished pictures, and may be missing
    # What the pipeline falls back on where its scheduler does not say how the shift follows the number of tokens.
    mu: ClassVar[Mapping[str, float]] = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    kind = "velocity"

    def __init__(
        self,
        source: Any,
        **options: Any,
    ) -> None:
        self.source = Source(source, type(self).__name__, self.pipeline_classes[0], self.optional)
        self._loaded = _Loaded()
        self._checked = False
        self.config = self.source.component(self.component, self.network)
        self.codec = self.codec_class(self.source, self.vae_network, self.normalised_by)
        for component, schema in ((self.config, fitting.Network), (self.codec.config, fitting.VAE)):
            if component.classes:
                component.check(schema)
        self.codec.check()
        self.check_network()
        self.pixels_per_latent, self.path = self.codec.stride, self.own_path()
        given = self._known({key: value for key, value in options.items() if value is not None})
        self._stated_shift = schedules.stated(given["shift"]) if "shift" in given else None
        self._shift = self._stated_shift
        self.size, self.frames = self._size(given), self._frames(given)
        self.max_sequence_length = self._text_length(given)
        self.embedded_guidance = given.get("embedded_guidance", self.own_embedded_guidance) if self._has()["embedded_guidance"] else None
        self.latent = self._latent()

    def _latent(self) -> LatentSpec:
        height, width = (side // self.pixels_per_latent for side in self.size)
        frames = () if self.frames is None else ((self.frames - 1) // self.codec.frame_stride + 1,)
        return LatentSpec(self.config.option("in_channels") // self.pack**2, (*frames, height, width))

    def check_network(self) -> None:
        """UserError for a network of the right class that this family's pipeline calls in another way."""

    @property
    def folder(self) -> FilePath | None:
        return self.source.folder

    @property
    def options(self) -> dict[str, Any]:
        found = {
            "max_sequence_length": self.max_sequence_length,
            "size": list(self.size),
            "frames": self.frames,
            "embedded_guidance": self.embedded_guidance,
            "shift": self._stated_shift,
        }
        return {name: found[name] for name, has in self._has().items() if has and found[name] is not None}

    def _has(self) -> dict[str, bool]:
        """Which options its call or its network has."""
        embeds = self.own_embedded_guidance is not None and bool(self.config.option("guidance_embeds"))
        has = (self.text_length is not None, self.sized, self.own_frames is not None, embeds, isinstance(self.path, Flow))
        return dict(zip(OPTIONS, has, strict=True))

    def _known(self, given: dict[str, Any]) -> dict[str, Any]:
        """The options that are given; UserError for one that this family does not have."""
        allowed = [name for name, has in self._has().items() if has]
        for name in given:
            if ("size" if name == "resolution" else name) not in allowed:
                has = f"its options are {', '.join(allowed)}" if allowed else "it has no options"
                raise UserError(f"recipe key teacher.{name}: does not apply to {self.pipeline_classes[0]}; {has}")
        if "size" in given and "resolution" in given:
            raise UserError("recipe key teacher.resolution: teacher.size says it already; remove one of them")
        return given

    @property
    def resolution(self) -> int:
        """Pixels on a side of square pictures."""
        return self.size[0]

    @property
    def picture_shape(self) -> tuple[int, ...]:
        return (3, *(() if self.frames is None else (self.frames,)), *self.size)

    @property
    def patch(self) -> int:
        """Latents on a side of the network's own patches, beside what `pack` does."""
        size = _last(self.config, "patch_size")
        return 1 if size is None else size

    def largest_side(self) -> int | None:
        """The most pixels that the network's positions reach; None: any number."""
        return None

    def _size(self, given: Mapping[str, Any]) -> tuple[int, int]:
        """(height, width) in pixels, the pipeline's own where none is given; UserError where its call refuses it."""
        key = "resolution" if "resolution" in given else "size"
        if key in given:
            height, width = (given[key],) * 2 if key == "resolution" else given[key]
        elif self.own_size is not None:
            height, width = self.own_size
        elif (latents := _last(self.config, "sample_size")) is not None:
            sides = self.config.option("sample_size")
            first = sides[0] if isinstance(sides, (list, tuple)) else latents
            height, width = first * self.pixels_per_latent, latents * self.pixels_per_latent
        else:
            raise UserError(f"recipe key teacher.pretrained: its {self.component} has no sample_size; give the recipe key teacher.size")
        for side in (height, width):
            if (allowed := self._allowed(side)) is not None:
                said = f"{side} is not {allowed}" if key in given else f"the pipeline's own, {side}, is not {allowed}; give one"
                raise UserError(f"recipe key teacher.{key}: {said}")
        return height, width

    @property
    def size_unit(self) -> int:
        return math.lcm(self.pixels_per_latent * self.pack * self.patch, self.side_unit)

    def _allowed(self, side: int) -> str | None:
        """What a side of a picture must be, where this one is not."""
        unit, largest = self.size_unit, self.largest_side() or math.inf
        allowed = f"a multiple of {unit}" + ("" if largest == math.inf else f" and at most {largest}")
        return allowed if side % unit or side > largest else None

    def at_sizes(self, sizes: Sequence[Sequence[int]]) -> list[Family]:
        key = "recipe key student.sizes"
        if not self.sized:
            raise UserError(f"{key}: the call of {self.pipeline_classes[0]} takes no height and width, so it draws one size alone")
        made: list[Family] = [self._at(size, f"{key}.{place}") for place, size in enumerate(sizes)]
        shifts = {tuple(family.size): family.shift for family in made if isinstance(family, Pipelined)}
        follows = len(set(shifts.values())) > 1
        if follows and not self.gives_sigmas:
            (one, a), (other, b) = min(shifts.items(), key=lambda each: each[1]), max(shifts.items(), key=lambda each: each[1])
            raise UserError(
                f"{key}: the teacher's shift follows the size, {a:.4g} at {list(one)} and {b:.4g} at {list(other)}, and {self.pipeline_classes[0]} "
                "hands its scheduler times that cannot follow it; give teacher.shift, one for all sizes"
            )
        for family in made:
            vars(family)["follows_size"] = follows
        return made

    def _at(self, size: Sequence[int], key: str) -> Pipelined:
        for side in size:
            if (allowed := self._allowed(side)) is not None:
                raise UserError(f"{key}: {shown(list(size))}: {side} is not {allowed}")
        other = copy.copy(self)
        height, width = size
        other.size, other._shift, other.several_sizes = (height, width), self._stated_shift, True
        other.latent = other._latent()
        return other

    def _frames(self, given: Mapping[str, Any]) -> int | None:
        """The first frame stands alone in the latents, and each further one of them stands for `frame_stride` more."""
        frames = given.get("frames", self.own_frames)
        if frames is not None and (frames - 1) % self.codec.frame_stride:
            raise UserError(f"recipe key teacher.frames: {frames} is not 1 more than a multiple of {self.codec.frame_stride}")
        return frames

    def _text_length(self, given: Mapping[str, Any]) -> int | None:
        if self.text_length is None:
            return None
        length = given.get("max_sequence_length") or self._record.get("options", {}).get("max_sequence_length") or self.text_length
        if self.longest_text is not None and length > self.longest_text:
            raise UserError(f"recipe key teacher.max_sequence_length: {length}, but the pipeline takes at most {self.longest_text}")
        return length

    @property
    def own_call(self) -> dict[str, Any]:
        told = {"num_inference_steps": self._record.get("steps"), "guidance_scale": self._record.get("guidance")}
        return {**self.own, **{key: value for key, value in told.items() if value is not None}}

    @cached_property
    def _record(self) -> dict[str, Any]:
        """The fastgen.json of a folder that is a student's, or that states its call."""
        path = self.folder / "fastgen.json" if self.folder else None
        if path is None or not path.is_file():
            return {}
        former = of_teacher(path).get("format", 1) in (1, 2)
        return manifest.upgraded(of_teacher(path, manifest.FormerPipeline if former else manifest.Pipeline))

    def own_path(self) -> Path:
        """The path that the network was trained on."""
        return Flow()

    @property
    def shift(self) -> float:
        if self._shift is None:
            given = self.source.place, self.tokens, self.mu, self.grid_ends, self.mu_at(self.own_call["num_inference_steps"])
            self._shift = schedules.teacher_shift(*given) if isinstance(self.path, Flow) else 1.0
        return self._shift

    follows_size: bool = False  # whether its exported scheduler shifts by mu, which the call makes of the size

    def mu_at(self, steps: int) -> float | None:
        """mu of a call of so many steps, where it depends on them and the scheduler has no say in it; None: it is linear in `tokens`."""
        return None

    def _mu(self, steps: int) -> float:
        """What the call hands its scheduler."""
        stepped = self.mu_at(steps)
        return schedules.linear_mu(self._dynamic, self.tokens) if stepped is None else stepped

    @property
    def tokens(self) -> int:
        """Of a picture, as the call counts them where its shift goes by their number."""
        return math.prod(self.latent.size) // (self.pack * self.patch) ** 2

    def tokens_of(self, x: Tensor) -> int:
        """Of a picture in a call of the network with latents x (B, C, ..., H, W)."""
        return math.prod(x.shape[2:]) // (self.pack * self.patch) ** 2

    @property
    def takes_times(self) -> bool:
        return self.grid_argument is not None

    def has(self, component: str) -> bool:
        return self.source.has(component)

    def tune_with(self, lora: Sequence[Mapping[str, Any]]) -> list[str]:
        if not self.loads_lora:
            merged = "merge the adapter with peft and save the pipeline"
            raise UserError(f"recipe key {adapters.KEY}: {self.pipeline_classes[0]} loads no LoRA files; {merged}")
        if self.folder is None:
            raise UserError(f"recipe key {adapters.KEY}: applies to a folder or a hub id; a live pipeline is taken as it is, so fuse it there")
        found = adapters.find(lora)
        self.load_backbone(meta=True)  # which says what is wrong with the pipeline itself
        warnings = adapters.check(self.source, found)
        self.source.adapters, self._loaded.encoders = found, None
        return warnings

    def load_backbone(self, *, meta: bool = False) -> nn.Module:
        if not self._checked and self.folder is not None:
            fitting.check_networks(self)
            self._checked = True
        return self.meta_network() if meta else self.source.network(self.component, self.network)

    def meta_network(self) -> Any:
        """The network's shapes, as its configuration describes them."""
        return self.source.meta_network(self.config, self.network)

    def blocks(self, backbone: nn.Module) -> list[nn.Module]:
        return [block for name in self.block_lists for block in backbone.get_submodule(name).children()]

    def feature_widths(self, backbone: nn.Module) -> list[int]:
        config: Any = backbone.config
        return [config.num_attention_heads * config.attention_head_dim] * len(self.blocks(backbone))

    def time_features(self, backbone: nn.Module, t: Tensor) -> Tensor:
        assert self.time_projection is not None, f"{type(self).__name__} has no place for scalar inputs"
        found: list[Tensor] = []

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0])
            raise _Found

        weight = next(backbone.parameters())
        x = torch.zeros((len(t), *self.latent.shape), dtype=weight.dtype, device=weight.device)
        cond = {
            key: torch.ones(value.shape, dtype=weight.dtype if value.is_floating_point() else value.dtype, device=weight.device)
            for key, value in self.meta_conditioning(len(t)).items()
        }
        handle = backbone.get_submodule(self.time_projection).register_forward_pre_hook(keep)
        try:
            self.call(backbone, x, t, cond)
        except _Found:
            return found[0]
        finally:
            handle.remove()
        raise AssertionError(f"{self.time_projection} is not part of the network's call")

    @abstractmethod
    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        """What `call` is given of the prompts, (P, ...), by the pipeline's own encoders."""

    @abstractmethod
    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of one prompt's part of what `encode` gives, from configurations."""

    def encode_texts(self, prompts: Sequence[str]) -> Conditioning:
        return self.by_encoders(lambda pipeline: self.encode(pipeline, list(prompts)))

    @torch.no_grad()
    def by_encoders(self, encode: Callable[[Any], Conditioning]) -> Conditioning:
        """What the pipeline with its encoders gives, fp32 or integers, on the CPU; they load on first use. On a GPU each is there while it
        computes, and no longer."""
        if self._loaded.encoders is None:
            device, dtype = self.encoding
            without = (self.component, "vae", *self.after_drawing)
            self._loaded.encoders = self.source.live or self.source.pipeline(without=without, dtype=dtype)
            if self.source.live is None and device.type == "cuda":
                self._loaded.encoders.enable_model_cpu_offload(device=device)
        with self.source.reading():
            cond = encode(self._loaded.encoders)
        if self.source.live is None and self.encoding[0].type == "cuda":
            self._loaded.encoders.maybe_free_model_hooks()  # the last one goes back too
        return {key: (value.float() if value.is_floating_point() else value).cpu() for key, value in cond.items()}

    def encode_with(self, device: torch.device, dtype: torch.dtype) -> None:
        super().encode_with(device, dtype)
        self._loaded.encoders = None

    def meta_conditioning(self, count: int) -> Conditioning:
        integers = {"length", "class_labels"}
        return {
            key: torch.empty((count, *shape), device="meta", dtype=torch.long if key in integers or "mask" in key else torch.float32)
            for key, shape in self.text_shapes().items()
        }

    def legibility(self, prompts: Sequence[str]) -> Legibility:
        return read(prompts, self.readers())

    def readers(self) -> list[Reader]:
        """The tokenizers of those encoders that the pipeline has, of which the last keeps `max_sequence_length` tokens; loaded without
        encoders, which are large."""
        names = self.source.names("tokenizer")
        partners = [name.replace("tokenizer", "text_encoder") for name in names]
        pipeline = self.source.live or self._loaded.encoders or self.source.pipeline(without=(self.component, "vae", *self.after_drawing, *partners))
        readers = []
        for name, partner in zip(names, partners, strict=True):
            if (tokenizer := getattr(pipeline, name)) is not None and self.has(partner):
                cut = self.max_sequence_length if name == names[-1] else None
                readers.append(Reader(name, tokenizer, cut or tokenizer.model_max_length))
        return readers

    def free_encoders(self) -> None:
        self._loaded.encoders = None
        self.codec.free()

    @property
    def vae(self) -> Any:
        return self.codec.vae

    def encode_latents(self, pixels: Tensor) -> Tensor:
        return self.codec.encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents)

    def export_scheduler(self, grid: Sequence[float] | None = None) -> Any:
        # FlowMatchEuler would shift its grid twice where a pipeline passes no sigmas (diffusers#13243), FlowMapEuler takes no mu.
        from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

        scheduler: Any = FlowMatchEulerDiscreteScheduler if self.gives_sigmas else FlowMapEulerDiscreteScheduler
        if self.follows_size and grid is None:
            return scheduler(shift=1.0, shift_terminal=None, use_dynamic_shifting=True, **self._dynamic)
        return scheduler(shift=self.shift if grid is None else 1.0)

    @cached_property
    def _dynamic(self) -> dict[str, Any]:
        return schedules.dynamic(self.source.place, self.mu)

    def grid(self, steps: int, grid: Sequence[float] | None = None) -> Tensor:
        given = np.linspace(1.0, 1 / steps, steps) if self.gives_sigmas and grid is None else grid
        scheduler = self.export_scheduler(grid)
        told = {"mu": self._mu(steps)} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(**({"num_inference_steps": steps} if given is None else {"sigmas": list(given)}), **told)
        return scheduler.sigmas[:-1].double()

    def call_arguments(self, steps: int, guidance: float, grid: Sequence[float] | None = None) -> dict[str, Any]:
        arguments = {"num_inference_steps": steps, "guidance_scale": guidance, **self.fixed_call}
        if self.max_sequence_length is not None:
            arguments["max_sequence_length"] = self.max_sequence_length
        if self.sized:
            arguments |= {"height": self.size[0], "width": self.size[1]}
        if self.frames is not None:
            arguments["num_frames"] = self.frames
        if grid is not None:
            assert self.grid_argument is not None
            arguments[self.grid_argument] = self.told_times(grid)
        return arguments

    @property
    def loading_arguments(self) -> dict[str, Any]:
        variant = next(iter(self.source.variants.values()), None)
        return {**({} if variant is None else {"variant": variant}), **dict.fromkeys(self.source.absent)}

    def told_times(self, grid: Sequence[float]) -> list[Any]:
        """Explicit path times as the call takes them."""
        return list(grid)

    def load_pipeline(self, backbone: nn.Module | None, scheduler: Any) -> Any:
        components: dict[str, Any] = {} if backbone is None else {self.component: backbone}
        return self.source.pipeline(scheduler=scheduler, **components)


def _last(component: Component, key: str) -> Any:
    """An option that is one number or one for each axis; None where it is given as null or its class has none."""
    try:
        value = component.option(key)
    except UserError:
        return None
    return value[-1] if isinstance(value, (list, tuple)) else value
