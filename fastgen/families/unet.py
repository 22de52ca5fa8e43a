"""What families around diffusers' UNet2DConditionModel share: its blocks, and where adapters and scalar inputs go."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.families.discrete import Discrete


class UNet(Discrete):
    """Its blocks are those on the way down, the one in the middle and those on the way up: few and large, of several resolutions."""

    samplers = ("euler", "stochastic")
    component = "unet"
    network = "UNet2DConditionModel"
    side_unit = 8
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    time_projection = "time_embedding.linear_2"

    def check_network(self) -> None:
        if self.config.option("time_cond_proj_dim") is not None:
            what = "its unet takes a guidance scale (time_cond_proj_dim), as some few-step students do"
            raise UserError(f"recipe key teacher.pretrained: {what}, which fastgen does not give it")

    def blocks(self, backbone: nn.Module) -> list[nn.Module]:
        network: Any = backbone
        middle = [] if network.mid_block is None else [network.mid_block]  # as in some that were made small
        return [*network.down_blocks, *middle, *network.up_blocks]

    def block_feature(self, output: Any) -> Tensor:
        """Of feature maps (B, C, H, W), which a block on the way down gives with those for the way up."""
        return (output[0] if isinstance(output, tuple) else output).flatten(2).transpose(1, 2)

    def block_streams(self, output: Any) -> tuple[Tensor, ...]:
        return (self.block_feature(output),)

    def feature_widths(self, backbone: nn.Module) -> list[int]:
        config: Any = backbone.config
        down = list(config.block_out_channels)
        return [*down, *([] if config.mid_block_type is None else down[-1:]), *reversed(down)]
