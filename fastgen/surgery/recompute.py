"""Activations computed again in the backward pass instead of kept (Chen et al. 2016, arXiv:1604.06174), on networks whose adapters and
active experts change."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from fastgen.errors import UserError
from fastgen.surgery import lora
from fastgen.surgery.moe import blocks as moe_blocks
from fastgen.surgery.moe import layer as moe_layer


def recompute_blocks(backbone: nn.Module) -> None:
    """Have each block of a diffusers network keep its inputs alone, and run again in the backward pass with the adapters, experts and choice of
    blocks of its forward.

    UserError for a network whose blocks cannot. Copies of the network do so too.
    """
    network: Any = backbone
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise UserError(f"recipe key train.checkpointing: {type(backbone).__name__} cannot compute its blocks again; remove it")
    network.enable_gradient_checkpointing(_computed_again)


def _computed_again(block: Any, *args: Any) -> Any:
    """block: a module, or one's own `__call__`, which PRX hands over."""
    module: nn.Module = getattr(block, "__self__", block)
    as_now, experts, groups = lora.remembered(module), moe_layer.remembered(module), moe_blocks.remembered(module)

    def run(*args: Any) -> Any:
        with as_now(), experts(), groups():
            return block(*args)

    return checkpoint(run, *args, use_reentrant=False)
