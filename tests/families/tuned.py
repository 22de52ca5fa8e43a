"""Random LoRA adapters of tiny pipelines, in the dialects of keys that tools write: what `teacher.lora` is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RANK, ALPHA = 3, 2.0  # of dialects that state one
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "v_proj", "out_proj")


def layers(pipeline: Any, part: str) -> dict[str, nn.Linear]:
    """The linear layers of a part that its adapters go to, by name."""
    targets = TEXT_TARGETS if part.startswith("text") else TARGETS
    found = {name: module for name, module in getattr(pipeline, part).named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if f".{name}".endswith(tuple(f".{target}" for target in targets))}


def factors(pipeline: Any, *, seed: int = 0, size: float = 0.2, parts: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """A and B of every such layer of a pipeline's parts, in peft's keys; parts: None for all that take adapters."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for part in parts or [name for name in pipeline._lora_loadable_modules if getattr(pipeline, name, None) is not None]:
        for name, layer in layers(pipeline, part).items():
            state[f"{part}.{name}.lora_A.weight"] = size * torch.randn(RANK, layer.in_features, generator=generator)
            state[f"{part}.{name}.lora_B.weight"] = size * torch.randn(layer.out_features, RANK, generator=generator)
    return state


def peft(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers' own training scripts wrote before peft."""
    kinds = {False: ("lora.down", "lora.up"), True: ("lora_linear_layer.down", "lora_linear_layer.up")}
    found = {}
    for key, value in state.items():
        down, up = kinds[key.startswith("text")]
        found[key.replace("lora_A", down).replace("lora_B", up)] = value
    return found


def kohya(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With an alpha that is not the rank."""
    from diffusers.utils import convert_state_dict_to_kohya

    return {key: torch.tensor(ALPHA) if key.endswith(".alpha") else value for key, value in convert_state_dict_to_kohya(dict(state)).items()}


def xlabs_flux(width: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Of the first block of a Flux network of a width, in XLabs' keys, whose factors are of q, k and v together."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, out in (("qkv_lora1", 3 * width), ("proj_lora1", width), ("qkv_lora2", 3 * width), ("proj_lora2", width)):
        for kind, shape in (("down", (RANK, width)), ("up", (out, RANK))):
            state[f"double_blocks.0.processor.{name}.{kind}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    return state


def native_wan(width: int, blocks: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Of Wan's own names, as LightX2V and others write them, with an alpha that is not the rank."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer in (f"{block}.{kind}_attn.{name}" for block in range(blocks) for kind in ("self", "cross") for name in "qkvo"):
        key = f"diffusion_model.blocks.{layer}"
        for kind in ("down", "up"):
            shape = (RANK, width) if kind == "down" else (width, RANK)
            state[f"{key}.lora_{kind}.weight"] = 0.2 * torch.randn(shape, generator=generator)
        state[f"{key}.alpha"] = torch.tensor(ALPHA)
    return state


def saved(state: dict[str, Tensor], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous().clone() for key, value in state.items()}, file)
    return file


def stock_with(folder: Path, *lora: tuple[Path, float]) -> Any:
    """The stock pipeline with the same adapters, as its documentation loads them."""
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    for i, (file, _) in enumerate(lora):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"own_{i}")
    pipeline.set_adapters([f"own_{i}" for i in range(len(lora))], [weight for _, weight in lora])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def trained_by_peft(pipeline: Any, folder: Path, *, seed: int = 0, targets: tuple[str, ...] = TARGETS, **config: Any) -> tuple[Path, nn.Module]:
    """The file that a trainer on peft writes of a UNet's adapters with a LoraConfig's options, which diffusers keeps in it; and its network."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline.unet.add_adapter(LoraConfig(r=RANK, target_modules=list(targets), **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in pipeline.unet.named_parameters():
            if "lora_" in name:
                size = 0.2 * torch.randn(value.shape, generator=generator)
                value.copy_(value * (1 + size) if "magnitude" in name else size)
    layers: Any = get_peft_model_state_dict(pipeline.unet)
    type(pipeline).save_lora_weights(folder, unet_lora_layers=layers, **_collate_lora_metadata({"unet": pipeline.unet}))
    return folder / "pytorch_lora_weights.safetensors", pipeline.unet
