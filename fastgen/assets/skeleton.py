"""A tiny stock StableDiffusion3Pipeline, offline and from a seed: everything but a trained transformer.

Native classes only. Two CLIP encoders and a T5 with random, frozen weights tell captions apart; T5 must be there because plain
`from_pretrained` refuses a folder without it. Tokenizers know the captions' words as single tokens. The VAE (factor 1, trained
here) turns 8x8x3 pixels into 8x8x2 latents of unit scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.data import digits

TOKENS = 8  # of each text encoder; longest caption: six words and the end token
VAE_STEPS, VAE_BATCH, KL_WEIGHT = 900, 128, 1e-3

# Byte-pair merges of the captions' words. Written down, because the library's trainer breaks ties differently from run to run.
MERGES = """
e+n</w> a+n e+v i+g i+n t+h ev+en</w> a+w a+n</w> b+e d+r d+w d+d</w> d+ig e+r e+e</w> e+ig f+i f+o h+t</w> h+an i+t i+x</w> i+t</w>
m+be n+u n+e</w> n+in o+f</w> o+dd</w> o+ne</w> r+ee</w> r+it s+even</w> s+ix</w> t+w t+en</w> u+r</w> v+e</w> z+er an+y</w> in+g</w>
th+e</w> th+ree</w> aw+ing</w> dr+awing</w> dw+rit dig+it</w> eig+ht</w> fi+ve</w> fo+ur</w> han+dwrit mbe+r</w> nu+mber</w> nin+e</w>
tw+o</w> zer+o</w> handwrit+ten</w>
"""


def words() -> list[str]:
    """Every word of every caption."""
    return sorted({word for caption in digits.prompts() for word in caption.split()})


def clip_tokenizer() -> Any:
    """A CLIPTokenizer whose merges make each caption word one token; other text falls back to bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges: Any = [tuple(pair.split("+")) for pair in MERGES.split()]
    pieces = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)])
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def t5_tokenizer() -> Any:
    """A T5Tokenizer with one piece a caption word; other words are <unk>."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *(("▁" + word, -1.0) for word in words()), ("▁", -5.0)], extra_ids=0, model_max_length=TOKENS)


def clip_encoder(tokenizer: Any) -> Any:
    """Random CLIPTextModelWithProjection: 2 layers, hidden and projection 32."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TOKENS, projection_dim=32, **special,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config).eval()


def t5_encoder(tokenizer: Any) -> Any:
    """Random T5EncoderModel: 2 layers, width 64 = the transformer's joint attention width."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def train_vae() -> tuple[Any, float]:
    """AutoencoderKL trained on the digits with the ambient generator, its shift and scale set to the latents' mean and deviation;
    and its reconstruction MSE on [-1, 1] pixels."""
    from diffusers import AutoencoderKL

    images, _ = digits.load_images()
    vae: Any = AutoencoderKL(
        sample_size=8, block_out_channels=(16,), layers_per_block=1, latent_channels=2, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=VAE_STEPS)
    for _ in range(VAE_STEPS):
        batch = images[torch.randint(len(images), (VAE_BATCH,))]
        posterior = vae.encode(batch).latent_dist
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = (vae.decode(posterior.sample()).sample - batch).square().mean() + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return _normalised(vae.eval(), images)


@torch.no_grad()
def _normalised(vae: Any, images: Tensor) -> tuple[Any, float]:
    latents = vae.encode(images).latent_dist.mode()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return vae, (vae.decode(latents).sample - images).square().mean().item()


def transformer() -> Any:
    """Untrained SD3Transformer2DModel: 4 layers of 4 heads x 16, patch 2, 0.6 M parameters."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=2, out_channels=2, num_layers=4, attention_head_dim=16, num_attention_heads=4,
        caption_projection_dim=64, joint_attention_dim=64, pooled_projection_dim=64, pos_embed_max_size=4,
    ).eval()  # fmt: skip


def build_skeleton(output: Path, seed: int) -> float:
    """Write the pipeline folder; returns the VAE's reconstruction MSE."""
    from diffusers import FlowMapEulerDiscreteScheduler, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    parts: dict[str, Any] = {"text_encoder": clip_encoder(clip), "text_encoder_2": clip_encoder(clip), "text_encoder_3": t5_encoder(t5)}
    parts["transformer"] = transformer()
    parts["vae"], error = train_vae()
    parts["scheduler"] = FlowMapEulerDiscreteScheduler(shift=1.0)
    pipeline = StableDiffusion3Pipeline(tokenizer=clip, tokenizer_2=clip, tokenizer_3=t5, **parts)
    pipeline.save_pretrained(output, safe_serialization=True)
    return error
