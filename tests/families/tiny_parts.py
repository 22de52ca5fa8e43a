"""What the tiny pipelines share: tokenizers of one token a character, text encoders, a VAE, and random numbers in place of zeros.

Tokenizers and encoders that tiny_sd3 has too are in `pipelines`. All weights are random; sizes differ wherever a family could confuse them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# The words of Qwen-Image's template before the prompt, each of them one token to its real tokenizer: 34 in all, which the pipeline drops.
TEMPLATE_WORDS = [
    *("system", "Describe", "user", "Ġthe", "Ġimage", "Ġby", "Ġdetailing", "Ġcolor", "Ġshape", "Ġsize", "Ġtexture", "Ġquantity", "Ġtext"),
    *("Ġspatial", "Ġrelationships", "Ġof", "Ġobjects", "Ġand", "Ġbackground"),
]
CHAT = (
    "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)


@contextmanager
def from_seed(seed: int) -> Iterator[None]:
    """Torch's global random numbers start at `seed` within, and go on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def stirred(pipeline: Any) -> Any:
    """The pipeline in eval mode, with noise on every parameter that starts as a constant: initial zeros (output layers, modulations,
    biases) hide the layers behind them, and ones (norms) hide that they are used."""
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.eval()
            _stir(module)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def _stir(module: nn.Module) -> None:
    for parameter in module.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def qwen_tokenizer() -> Any:
    """One token a character, but for `TEMPLATE_WORDS` and what begins like them."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    merges: Any = list(dict.fromkeys((word[:i], word[i]) for word in TEMPLATE_WORDS for i in range(1, len(word))))
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges), "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=1100, pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


# How Mistral's text is laid out, and the marks of it.
MISTRAL_CHAT = (
    "{{- bos_token }}{%- for m in messages %}{%- set text = m['content'] | map(attribute='text') | join %}"
    "{%- if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]{%- else %}[INST]{{ text }}[/INST]{%- endif %}{%- endfor %}"
)
MISTRAL_MARKS = ["[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]


def pixtral_processor() -> Any:
    """Of texts one token a character, but for the words of FLUX.2's instruction and what begins like them; of pictures in patches of 4."""
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PixtralImageProcessor, PixtralProcessor, PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merges = list(dict.fromkeys((word[:i], word[i]) for word, _ in split.pre_tokenize_str(SYSTEM_MESSAGE) for i in range(1, len(word))))
    special = ["<pad>", "<s>", "</s>", *MISTRAL_MARKS]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    made = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", additional_special_tokens=MISTRAL_MARKS, model_max_length=600
    )
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(), tokenizer=tokenizer, chat_template=MISTRAL_CHAT, patch_size=4, spatial_merge_size=1
    )


def mistral3_encoder(tokenizer: Any, width: int, layers: int) -> Any:
    """With a vision tower that no prompt looks through."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {
        "model_type": "mistral", "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 40, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 600, **special,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8,
        "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    picture = tokenizer.convert_tokens_to_ids("[IMG]")
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, image_token_index=picture, spatial_merge_size=1))


def gemma_tokenizer(words: Sequence[str] = ()) -> Any:
    """One token a character, but for `words` and what begins like them (a space before one is ▁), with which `<bos>` comes first."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    merges: Any = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(chr(c) for c in range(33, 127)), *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *(left + right for left, right in merges)])}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, model_max_length=2000)
    if words:  # as the real one: no text is empty
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    return tokenizer


def clip_text_model(tokenizer: Any, width: int) -> Any:
    """CLIP without a projection; `pipelines.clip_encoder` has one."""
    from transformers import CLIPTextConfig, CLIPTextModel

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=width, hidden_act="gelu", **special,
    )  # fmt: skip
    return CLIPTextModel(config)


def umt5_encoder(tokenizer: Any, width: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=48, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def gemma_encoder(tokenizer: Any, width: int, layers: int = 1) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, query_pre_attn_scalar=12, max_position_embeddings=2048, **special,
    )  # fmt: skip
    return Gemma2Model(config)


def qwen3_encoder(tokenizer: Any, width: int, layers: int = 2, *, head: bool = False) -> Any:
    """head: with the one that makes words of it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=1200, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return Qwen3ForCausalLM(config) if head else Qwen3Model(config)


def qwen_vl_encoder(tokenizer: Any, width: int) -> Any:
    """width: a multiple of 8, for two heads with rotary sections of their own."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 1200, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"mrope_section": [width // 8, width // 16, width // 16], "rope_type": "default", "rope_theta": 1e5},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    special: dict[str, Any] = {"vision_end_token_id": 1, "vision_start_token_id": 2, "vision_token_id": 3, "image_token_id": 4, "video_token_id": 5}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special))


def kl_vae(channels: int, *, widths: tuple[int, ...] = (8, 12), quant: bool = True, **factors: float) -> Any:
    """AutoencoderKL of factor 2^(len(widths) - 1) with latents of `channels`. factors: scaling_factor, and shift_factor where it has one."""
    from diffusers import AutoencoderKL

    blocks: dict[str, Any] = {
        **factors,
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }
    size = 8 * 2 ** (len(widths) - 1)
    return AutoencoderKL(
        sample_size=size, layers_per_block=1, latent_channels=channels, norm_num_groups=4, **blocks,
        use_quant_conv=quant, use_post_quant_conv=quant,
    )  # fmt: skip
