"""What every family with a diffusers pipeline shares. A family states what it is in class variables, and writes `call`, `encode` and
`text_shapes`; whatever else its pipeline does differently it overrides.

Where parts come from is source.py, sizes sizing.py, the VAE codec.py, the schedule's shift schedules.py, and whether the parts fit fitting.py.
"""

from __future__ import annotations

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
from fastgen.errors import UserError
from fastgen.families import adapters, fitting, schedules
from fastgen.families.base import OPTIONS
from fastgen.families.codec import Codec
from fastgen.families.components import of_teacher
from fastgen.families.sizing import Sizing
from fastgen.families.source import Source
from fastgen.families.weights import WeightFiles
from fastgen.legibility import Legibility, Reader, read
from fastgen.path import Flow, Path


class _Found(Exception):
    """Ends a network's call once its time features are known."""


@dataclass
class _Loaded:
    """What one pipeline at several sizes loads once."""

    encoders: Any = None


class Pipelined(Sizing):
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
    own_embedded_guidance: ClassVar[float | None] = None  # the call's, for networks with `guidance_embeds`; None: it has none
    grid_argument: ClassVar[str | None] = "sigmas"  # of the call, for explicit times; None: it takes none
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
        self.embedded_guidance = self._told(given) if self._has()["embedded_guidance"] else None
        self.latent = self._latent()

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

    def _text_length(self, given: Mapping[str, Any]) -> int | None:
        if self.text_length is None:
            return None
        length = given.get("max_sequence_length") or self._record.get("options", {}).get("max_sequence_length") or self.text_length
        if self.longest_text is not None and length > self.longest_text:
            raise UserError(f"recipe key teacher.max_sequence_length: {length}, but the pipeline takes at most {self.longest_text}")
        return length

    def _told(self, given: Mapping[str, Any]) -> float | None:
        """What its network is told of guidance; a student's what it was trained with."""
        recorded = self._record.get("options", {}).get("embedded_guidance")
        return given.get("embedded_guidance", self.own_embedded_guidance if recorded is None else recorded)

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

    def mu_at(self, steps: int) -> float | None:
        """mu of a call of so many steps, where it depends on them and the scheduler has no say in it; None: it is linear in `tokens`."""
        return None

    def _mu(self, steps: int) -> float:
        """What the call hands its scheduler."""
        stepped = self.mu_at(steps)
        mu = schedules.linear_mu(self._dynamic, self.tokens) if stepped is None else stepped
        return mu if self._dynamic["time_shift_type"] == "linear" else min(mu, schedules.LARGEST_MU)

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

    def load_outline(self) -> tuple[nn.Module, WeightFiles] | None:
        self.load_backbone(meta=True)  # which says what is wrong with it
        return self.source.outline(self.config, self.network)

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
                if cut and (text := self.before(pipeline, tokenizer)):
                    own, taken = tokenizer.num_special_tokens_to_add(), len(tokenizer(text, add_special_tokens=False)["input_ids"])
                    cut = max(own, cut - taken)
                readers.append(Reader(name, tokenizer, cut or tokenizer.model_max_length))
        return readers

    def before(self, pipeline: Any, tokenizer: Any) -> str:
        """What the pipeline puts before a prompt, and whose tokens take their part of `max_sequence_length`."""
        return ""

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


def before_in_chat(tokenizer: Any, *, thinking: bool) -> str:
    """What a chat template puts before a prompt."""
    asked = [{"role": "user", "content": "PROMPT"}]
    return tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, enable_thinking=thinking).partition("PROMPT")[0]
