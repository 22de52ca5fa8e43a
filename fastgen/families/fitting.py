"""Whether a pipeline's parts fit together, from configurations and the headers of weights: networks on the meta device, encoders by their widths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from fastgen import records
from fastgen.errors import UserError
from fastgen.families.complete import has_no_weights
from fastgen.families.components import of_teacher
from fastgen.families.source import Source
from fastgen.families.weights import check_weights
from fastgen.files import loading

if TYPE_CHECKING:
    from fastgen.families.pipelined import Pipelined

_Count = Annotated[int, Field(ge=1, le=1000)]
_Width = Annotated[int, Field(ge=1, le=2**18)]
_Side = Annotated[int, Field(ge=1, le=4096)]
_Patch = Annotated[int, Field(ge=1, le=64)]
_Sides = _Side | list[_Side]
_Widths = _Width | list[_Width]


class Network(records.Schema):
    """The options of diffusers' networks that decide how large anything becomes; all have defaults of their class's own."""

    num_layers: _Count = 1
    num_single_layers: Annotated[int, Field(ge=0, le=1000)] = 1
    num_mmdit_layers: Annotated[int, Field(ge=0, le=1000)] = 1
    num_single_dit_layers: Annotated[int, Field(ge=0, le=1000)] = 1
    patch_size: _Patch | list[_Patch] | None = 1
    sample_size: _Sides | None = 1
    pos_embed_max_size: _Width = 1  # AuraFlow counts a square of positions by its area
    in_channels: _Width = 1
    out_channels: _Width | None = None
    num_attention_heads: _Count | list[_Count] | None = 1
    attention_head_dim: _Sides = 1
    joint_attention_dim: _Width = 1
    cross_attention_dim: _Widths | None = 1
    caption_projection_dim: _Width = 1
    pooled_projection_dim: _Width = 1
    approximator_num_channels: _Width = 1
    approximator_hidden_dim: _Width = 1
    approximator_layers: _Count = 1
    block_out_channels: list[_Width] = Field(default=[1], min_length=1, max_length=12)
    layers_per_block: _Count | list[_Count] = 1


class VAE(records.Schema):
    block_out_channels: list[_Width] = Field(default=[1], min_length=1, max_length=12)
    layers_per_block: _Count | list[_Count] = 1
    latent_channels: _Width = 1
    norm_num_groups: _Width = 1


def check_networks(family: Pipelined) -> None:
    """UserError unless a folder's network and VAE can be built, have their weights, and take and give what the pipeline's other parts do."""
    folder, shape = family.folder, (1, *family.latent.shape)
    assert folder is not None
    network = family.meta_network()
    if not has_no_weights(folder):  # a plan goes without
        check_weights(folder / family.component, network, family.source.variants.get(family.component))
    check_encoders(family.source, network.config, family.text_widths)
    with loading(folder / family.component), torch.device("meta"), torch.no_grad():
        made = family.call(network, torch.empty(shape), torch.ones(1), family.meta_conditioning(1))
        _same("its output", made.shape, shape)
    if family.codec.config.classes:
        _check_vae(family, folder)


def _check_vae(family: Pipelined, folder: Path) -> None:
    shape, vae = (1, *family.latent.shape), family.source.meta_network(family.codec.config, family.vae_network)
    if not has_no_weights(folder):
        check_weights(folder / "vae", vae, family.source.variants.get("vae"))
    with loading(folder / "vae"), torch.device("meta"), torch.no_grad():
        pixels = torch.empty(1, *family.picture_shape)
        still = family.codec.is_video and pixels.ndim == 4
        made = vae.encode(pixels[:, :, None] if still else pixels)
        latents = made.latent_dist.mode() if hasattr(made, "latent_dist") else made.latent
        _same("its latents", family.codec.arranged(latents[:, :, 0] if still else latents).shape, shape)
        drawn = vae.decode(torch.empty(latents.shape), return_dict=False)[0]
        _same("its pictures", (drawn[:, :, 0] if still else drawn).shape, pixels.shape)


def check_encoders(source: Source, network: Any, widths: Mapping[str, tuple[str, ...]]) -> None:
    """UserError where text encoders are not as wide as the network needs, or their tokenizers give CLIP longer texts than it reads.

    network: its configuration; widths: its options, each with what must sum up to it, as `ENCODER.OPTION`. Encoders that the pipeline
    goes without count as fitting.
    """
    assert source.folder is not None
    configs = {name: _config(source.folder / name) for name in filter(source.has, source.names("text_encoder"))}
    with loading(source.folder):
        for option, parts in widths.items():
            encoders, keys = zip(*(part.split(".") for part in parts), strict=True)
            if all(name in configs for name in encoders):
                found = sum(_whole(configs[name], name, key) for name, key in zip(encoders, keys, strict=True))
                _same(f"the {_WORDS.get(keys[0], keys[0])} of {' and '.join(encoders)}" + " together" * (len(encoders) > 1), found, network[option])
    for name, config in configs.items():
        if "clip" in config.model_type:
            with loading(source.folder):
                longest = _whole(config, name, "max_position_embeddings")
            _check_length(source.folder / name.replace("text_encoder", "tokenizer") / "tokenizer_config.json", name, longest)


_WORDS = {"projection_dim": "projections", "d_model": "output", "hidden_size": "output"}


def _config(folder: Any) -> Any:
    from transformers import AutoConfig

    with loading(folder):
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return getattr(config, "text_config", config)


def _whole(config: Any, name: str, key: str) -> int:
    value = getattr(config, key)
    if not isinstance(value, int):
        raise ValueError(f"{key} of {name} is {records.shown(value)}, not a whole number")
    return value


def _check_length(file: Any, encoder: str, longest: int) -> None:
    given = of_teacher(file).get("model_max_length", 77) if file.is_file() else 1
    if not isinstance(given, int) or not 1 <= given <= longest:
        what = f"key model_max_length is {records.shown(given)}, but {encoder} reads 1 to {longest} tokens"
        raise UserError(f"recipe key teacher.pretrained: {str(file)!r}: {what}")


def _same(what: str, found: Any, needed: Any) -> None:
    if found != needed:
        found, needed = (tuple(one) if isinstance(one, torch.Size) else one for one in (found, needed))
        raise ValueError(f"{what}: {found}, where {needed} is needed")
