"""What encodes a run's prompts and images, and what decides the numbers that come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.config import DataBlock, TeacherBlock
from fastgen.data import store
from fastgen.data.encoded import Encoder
from fastgen.data.images import CaptionedImages
from fastgen.data.store import DTYPES, Encoded, Kind
from fastgen.families import parts_hash
from fastgen.families.base import Family

_MADE_BY: Mapping[Kind, tuple[str, ...]] = {"prompts": ("text_encoder", "tokenizer"), "latents": ("vae",)}


def origin_of(family: Family, teacher: TeacherBlock, data: DataBlock, dtype: torch.dtype) -> Callable[[Kind], dict[str, Any]]:
    """What decides each kind's rows, beside what they are made of. A fine-tune with the same encoders has the same. dtype: of the text encoders."""

    def origin(kind: Kind) -> dict[str, Any]:
        tuned = teacher.adapters if kind == "prompts" else []  # adapters go into text encoders too, and never into the VAE
        made_by = parts_hash(teacher.pretrained, teacher.revision, _MADE_BY[kind], tuned)
        if kind == "prompts":
            return {
                "pipeline": family.pipeline_classes[0] if family.pipeline_classes else type(family).__name__,
                "text encoders": made_by,
                "teacher.dtype": next(name for name, known in DTYPES.items() if known == dtype),
                "teacher.max_sequence_length": family.options.get("max_sequence_length"),
            }
        return {"vae": made_by, "teacher.size": list(family.picture_shape[-2:]), "data.crop": data.crop, "data.background": data.background}

    return origin


def of_prompts(family: Family, texts: Sequence[str], batch: int = 64) -> Encoder:
    """The conditioning of prompts."""

    def encode(ids: Sequence[int]) -> Encoded:
        some = [texts[i] for i in ids]
        return Encoded(family.encode_prompts(some, batch), some, {})

    return Encoder("prompts", len(texts), _fields(family.meta_conditioning(1)), lambda count: store.of_texts(texts[:count]), encode, batch=batch)


def of_images(family: Family, images: CaptionedImages, device: torch.device, batch: int = 64) -> Encoder:
    """The latents of images; of those that cannot be decoded, where they are to be skipped, zeros."""
    shape = family.latent.shape

    def encode(ids: Sequence[int]) -> Encoded:
        latents, found = torch.zeros((len(ids), *shape)), images.pixels(ids, *family.picture_shape[-2:])
        if found:
            made = family.encode_latents(torch.stack(list(found.values())).to(device)).cpu()
            latents[[place for place, i in enumerate(ids) if i in found]] = made
        left_out = {place: images.undecodable[i] for place, i in enumerate(ids) if i in images.undecodable}
        return Encoded({"latents": latents}, [images.captions[i] for i in ids], left_out)

    skipped = images.undecodable if images.skip_broken else None
    return Encoder("latents", len(images), {"latents": ("float", tuple(shape))}, images.content, encode, skipped, batch)


def _fields(cond: Mapping[str, Tensor]) -> dict[str, tuple[Any, tuple[int, ...]]]:
    kinds = {torch.int64: "int64", torch.bool: "bool"}
    return {key: ("float" if value.is_floating_point() else kinds[value.dtype], tuple(value.shape[1:])) for key, value in cond.items()}
