"""The exact tangent: forward AD with fused attention, and with an eye on the tangents that operators drop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fastgen.jvp.attention import AttentionCalls, attend
from fastgen.jvp.differences import Network, Tangents
from fastgen.jvp.lost import LostTangents


def checked(primals: Sequence[Tensor], tangents: Tangents) -> tuple[list[Tensor], list[Tensor | None]]:
    """Both as lists, tangents without graphs; ValueError where they do not fit, RuntimeError in inference mode."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("tangent() runs in no_grad or grad mode: torch.inference_mode drops every tangent")
    if len(primals) != len(tangents):
        raise ValueError(f"tangents: {len(tangents)} for {len(primals)} primals; None stands for a constant input")
    for i, (x, dx) in enumerate(zip(primals, tangents, strict=True)):
        if x.ndim <= 1 and x.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"primals[{i}]: a time in {x.dtype}; times stay fp32 or wider (bf16 moves 1000 t by up to 2)")
        if dx is not None and (x.shape, x.dtype, x.device) != (dx.shape, dx.dtype, dx.device):
            raise ValueError(f"tangents[{i}]: {tuple(dx.shape)} {dx.dtype} {dx.device}, but primals[{i}] is {tuple(x.shape)} {x.dtype} {x.device}")
    return list(primals), [None if dx is None else dx.detach() for dx in tangents]


def exact(fn: Network, primals: Sequence[Tensor], tangents: Tangents, calls: AttentionCalls, *, watch: bool = False) -> tuple[Tensor, Tensor]:
    """(out, d_out) of checked inputs. watch: follow lost tangents through modules that have been seen to lose none, too."""
    lost = LostTangents(always=watch)
    # force_eager: what Dynamo compiles drops tangents, be it a compiled module or the frames of this file around it.
    with torch.compiler.set_stance("force_eager"), forward_ad.dual_level(), _checkpointing_off(), lost.watching(), _ForwardMode(calls, lost):
        dual = fn(*_duals(primals, tangents))
        lost.refuse(dual)
        out, d_out = forward_ad.unpack_dual(dual)
    return out, torch.zeros_like(out) if d_out is None else d_out.detach()


def _duals(primals: Sequence[Tensor], tangents: Tangents) -> list[Tensor]:
    # Cloned: forward AD refuses overlapping memory, such as one time expanded over the batch.
    return [x if dx is None else forward_ad.make_dual(x.clone(), dx.clone()) for x, dx in zip(primals, tangents, strict=True)]


# Modules whose own autograd.Function has no forward-mode rule, and what to do instead.
_NO_TANGENT_WITH_GRAD = {
    "CheckpointWrapper": "use diffusers' enable_gradient_checkpointing()",
    "FSDPModule": "call it under torch.no_grad()",
}


@contextmanager
def _checkpointing_off() -> Iterator[None]:
    """Unset diffusers' checkpointing flag on every module that runs inside, and set it again after. Without gradients it is inert."""
    flagged: list[Any] = []

    def unset(module: Any, _inputs: Any) -> None:
        for name in _NO_TANGENT_WITH_GRAD.keys() & {cls.__name__ for cls in type(module).__mro__}:
            raise RuntimeError(f"tangent() with gradients does not run through {name}: {_NO_TANGENT_WITH_GRAD[name]}")
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
            flagged.append(module)

    if not torch.is_grad_enabled():
        yield
        return
    handle = nn.modules.module.register_module_forward_pre_hook(unset)
    try:
        yield
    finally:
        handle.remove()
        for module in flagged:
            module.gradient_checkpointing = True


class _ForwardMode(TorchFunctionMode):
    """Computes `F.scaled_dot_product_attention` of duals, gives both halves of every dual one dtype, and shows each call to `lost`."""

    def __init__(self, calls: AttentionCalls, lost: LostTangents) -> None:
        super().__init__()
        self.calls, self.lost = calls, lost

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._call(func, args, kwargs or {})
        if isinstance(out, Tensor):
            out = _aligned(out)
        elif type(out) in (tuple, list):
            out = type(out)(_aligned(x) if isinstance(x, Tensor) else x for x in out)
        if self.lost.looking:
            self.lost.look(func, (args, kwargs), out)
        return out

    def _call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is F.scaled_dot_product_attention:
            return attend(self.calls, *args, **kwargs)
        if func is F.multi_head_attention_forward:  # nn.MultiheadAttention: attends inside, where this mode is not active
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _aligned(x: Tensor) -> Tensor:
    """The same with a tangent of its own dtype: a rule that mixes dtypes, such as a norm of bf16 values with fp32 weights, can leave another."""
    value, dx = forward_ad.unpack_dual(x)
    return x if dx is None or dx.dtype == x.dtype else forward_ad.make_dual(value, dx.to(x.dtype))
