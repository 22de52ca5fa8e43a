"""A tiny random PRXPixelPipeline: 16x16 pixels in patches of 4, a bottleneck, sizes embedded, noise of 1.5, 30 tokens of Qwen3's text, shift 1.8."""

from __future__ import annotations

from typing import Any

import torch
from tiny_parts import from_seed, qwen3_encoder, qwen_tokenizer, stirred

CALL = {"height": 16, "width": 16, "use_resolution_binning": False}


def tiny_prx(seed: int = 0) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone."""
    from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline, PRXTransformer2DModel

    with from_seed(seed):
        tokenizer = qwen_tokenizer()
        transformer: Any = PRXTransformer2DModel(
            in_channels=3, patch_size=4, context_in_dim=24, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8], time_factor=900.0,
            bottleneck_size=12, resolution_embeds=True,
        )  # fmt: skip
        pipeline = stirred(
            PRXPixelPipeline(
                transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.8), text_encoder=qwen3_encoder(tokenizer, 24),
                tokenizer=tokenizer, default_sample_size=16, prompt_max_tokens=30, noise_scale=1.5,
            )
        )  # fmt: skip
        with torch.no_grad():  # outputs are pixels: of which few are to be clipped
            transformer.final_layer.linear.weight.mul_(0.6)
        return pipeline
