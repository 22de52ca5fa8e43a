"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): flow matching, time passed as 1000 sigma, two CLIP encoders and T5."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path as FilePath
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fastgen import manifest, records
from fastgen.conditioning import Conditioning
from fastgen.errors import UserError
from fastgen.families import schedules
from fastgen.families.base import Family, LatentSpec
from fastgen.families.components import Component, of_teacher, read_component, read_index
from fastgen.families.weights import check_weights
from fastgen.files import loading
from fastgen.legibility import Legibility, Reader, read
from fastgen.path import Flow

_CLASSES = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}  # that this file calls
_MOST_TOKENS = 512  # StableDiffusion3Pipeline.check_inputs
# StableDiffusion3Pipeline.__call__, where a scheduler does not say it
_MU = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.16}
_Count = Annotated[int, Field(ge=1, le=1000)]
_Width = Annotated[int, Field(ge=1, le=2**18)]
_Side = Annotated[int, Field(ge=1, le=4096)]


class _Transformer(records.Schema):
    """Its options that decide how large anything becomes; all have defaults of diffusers' own."""

    num_layers: _Count = 1
    patch_size: Annotated[int, Field(ge=1, le=64)] = 1
    sample_size: _Side = 1
    pos_embed_max_size: _Side = 1
    in_channels: _Width = 1
    out_channels: _Width | None = None
    num_attention_heads: _Count = 1
    attention_head_dim: _Side = 1
    joint_attention_dim: _Width = 1
    caption_projection_dim: _Width = 1
    pooled_projection_dim: _Width = 1


class _VAE(records.Schema):
    block_out_channels: list[_Width] = Field(default_factory=list, min_length=1, max_length=12)
    layers_per_block: _Count = 1
    latent_channels: _Width = 1
    norm_num_groups: _Width = 1


_SCHEMAS = {"transformer": _Transformer, "vae": _VAE}


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No graph built inside reaches the parameters; afterwards they are as a live pipeline's owner had them."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _same(what: str, found: Any, needed: Any) -> None:
    if found != needed:
        found, needed = (tuple(one) if isinstance(one, torch.Size) else one for one in (found, needed))
        raise ValueError(f"{what}: {found}, where {needed} is needed")


