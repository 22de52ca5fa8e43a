"""A frozen network that lies on the CPU, of which one block at a time is on the device: diffusers' group offloading.

It moves a block away as soon as the block has run, so no gradient can come back through it. The network must not be moved afterwards.
"""

from __future__ import annotations

import torch
from torch import nn

_BLOCKS = "block_level"


def offload(network: nn.Module, device: torch.device) -> None:
    """Have a network on the CPU bring each of its blocks to `device` for the block's own call; on CUDA the next one comes meanwhile."""
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        network, onload_device=device, offload_device="cpu", offload_type=_BLOCKS, num_blocks_per_group=1, use_stream=device.type == "cuda"
    )
    network._is_offloaded = True  # type: ignore[assignment]


def is_offloaded(network: nn.Module) -> bool:
    return getattr(network, "_is_offloaded", False)
