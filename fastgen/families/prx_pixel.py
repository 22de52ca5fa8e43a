"""PRXPixel (Photoroom 2026): flow matching on RGB without a VAE, time as sigma, the clean picture predicted, noise twice as large as usual.

Latents here are pixels divided by the pipeline's noise_scale, so that their noise has unit variance; the network sees them multiplied. Where
the time is below .05 the pipeline takes (x - x0)/.05 for the velocity, so what counts there as x0 is as far from x as that leads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.families.codec import Pixels
from fastgen.families.pipelined import Pipelined
from fastgen.legibility import Reader
from fastgen.path import expand_time


class PRXPixel(Pipelined):
    """PRXPixelPipeline. Its call draws several prompts at once only without guidance: its time then has one row, and with guidance two."""

    pipeline_classes = ("PRXPixelPipeline",)
    network = "PRXTransformer2DModel"
    codec_class, normalised_by = Pixels, ("noise_scale",)
    kind = "x0"
    own: ClassVar = {"num_inference_steps": 28, "guidance_scale": 4.0}
    own_size = (1024, 1024)
    text_widths: ClassVar = {"context_in_dim": ("text_encoder.hidden_size",)}
    fixed_call: ClassVar = {"use_resolution_binning": False}  # which draws another size and resizes it
    guides_singly = True
    grid_argument = "timesteps"
    block_lists = ("blocks",)
    loads_lora = False
    lora_targets = ("img_qkv_proj", "txt_kv_proj", "to_out.0")
    time_projection = "time_in.out_layer"

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        scale, text = self.source.setting("noise_scale"), cond["encoder_hidden_states"]
        mask = cond["attention_mask"].bool()
        out = backbone(scale * x, timestep=t, encoder_hidden_states=text, attention_mask=mask, return_dict=False)[0]
        share = expand_time((t / 0.05).clamp(max=1), x).to(x)
        return x + share * (out.to(x) / scale - x)

    def feature_widths(self, backbone: nn.Module) -> list[int]:
        return [self.config.option("hidden_size")] * len(self.blocks(backbone))

    def readers(self) -> list[Reader]:
        return [reader._replace(length=self.source.setting("prompt_max_tokens")) for reader in super().readers()]

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "attention_mask": mask.long()}

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        tokens = self.source.setting("prompt_max_tokens")
        return {"encoder_hidden_states": (tokens, self.config.option("context_in_dim")), "attention_mask": (tokens,)}

    def told_times(self, grid: Sequence[float]) -> list[float]:
        return [1000 * time for time in grid]
