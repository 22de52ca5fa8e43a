"""A tiny random QwenImagePipeline: 32x32 pixels, a video VAE of factor 4 with a mean and deviation per channel, a grid that is shifted and
stretched to a terminal, and the template that the pipeline drops, 34 tokens as in the real tokenizer."""

from __future__ import annotations

from typing import Any

from tiny_parts import from_seed, qwen_tokenizer, qwen_vl_encoder, stirred

CALL = {"height": 32, "width": 32, "max_sequence_length": 40}


def tiny_qwen(seed: int = 0) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    with from_seed(seed):
        tokenizer = qwen_tokenizer()
        transformer = QwenImageTransformer2DModel(
            patch_size=2, in_channels=20, out_channels=5, num_layers=2, attention_head_dim=16, num_attention_heads=3, joint_attention_dim=32,
            guidance_embeds=False, axes_dims_rope=(8, 4, 4),
        )  # fmt: skip
        vae = AutoencoderKLQwenImage(
            base_dim=8, z_dim=5, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[-0.3, 0.2, 0.5, -0.1, 0.4], latents_std=[1.7, 0.8, 1.3, 2.1, 0.6],
        )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=1.2, base_shift=0.6, max_shift=1.1, shift_terminal=0.03, base_image_seq_len=12,
            max_image_seq_len=100,
        )  # fmt: skip
        return stirred(
            QwenImagePipeline(transformer=transformer, vae=vae, scheduler=scheduler, tokenizer=tokenizer, text_encoder=qwen_vl_encoder(tokenizer, 32))
        )
