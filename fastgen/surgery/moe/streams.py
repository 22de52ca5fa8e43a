"""How diffusers' blocks are called: which arguments their outputs replace, so that a block can be left out, and what a router of blocks sees.

diffusers has no convention that all blocks follow (CogVideoX gives image and text the other way round), so classes are named; others are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import UserError

KEY = "recipe key student.moe.groups"
IMAGE, TEXT = "hidden_states", "encoder_hidden_states"


@dataclass(frozen=True)
class Streams:
    """A class of blocks by its forward's arguments. outputs: those that the outputs replace, in their order; width: the layer that reads the first
    of `outputs` or tokens like it, D wide; text: the argument with text, the layer that reads it and its mask's argument; vector: the
    modulation's argument, `times` D wide."""

    outputs: tuple[str, ...]
    width: str
    vector: str
    times: int = 1
    text: tuple[str, str, str] | None = None
    mask: str = ""  # of the image tokens

    @property
    def image(self) -> str:
        return self.outputs[-1]

    def described(self) -> dict[str, Any]:
        """What an export's code needs of it, as JSON has it."""
        text = None if self.text is None else [self.text[0], self.text[2]]
        return {"outputs": list(self.outputs), "mask": self.mask, "text": text, "vector": self.vector, "embeds": self is _DIT}


_MASK = "encoder_attention_mask"
_STREAMS = {
    "FluxTransformerBlock": Streams((TEXT, IMAGE), "attn.to_q", "temb", text=(TEXT, "attn.add_k_proj", "")),
    "FluxSingleTransformerBlock": Streams((TEXT, IMAGE), "attn.to_q", "temb", text=(TEXT, "attn.to_q", "")),
    "JointTransformerBlock": Streams((TEXT, IMAGE), "attn.to_q", "temb", text=(TEXT, "attn.add_k_proj", "")),
    "QwenImageTransformerBlock": Streams((TEXT, IMAGE), "attn.to_q", "temb", text=(TEXT, "attn.add_k_proj", f"{TEXT}_mask")),
    "Flux2TransformerBlock": Streams((TEXT, IMAGE), "attn.to_q", "temb_mod_img", 6, text=(TEXT, "attn.add_k_proj", "")),
    "Flux2SingleTransformerBlock": Streams((IMAGE,), "attn.to_qkv_mlp_proj", "temb_mod", 3),  # text is among its tokens
    "OvisImageTransformerBlock": Streams((TEXT, IMAGE), "attn.to_q", "temb", text=(TEXT, "attn.add_k_proj", "")),
    "OvisImageSingleTransformerBlock": Streams((TEXT, IMAGE), "attn.to_q", "temb", text=(TEXT, "attn.to_q", "")),
    "PRXBlock": Streams((IMAGE,), "attention.img_qkv_proj", "temb", text=(TEXT, "attention.txt_kv_proj", "attention_mask")),
    "WanTransformerBlock": Streams((IMAGE,), "attn1.to_q", "temb", 6, text=(TEXT, "attn2.to_k", "")),
    "SanaTransformerBlock": Streams((IMAGE,), "attn1.to_q", "timestep", 6, text=(TEXT, "attn2.to_k", _MASK)),
    "ZImageTransformerBlock": Streams(("x",), "attention.to_q", "adaln_input", mask="attn_mask"),
}
_PIXART = Streams((IMAGE,), "attn1.to_q", "timestep", 6, text=(TEXT, "attn2.to_k", _MASK))
_DIT = Streams((IMAGE,), "attn1.to_q", "timestep")


def streams_of(block: Any, name: str) -> Streams:
    """UserError, which names the block, for one of another class."""
    kind = type(block).__name__
    if kind == "BasicTransformerBlock":
        found = {"ada_norm_single": _PIXART, "ada_norm_zero": _DIT}.get(block.norm_type)
    else:
        found = None if kind == "ZImageTransformerBlock" and not block.modulation else _STREAMS.get(kind)
    if found is None:
        raise UserError(f"{KEY}: {name} is a {kind}; how to leave one out is not known; student.moe.leave: [{name}] has it always run")
    return found


def is_last_of_text(block: Any) -> bool:
    """Whether it gives no text on, as SD3's last block, which therefore cannot be left out."""
    return bool(getattr(block, "context_pre_only", False))


def widths(block: Any, streams: Streams) -> tuple[int, int]:
    """Of what the router sees: [pooled image; pooled text], and the modulation's vector."""
    image = attrgetter(streams.width)(block).in_features
    text = 0 if streams.text is None else attrgetter(streams.text[1])(block).in_features
    modulation = block.adaLN_modulation[0].in_features if type(block).__name__ == "ZImageTransformerBlock" else streams.times * image
    return image + text, modulation


def seen(block: Any, streams: Streams, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """([mean image token; mean text token], the modulation's vector) of a block's arguments, each (B, …), in fp32 or wider. Text that a mask
    hides, which is there because another sample's text is longer, does not count."""
    image = given[streams.image]
    pooled = [_mean(image, given.get(streams.mask))]
    if streams.text is not None:
        argument, _, mask = streams.text
        pooled.append(_mean(given[argument], given.get(mask)))
    return torch.cat(pooled, -1), _vector(block, streams, given, len(image))


def _vector(block: Any, streams: Streams, given: Mapping[str, Any], batch: int) -> Tensor:
    value = given[streams.vector]
    if streams is _DIT:  # its blocks embed time and class each for itself
        value = block.norm1.emb(value, given["class_labels"], hidden_dtype=given[IMAGE].dtype)
    if value.ndim == 4:  # (B, N, 6, D): Wan with a time for each token
        value = value.mean(1)
    return value[:batch].flatten(1)  # Qwen-Image's editing has vectors of time 0 below those of the samples


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Over tokens of x (B, N, C); mask: (B, N), or biases on attention scores (B, 1, N), which hide by large negative numbers."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        return x.mean(1, dtype=wide)
    is_there = (mask > -1 if mask.is_floating_point() else mask.bool()).reshape(len(x), -1)[:, : x.shape[1]].to(wide)
    return (x.to(wide) * is_there[..., None]).sum(1) / is_there.sum(1, keepdim=True).clamp(min=1)
