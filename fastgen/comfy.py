"""A LoRA student as other programs read it (`fastgen export --comfy`): a file of the same factors beside the one for diffusers.

UNets' keys are kohya's, by diffusers' own converter; other networks' stay diffusers'. Each header says what the file is in the words of Stability
AI's model metadata specification (ModelSpec 1.0.1, github.com/Stability-AI/ModelSpec).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen.families.base import Family
from fastgen.generator import ADAPTER_FILE

FOLDER = "comfyui"
KOHYA = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
# What trainers and programs call the models that these pipelines run; the specification leaves the list open. Others by their pipeline's name.
_ARCHITECTURES = {
    "StableDiffusionPipeline": "stable-diffusion-v1",
    "StableDiffusionXLPipeline": "stable-diffusion-xl-v1-base",
    "StableDiffusion3Pipeline": "stable-diffusion-3",
    "FluxPipeline": "flux-1",
}
_WIDTH_OF_V2 = 1024  # of the text that SD 2.x reads


def write(
    folder: Path, places: Sequence[str], family: Family, *, method: str, steps: int, guidance: float, license: str | None = None
) -> dict[str, Any]:
    """Below `folder`, a file for each adapter that lies in its `places`; returns what fastgen.json says of them."""
    keys = "kohya" if family.pipeline_classes[0] in KOHYA else "diffusers"
    (folder / FOLDER).mkdir()
    files = []
    for place in places:
        state = load_file(folder / place / ADAPTER_FILE)
        state = kohya(state) if keys == "kohya" else state
        state = {key: value.contiguous() for key, value in state.items()}
        files.append(f"{FOLDER}/{place or 'student'}.safetensors")
        title = f"{method}, {steps}-step{f', {place}' if place else ''}"
        save_file(state, folder / files[-1], {"format": "pt", **modelspec(family, state, title, steps, guidance, license)})
    return {"keys": keys, "files": files}


def kohya(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Factors in kohya's keys with their alphas, which are the ranks."""
    from diffusers.utils import convert_state_dict_to_kohya

    return {key: value.float() if key.endswith(".alpha") else value for key, value in convert_state_dict_to_kohya(dict(state)).items()}


def modelspec(family: Family, state: dict[str, Tensor], title: str, steps: int, guidance: float, license: str | None) -> dict[str, str]:
    """The keys that the specification asks of every file, and those of its others that are known."""
    *_, height, width = family.picture_shape
    found = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture(family)}/lora",
        "implementation": "diffusers",
        "title": title,
        "resolution": f"{width}x{height}",
        "description": f"A few-step student, made by fastgen with {title.partition(',')[0]}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "usage_hint": f"{steps} steps, CFG {guidance:g}, weight 1",
        "tags": "few-step, distillation",
        "hash_sha256": tensor_hash(state),
        **({"license": license} if license else {}),
        **({"prediction_type": {"eps": "epsilon"}.get(family.kind, family.kind)} if family.kind in ("eps", "v") else {}),
    }
    return {f"modelspec.{key}": value for key, value in found.items()}


def architecture(family: Family) -> str:
    """The network that the adapter is for."""
    name = family.pipeline_classes[0]
    config: Any = family.load_backbone(meta=True).config
    if name == "StableDiffusionPipeline" and config.cross_attention_dim == _WIDTH_OF_V2:
        return "stable-diffusion-v2-768-v" if family.kind == "v" else "stable-diffusion-v2-512"
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name.removesuffix("Pipeline")).lower()
    return _ARCHITECTURES.get(name, words)


def tensor_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 of the tensors' bytes in the order in which safetensors lays them: wider types first, then by name."""
    whole = hashlib.sha256()
    for _, value in sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0])):
        whole.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else value.view(1).view(torch.uint8).numpy().tobytes())
    return f"0x{whole.hexdigest()}"
