"""Folders with the configurations of real pipelines and no weights, as a dry run takes them. Tokenizers are tiny ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipelines import tiny_sd3
from tiny_flux import tiny_flux
from tiny_flux2 import tiny_flux2_dev
from tiny_sdxl import tiny_sdxl

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64}
VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
# black-forest-labs/FLUX.1-dev and stabilityai/stable-diffusion-xl-base-1.0, as their config.json files have them.
FLUX_DEV: dict[str, dict[str, Any]] = {
    "transformer": {
        "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128,
        "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
    },
    "vae": {**VAE, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    "text_encoder": CLIP_L,
    "text_encoder_2": T5_XXL,
    "scheduler": {"shift": 3.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096},
}  # fmt: skip
# black-forest-labs/FLUX.2-dev by the defaults of its classes, which diffusers and transformers have from it: 32 billion parameters, as published.
FLUX2_DEV: dict[str, dict[str, Any]] = {
    "transformer": {
        "in_channels": 128, "num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "attention_head_dim": 128,
        "joint_attention_dim": 15360, "timestep_guidance_channels": 256, "mlp_ratio": 3.0, "axes_dims_rope": [32, 32, 32, 32],
        "guidance_embeds": True,
    },
    "vae": {**VAE, "latent_channels": 32, "sample_size": 1024, "use_quant_conv": True, "use_post_quant_conv": True, "batch_norm_eps": 1e-4},
    "text_encoder": {
        "text_config": {
            "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "max_position_embeddings": 131072,
        },
    },
}  # fmt: skip
# stabilityai/stable-diffusion-3.5-medium: MMDiT-X, of whose 24 blocks the first 13 attend to the picture alone once more.
SD35_MEDIUM: dict[str, dict[str, Any]] = {
    "transformer": {
        "sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64,
        "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
        "qk_norm": "rms_norm", "dual_attention_layers": [*range(13)],
    },
    "vae": {**VAE, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_G,
    "text_encoder_3": T5_XXL,
}  # fmt: skip
SDXL: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 2816,
        "addition_time_embed_dim": 256, "norm_num_groups": 32,
    },
    "vae": {**VAE, "latent_channels": 4, "scaling_factor": 0.13025, "sample_size": 1024},
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_G,
}  # fmt: skip


def flux_dev(folder: Path) -> Path:
    return _written(tiny_flux(), folder, FLUX_DEV)


def flux2_dev(folder: Path) -> Path:
    return _written(tiny_flux2_dev(), folder, FLUX2_DEV)


def sd35_medium(folder: Path) -> Path:
    return _written(tiny_sd3(), folder, SD35_MEDIUM)


def sdxl(folder: Path) -> Path:
    return _written(tiny_sdxl(), folder, SDXL)


def _written(tiny: Any, folder: Path, configs: dict[str, dict[str, Any]]) -> Path:
    whole = folder / "tiny"
    tiny.save_pretrained(whole)
    shutil.copytree(whole, folder / "real", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, config in configs.items():
        path = folder / "real" / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8")
    return folder / "real"
