"""A tiny random DDPMPipeline: 16x16 pixels, a UNet of two levels with attention in one, 700 training steps, a scheduler that clips."""

from __future__ import annotations

from typing import Any

import torch
from tiny_parts import from_seed, stirred


def tiny_ddpm(seed: int = 0, *, prediction_type: Any = "sample", size: Any = 16, beta_end: float = 0.03) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone. Of a random eps network and such betas all pictures would be black and white."""
    from diffusers import DDPMPipeline, DDPMScheduler

    with from_seed(seed):
        unet = small_unet(size)
        scheduler: Any = DDPMScheduler(num_train_timesteps=700, beta_start=0.0001, beta_end=beta_end, prediction_type=prediction_type)
        return stirred(DDPMPipeline(unet=unet, scheduler=scheduler))


def small_unet(size: Any, **more: Any) -> Any:
    """Its outputs, which are pixels or nearly so, are as small as these."""
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=size, block_out_channels=(8, 12), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=4, attention_head_dim=4, **more,
    )  # fmt: skip
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.5)
    return unet