class SD3(Family):
    """StableDiffusion3Pipeline: SD3-medium, SD3.5 medium and large, and the bundled digits teacher."""

    pipeline_classes = ("StableDiffusion3Pipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    time_projection = "time_text_embed.timestep_embedder.linear_2"
    path = Flow()
    kind = "velocity"

    def __init__(self, source: Any, *, max_sequence_length: int | None = None, resolution: int | None = None, shift: float | None = None) -> None:
        from fastgen.families import resolve_source

        self._live = None if isinstance(source, (str, FilePath)) else source
        self.folder = resolve_source(source) if self._live is None else None
        self._encoder_pipeline: Any = None
        self._vae: Any = None
        self._checked = False
        self._shift = None if shift is None else schedules.stated(shift)
        backbone, vae = self._component("transformer"), self._component("vae")
        self.pixels_per_latent = 2 ** (len(vae.option("block_out_channels")) - 1)
        self._patch = backbone.option("patch_size")
        side = self._side(resolution, backbone.option("sample_size"), backbone.option("pos_embed_max_size"))
        self.latent = LatentSpec(backbone.option("in_channels"), (side, side))
        self.max_sequence_length = max_sequence_length or self.own_call.get("max_sequence_length", 256)
        if self.max_sequence_length > _MOST_TOKENS:
            raise UserError(f"recipe key teacher.max_sequence_length: {self.max_sequence_length}, but the pipeline takes at most {_MOST_TOKENS}")
        self.resolution = side * self.pixels_per_latent

    def _side(self, resolution: int | None, sample_size: int, max_patches: int) -> int:
        """Of the latents, at the pictures' resolution in pixels or at the network's own; UserError where the pipeline's call refuses it."""
        unit, pixels = self.pixels_per_latent * self._patch, resolution or sample_size * self.pixels_per_latent
        if pixels % unit or pixels > max_patches * unit:
            allowed = f"a multiple of {unit} and at most {max_patches * unit}"
            if resolution is None:
                raise UserError(f"recipe key teacher.resolution: the pipeline's own, {pixels}, is not {allowed}; give one")
            raise UserError(f"recipe key teacher.resolution: {resolution} is not {allowed}")
        return pixels // self.pixels_per_latent

    def _component(self, name: str) -> Component:
        """The network's or the VAE's configuration. UserError for another class than this file calls, or a VAE without its two numbers."""
        component = read_component(self.folder if self._live is None else self._live, name)
        wrong = [cls for cls in component.classes if cls != _CLASSES[name]]
        if wrong:
            raise UserError(f"recipe key teacher.pretrained: its {name} is a {wrong[0]}, family SD3 takes a {_CLASSES[name]}")
        if component.classes:
            component.check(_SCHEMAS[name])
        for key in ("scaling_factor", "shift_factor") if name == "vae" and component.classes else ():
            value = component.option(key)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise UserError(f"recipe key teacher.pretrained: its vae has {key} {value!r}, but StableDiffusion3Pipeline needs a number")
        return component

    @property
    def own_call(self) -> dict[str, Any]:
        path = self.folder / "fastgen.json" if self.folder else None
        stored = of_teacher(path, manifest.Pipeline).get("call", {}) if path and path.is_file() else {}
        return {"num_inference_steps": 28, "guidance_scale": 7.0, **stored}

    @property
    def shift(self) -> float:
        if self._shift is None:
            tokens = math.prod(self.latent.size) // self._patch**2
            self._shift = schedules.teacher_shift(self.folder if self._live is None else self._live, tokens, _MU)
        return self._shift

    def load_backbone(self, *, meta: bool = False) -> nn.Module:
        from diffusers import SD3Transformer2DModel

        self._check_networks()
        if meta:
            return self._on_meta("transformer")
        if self._live is not None:
            return copy.deepcopy(self._live.transformer).float().eval()
        assert self.folder is not None
        with loading(self.folder / "transformer"):
            return SD3Transformer2DModel.from_pretrained(self.folder, subfolder="transformer", use_safetensors=True).float().eval()

    def _on_meta(self, name: str) -> Any:
        """A network as its configuration describes it, without weights."""
        import diffusers

        options = dict(self._component(name).given)
        with loading((self.folder or FilePath()) / name), torch.device("meta"):
            return getattr(diffusers, _CLASSES[name]).from_config(options).eval()

    def _check_networks(self) -> None:
        """UserError unless transformer and VAE can be built, have their weights, and take and give what the pipeline's other parts do."""
        if self._checked or self.folder is None:
            return
        transformer, vae, shape = self._on_meta("transformer"), self._on_meta("vae"), (1, *self.latent.shape)
        check_weights(self.folder / "transformer", transformer)
        check_weights(self.folder / "vae", vae)
        config = transformer.config
        with loading(self.folder / "transformer"), torch.device("meta"), torch.no_grad():
            texts = {"encoder_hidden_states": (1, 8, config.joint_attention_dim), "pooled_projections": (1, config.pooled_projection_dim)}
            cond = {key: torch.empty(size) for key, size in texts.items()}
            _same("its output", self.call(transformer, torch.empty(shape), torch.ones(1), cond).shape, shape)
        with loading(self.folder / "vae"), torch.device("meta"), torch.no_grad():
            pixels = torch.empty(1, 3, self.resolution, self.resolution)
            _same("its latents", vae.encode(pixels).latent_dist.mode().shape, shape)
            _same("its pictures", vae.decode(torch.empty(shape), return_dict=False)[0].shape, pixels.shape)
        self._check_encoders(config.joint_attention_dim, config.pooled_projection_dim)
        self._checked = True

    def _check_encoders(self, width: int, pooled: int) -> None:
        """UserError where the text encoders' outputs are not as wide as the transformer's inputs, or their tokenizers give longer texts."""
        from transformers import AutoConfig

        assert self.folder is not None
        configs: dict[str, Any] = {}
        for name in filter(self.has, ("text_encoder", "text_encoder_2", "text_encoder_3")):
            with loading(self.folder / name):
                config: Any = AutoConfig.from_pretrained(self.folder / name, trust_remote_code=False)
                configs[name] = getattr(config, "text_config", config)

        def widths(key: str, *names: str) -> list[int]:
            found = {name: getattr(configs[name], key) for name in names if name in configs}
            for name, value in found.items():
                if not isinstance(value, int):
                    raise ValueError(f"{key} of {name} is {records.shown(value)}, not a whole number")
            return list(found.values())

        clips = ("text_encoder", "text_encoder_2")
        with loading(self.folder):
            if len(projections := widths("projection_dim", *clips)) == 2:
                _same("the projections of text_encoder and text_encoder_2 together", sum(projections), pooled)
            _same("the output of text_encoder_3", widths("d_model", "text_encoder_3") or [width], [width])
            if sum(widths("hidden_size", *clips)) > width:
                raise ValueError(f"the outputs of text_encoder and text_encoder_2 are wider together than the transformer's {width}")
            widths("max_position_embeddings", *clips)
        for name, config in configs.items():
            file = self.folder / name.replace("text_encoder", "tokenizer") / "tokenizer_config.json"
            if name != "text_encoder_3" and file.is_file():
                longest, given = config.max_position_embeddings, of_teacher(file).get("model_max_length", 77)
                if not isinstance(given, int) or not 1 <= given <= longest:
                    what = f"key model_max_length is {records.shown(given)}, but {name} reads 1 to {longest} tokens"
                    raise UserError(f"recipe key teacher.pretrained: {str(file)!r}: {what}")

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return backbone(hidden_states=x, timestep=1000 * t, **cond, return_dict=False)[0]

    def time_features(self, backbone: nn.Module, t: Tensor) -> Tensor:
        embed: Any = backbone.time_text_embed
        layers = embed.timestep_embedder
        return layers.act(layers.linear_1(embed.time_proj(1000 * t).to(layers.linear_1.weight.dtype)))

    def blocks(self, backbone: nn.Module) -> list[nn.Module]:
        return list(backbone.transformer_blocks)  # type: ignore[arg-type]

    def feature_widths(self, backbone: nn.Module) -> list[int]:
        network: Any = backbone
        return [network.config.num_attention_heads * network.config.attention_head_dim] * len(network.transformer_blocks)

    @torch.no_grad()
    def encode_texts(self, prompts: Sequence[str]) -> Conditioning:
        if self._encoder_pipeline is None:
            self._encoder_pipeline = self._live or self._pipeline(transformer=None, vae=None)
        with nullcontext() if self.folder is None else loading(self.folder):
            embeds, _, pooled, _ = self._encoder_pipeline.encode_prompt(
                prompt=list(prompts), prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
            )
        return {"encoder_hidden_states": embeds.float().cpu(), "pooled_projections": pooled.float().cpu()}

    def meta_conditioning(self, count: int) -> Conditioning:
        network, tokens = self._component("transformer"), self._readers()[0].length + self.max_sequence_length
        texts = torch.empty((count, tokens, network.option("joint_attention_dim")), device="meta")
        return {"encoder_hidden_states": texts, "pooled_projections": torch.empty((count, network.option("pooled_projection_dim")), device="meta")}

    def legibility(self, prompts: Sequence[str]) -> Legibility:
        return read(prompts, self._readers())

    def _readers(self) -> list[Reader]:
        """The tokenizers of those encoders that the pipeline has; loaded without them, which are large."""
        encoders = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2", "tokenizer_3": "text_encoder_3"}
        pipeline = self._live or self._encoder_pipeline or self._pipeline(transformer=None, vae=None, **dict.fromkeys(encoders.values()))
        return [
            Reader(name, tokenizer, self.max_sequence_length if name == "tokenizer_3" else pipeline.tokenizer_max_length)
            for name, encoder in encoders.items()
            if (tokenizer := getattr(pipeline, name)) is not None and self.has(encoder)
        ]

    def has(self, component: str) -> bool:
        if self._live is not None:
            return getattr(self._live, component) is not None
        assert self.folder is not None
        return (read_index(self.folder).get(component) or [None])[0] is not None

    def free_encoders(self) -> None:
        self._encoder_pipeline = self._vae = None

    @property
    def vae(self) -> Any:
        if self._vae is None and self._live is not None:
            self._vae = self._live.vae
        elif self._vae is None:
            from diffusers import AutoencoderKL

            assert self.folder is not None
            with loading(self.folder / "vae"):
                self._vae = AutoencoderKL.from_pretrained(self.folder, subfolder="vae", use_safetensors=True).float().eval().requires_grad_(False)
        return self._vae

    def _vae_near(self, x: Tensor) -> Any:
        """The VAE on x's device; a live pipeline's stays where its owner put it."""
        return self.vae if self._live is not None else self.vae.to(x.device)

    @torch.no_grad()
    def encode_latents(self, pixels: Tensor) -> Tensor:
        vae, config = self._vae_near(pixels), self.vae.config
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
        return (latents - config.shift_factor) * config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        vae, config = self._vae_near(latents), self.vae.config
        with _frozen(vae):
            pixels = vae.decode(latents.to(vae.device, vae.dtype) / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        return pixels.float() / 2 + 0.5

    def export_scheduler(self, grid: Sequence[float] | None = None) -> Any:
        # FlowMatchEuler would shift its grid twice: this pipeline passes no sigmas (diffusers#13243).
        from diffusers import FlowMapEulerDiscreteScheduler

        return FlowMapEulerDiscreteScheduler(shift=self.shift if grid is None else 1.0)

    def grid(self, steps: int, grid: Sequence[float] | None = None) -> Tensor:
        scheduler = self.export_scheduler(grid)
        scheduler.set_timesteps(**({"num_inference_steps": steps} if grid is None else {"sigmas": list(grid)}))
        return scheduler.sigmas[:-1].double()

    def call_arguments(self, steps: int, guidance: float, grid: Sequence[float] | None = None) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "max_sequence_length": self.max_sequence_length,
            "height": self.resolution,
            "width": self.resolution,
        }
        return arguments if grid is None else arguments | {"sigmas": list(grid)}

    def load_pipeline(self, backbone: nn.Module | None, scheduler: Any) -> Any:
        if self._live is not None:
            from diffusers import StableDiffusion3Pipeline

            components = {key: value for key, value in self._live.components.items() if key not in ("transformer", "scheduler")}
            transformer: Any = self._live.transformer if backbone is None else backbone
            return StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **components)
        return self._pipeline(scheduler=scheduler, **({} if backbone is None else {"transformer": backbone}))

    def _pipeline(self, *, scheduler: Any = None, **components: Any) -> Any:
        from diffusers import StableDiffusion3Pipeline

        assert self.folder is not None
        with loading(self.folder):  # its own scheduler is not needed, and with `teacher.shift` it may be of a class that diffusers does not know
            pipeline: Any = StableDiffusion3Pipeline.from_pretrained(self.folder, use_safetensors=True, scheduler=None, **components)
        pipeline.register_modules(scheduler=scheduler)
        return pipeline.to(dtype=torch.float32)
