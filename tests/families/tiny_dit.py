"""A tiny random DiTPipeline: 16x16 pixels, 5 latent channels, 10 outputs of which half is a variance, 700 training steps, a few class names.

The pipeline's null class is number 1000, whatever names there are, so the table has 1001 rows.
"""

from __future__ import annotations

from typing import Any

from tiny_parts import from_seed, kl_vae, stirred

CALL: dict[str, Any] = {}
NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 7: "cock", 207: "golden retriever", 999: "toilet tissue, toilet paper"}


def tiny_dit(seed: int = 0) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    with from_seed(seed):
        transformer = DiTTransformer2DModel(
            sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=5, out_channels=10,
            attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        )  # fmt: skip
        scheduler: Any = DDIMScheduler(num_train_timesteps=700, beta_start=0.0003, beta_end=0.03, beta_schedule="linear", clip_sample=False)
        return stirred(DiTPipeline(transformer=transformer, vae=kl_vae(5, scaling_factor=0.31), scheduler=scheduler, id2label=NAMES))
