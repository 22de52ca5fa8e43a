"""Tiny stock StableDiffusion3Pipelines, offline and from a seed: everything but a trained transformer.

Native classes only. Two CLIP encoders and a T5 tell captions apart, with random weights (digits) or after reading them (scenes), frozen; T5
must be there because plain `from_pretrained` refuses a folder without it. Tokenizers know the captions' words as single tokens. The VAE,
trained here, turns 8x8x3 pixels into 8x8x2 latents of unit scale (digits, factor 1), or 16x16x3 into 8x8x8 (scenes, factor 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.assets import encoders
from fastgen.data import digits, scenes

KL_WEIGHT = 1e-3
CHUNK = 2048  # images that are encoded at once

# Byte-pair merges of the digits' captions. Written down, because the library's trainer breaks ties differently from run to run.
DIGIT_MERGES = """
e+n</w> a+n e+v i+g i+n t+h ev+en</w> a+w a+n</w> b+e d+r d+w d+d</w> d+ig e+r e+e</w> e+ig f+i f+o h+t</w> h+an i+t i+x</w> i+t</w>
m+be n+u n+e</w> n+in o+f</w> o+dd</w> o+ne</w> r+ee</w> r+it s+even</w> s+ix</w> t+w t+en</w> u+r</w> v+e</w> z+er an+y</w> in+g</w>
th+e</w> th+ree</w> aw+ing</w> dr+awing</w> dw+rit dig+it</w> eig+ht</w> fi+ve</w> fo+ur</w> han+dwrit mbe+r</w> nu+mber</w> nin+e</w>
tw+o</w> zer+o</w> handwrit+ten</w>
"""


@dataclass(frozen=True)
class Skeleton:
    """What a pipeline is made of. tokens: of each text encoder; the longest caption's words, with a begin and an end."""

    captions: Callable[[], Iterable[str]]
    images: Callable[[], Tensor]  # (N, 3, H, W) in [-1, 1]
    merges: Callable[[list[str]], list[tuple[str, str]]]
    tokens: int
    size: int
    channels: tuple[int, ...]  # of the VAE, at each size
    latent_channels: int
    vae_steps: int
    vae_batch: int
    heads: int  # of 16 channels each, in the transformer
    reads: bool  # whether the text encoders read the captions before they are frozen

    def words(self) -> list[str]:
        """Every word of every caption."""
        return sorted({word for caption in self.captions() for word in caption.split()})


def spelt(words: list[str]) -> list[tuple[str, str]]:
    """Merges that spell each word from its beginning, longer words first: what begins a word is whole before a part of it could be taken for
    the beginning of a shorter one."""
    merges: dict[tuple[str, str], None] = {}
    for word in sorted(words, key=lambda word: (-len(word), word)):
        letters = [*word[:-1], word[-1] + "</w>"]
        merges |= dict.fromkeys(("".join(letters[:end]), letters[end]) for end in range(1, len(letters)))
    return list(merges)


DIGITS = Skeleton(
    captions=digits.prompts,
    images=lambda: digits.load_images()[0],
    merges=lambda words: [(pair.split("+")[0], pair.split("+")[1]) for pair in DIGIT_MERGES.split()],
    tokens=8,
    size=8,
    channels=(16,),
    latent_channels=2,
    vae_steps=900,
    vae_batch=128,
    heads=4,
    reads=False,
)
SCENES = Skeleton(
    captions=scenes.prompts,
    images=lambda: scenes.training().images,
    merges=spelt,
    tokens=10,
    size=16,
    channels=(16, 32),
    latent_channels=8,
    vae_steps=900,
    vae_batch=48,
    heads=6,
    reads=True,
)


def clip_tokenizer(of: Skeleton) -> Any:
    """A CLIPTokenizer whose merges make each caption word one token; other text falls back to bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges: Any = of.merges(of.words())
    pieces = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)])
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=of.tokens)


def t5_tokenizer(of: Skeleton) -> Any:
    """A T5Tokenizer with one piece a caption word; other words are <unk>."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *(("▁" + word, -1.0) for word in of.words()), ("▁", -5.0)], extra_ids=0, model_max_length=of.tokens)


def clip_encoder(tokenizer: Any) -> Any:
    """Random CLIPTextModelWithProjection: 2 layers, hidden and projection 32."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=32, **special,
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


def text_encoders(of: Skeleton, clip: Any, t5: Any) -> dict[str, Any]:
    """The three, with the ambient generator, by their names in the pipeline."""
    parts: dict[str, Any] = {"text_encoder": clip_encoder(clip), "text_encoder_2": clip_encoder(clip), "text_encoder_3": t5_encoder(t5)}
    if of.reads:
        for name, encoder in parts.items():
            tokenizer, tokens = (t5, encoders.t5_tokens) if name == "text_encoder_3" else (clip, encoders.clip_tokens)
            print(f"{name}: loss {encoders.teach(encoder, tokenizer, tokens):.3g} on captions", flush=True)
    return parts


def train_vae(of: Skeleton) -> Any:
    """AutoencoderKL trained with the ambient generator, its shift and scale set to the latents' mean and deviation. Prints how far it is, and at
    the end its reconstruction MSE on [-1, 1] pixels."""
    from diffusers import AutoencoderKL

    images, levels = of.images(), len(of.channels)
    sizes: dict[str, Any] = {
        "block_out_channels": of.channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    vae: Any = AutoencoderKL(
        sample_size=of.size, **sizes, layers_per_block=1, latent_channels=of.latent_channels, norm_num_groups=4,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=of.vae_steps)
    for step in range(1, of.vae_steps + 1):
        batch = images[torch.randint(len(images), (of.vae_batch,))]
        posterior = vae.encode(batch).latent_dist
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = (vae.decode(posterior.sample()).sample - batch).square().mean() + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % (of.vae_steps // 20) == 0:
            print(f"VAE: step {step} of {of.vae_steps}, loss {loss.item():.4f}", flush=True)
    return _normalised(vae.eval(), images)


@torch.no_grad()
def _normalised(vae: Any, images: Tensor) -> Any:
    parts = [vae.encode(part).latent_dist.mode() for part in images.split(CHUNK)]
    latents = torch.cat(parts) if len(parts) > 1 else parts[0]  # a copy lies otherwise in memory, and its mean adds in another order
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(CHUNK)])
    print(f"VAE: reconstruction MSE {(decoded - images).square().mean().item():.2g}", flush=True)
    return vae


def transformer(of: Skeleton) -> Any:
    """Untrained SD3Transformer2DModel on 8x8 latents: 4 layers, patch 2; 0.6 M parameters with 4 heads, 1.3 M with 6."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=of.latent_channels, out_channels=of.latent_channels, num_layers=4, attention_head_dim=16,
        num_attention_heads=of.heads, caption_projection_dim=16 * of.heads, joint_attention_dim=64, pooled_projection_dim=64,
        pos_embed_max_size=4,
    ).eval()  # fmt: skip


def build_skeleton(of: Skeleton, output: Path, seed: int, vae: Any = None) -> None:
    """Write the pipeline folder, around a VAE that is trained last where there is none yet."""
    from diffusers import FlowMapEulerDiscreteScheduler, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(of), t5_tokenizer(of)
    parts = text_encoders(of, clip, t5)
    parts["transformer"] = transformer(of)
    parts["vae"] = vae or train_vae(of)
    parts["scheduler"] = FlowMapEulerDiscreteScheduler(shift=1.0)
    pipeline = StableDiffusion3Pipeline(tokenizer=clip, tokenizer_2=clip, tokenizer_3=t5, **parts)
    pipeline.save_pretrained(output, safe_serialization=True)
