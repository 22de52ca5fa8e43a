"""Settings of a network under which forward AD would go wrong, refused before it runs."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from fastgen.errors import UserError


def refuse_unsupported(module: nn.Module) -> None:
    """UserError, naming the setting and how to undo it, where attention would leave PyTorch or dropout would draw.

    Looks at diffusers' active attention backend (`DIFFUSERS_ATTN_BACKEND`), at every processor's own, at context parallelism, at
    xformers processors, and at dropout layers in training mode, whose masks would differ between the tangent and the gradient pass.
    """
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")  # not loaded: nothing here uses it
    if dispatch is not None:
        active = dispatch._AttentionBackendRegistry.get_active_backend()[0]
        _refuse_backend(active, "active", "unset DIFFUSERS_ATTN_BACKEND and leave attention_backend()")
    for name, layer in module.named_modules():
        processor = getattr(layer, "processor", None)
        kind = type(processor).__name__
        _refuse_backend(getattr(processor, "_attention_backend", None), f"set on {name!r}", "call module.set_attention_backend('native')")
        if getattr(processor, "_parallel_config", None) is not None:
            raise UserError(f"no exact tangent: {name!r} runs context parallel, which bypasses PyTorch's attention; do not enable_parallelism()")
        if "xformers" in kind.lower():
            raise UserError(f"no exact tangent: {name!r} runs {kind}; call module.disable_xformers_memory_efficient_attention()")
        p = layer.p if isinstance(layer, nn.modules.dropout._DropoutNd) else getattr(layer, "dropout_prob", 0)  # of labels
        if layer.training and p > 0:
            raise UserError(f"no exact tangent: {name!r} draws dropout (p = {p}); call module.eval()")
        if isinstance(layer, nn.parallel.DistributedDataParallel) and (layer.find_unused_parameters or layer.static_graph):
            raise UserError("no exact tangent: DistributedDataParallel has none with find_unused_parameters or static_graph")


def _refuse_backend(backend: Any, where: str, undo: str) -> None:
    name = "native" if backend is None else str(getattr(backend, "value", backend))
    if name not in _PYTORCH_BACKENDS:
        raise UserError(f"no exact tangent: diffusers' attention backend {name!r}, {where}, bypasses PyTorch's attention; {undo}")


# All of these end in F.scaled_dot_product_attention.
_PYTORCH_BACKENDS = {"native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math"}
