"""Tiny random pipelines that take no text: 8x8 pixels without conditions, on DDPM and DDIM; of five classes; grey ones."""

from __future__ import annotations

from typing import Any

from fastgen.rng import seeded

CLASSES = 5


def unet(channels: int = 3, classes: int | None = None) -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
        num_class_embeds=classes,
    )  # fmt: skip


def tiny_ddpm() -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler

    with seeded("tiny"):
        return DDPMPipeline(unet=unet(), scheduler=DDPMScheduler(num_train_timesteps=50))


def tiny_grey_ddim() -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler

    with seeded("tiny"):
        return DDIMPipeline(unet=unet(1), scheduler=DDIMScheduler(num_train_timesteps=50))


def tiny_consistency() -> Any:
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    with seeded("tiny"):
        return ConsistencyModelPipeline(unet=unet(classes=CLASSES), scheduler=CMStochasticIterativeScheduler())
