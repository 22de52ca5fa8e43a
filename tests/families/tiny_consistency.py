"""A tiny random ConsistencyModelPipeline with an EDMEulerScheduler: 16x16 pixels, five classes or none, sigma_data .6."""

from __future__ import annotations

from typing import Any

from tiny_ddpm import small_unet
from tiny_parts import from_seed, stirred


def tiny_consistency(seed: int = 0, *, classes: int | None = 5, **scheduler: Any) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone. scheduler: options of it."""
    from diffusers import ConsistencyModelPipeline, EDMEulerScheduler

    with from_seed(seed):
        unet = small_unet(16, num_class_embeds=classes)
        edm: Any = EDMEulerScheduler(**{"sigma_data": 0.6, "rho": 6.0, **scheduler})
        return stirred(ConsistencyModelPipeline(unet=unet, scheduler=edm))
