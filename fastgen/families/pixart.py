"""PixArt-Sigma (Chen et al. 2024): a transformer on a discrete schedule that predicts a variance too, T5's text with its mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.errors import UserError
from fastgen.families.discrete import Discrete


class PixArtSigma(Discrete):
    """PixArtSigmaPipeline. What its `clean_caption` does depends on which packages are installed, so prompts are left as they are."""

    samplers = ("euler", "stochastic")
    pipeline_classes = ("PixArtSigmaPipeline",)
    network = "PixArtTransformer2DModel"
    own: ClassVar = {"num_inference_steps": 20, "guidance_scale": 4.5}
    side_unit = 8
    text_length = 300
    text_widths: ClassVar = {"caption_channels": ("text_encoder.d_model",)}
    fixed_call: ClassVar = {"use_resolution_binning": False, "clean_caption": False}  # binning draws another size and resizes it
    loads_lora = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    time_projection = "adaln_single.emb.timestep_embedder.linear_2"

    def check_network(self) -> None:
        given, large = self.config.option("use_additional_conditions"), self.config.option("sample_size") == 128
        if large if given is None else given:
            what = "its transformer takes resolution and aspect ratio, which PixArtSigmaPipeline does not give (use_additional_conditions)"
            raise UserError(f"recipe key teacher.pretrained: {what}")

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        told = {"timestep": self.path.step(t), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        return backbone(x, **told, **cond, return_dict=False)[0][:, : x.shape[1]]  # without the variance

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, mask, _, _ = pipeline.encode_prompt(prompts, False, max_sequence_length=self.max_sequence_length)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        tokens = self.max_sequence_length or 0
        return {"encoder_hidden_states": (tokens, self.config.option("caption_channels")), "encoder_attention_mask": (tokens,)}
