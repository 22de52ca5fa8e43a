"""tangent(): a network's value and directional derivative in one pass, exact or by finite differences, with every guard around it.

PyTorch's fused attention has no forward-mode rule, so plain forward AD stops at the first `F.scaled_dot_product_attention`. Here a
`TorchFunctionMode` takes each such call, splits the dual tensors, makes one call of `fastgen_kernels.jvp_attention`, and joins the two
results to a dual again. The rest of a diffusers network has forward-mode rules, so no network is modified.

Forward AD does one thing silently wrong: an operator that is fed raw duals and has no rule for them (a Triton kernel, a
`torch.library.custom_op`, an attention library outside PyTorch, `detach()`) drops the tangent and goes on with zero. What the mode sees of
that is refused on the first pass through a module (lost.py), and the rest is found by `check_tangent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from fastgen.jvp.attention import AttentionCalls
from fastgen.jvp.check import TangentCheck, check_precision, check_tangent
from fastgen.jvp.differences import Network, Tangents, central, difference_step
from fastgen.jvp.exact import checked, exact
from fastgen.jvp.unsupported import refuse_unsupported

__all__ = ["AttentionCalls", "TangentCheck", "check_precision", "check_tangent", "difference_step", "refuse_unsupported", "tangent"]


def tangent(
    fn: Network,
    primals: Sequence[Tensor],
    tangents: Tangents,
    *,
    mode: Literal["exact", "finite_difference"] = "exact",
    calls: AttentionCalls | None = None,
) -> tuple[Tensor, Tensor]:
    """fn(*primals) and d/ds fn(primals + s tangents) at s = 0, both of fn's output shape.

    primals, tangents: equal shapes, dtypes and devices; a tangent of None is a constant input. Times stay fp32 or wider.
    fn: may run wrapped modules (LoRA, DDP, FSDP2) and autocast; compiled modules run uncompiled in an exact pass. In grad mode `out`
    keeps its graph, so it can carry the loss; the tangent never has one. Diffusers' gradient checkpointing is off inside, because its
    recomputation would not see the duals; torch's CheckpointWrapper is refused, and FSDP2 needs no_grad.
    calls: adds up the attention calls that an exact pass intercepted.
    finite_difference: two more evaluations, see `difference_step`; not for bf16 networks.
    ValueError on inputs that do not fit and on attention that PyTorch refuses; RuntimeError in inference mode and inside another
    forward-AD level; UserError, on the first exact pass through a module, where an operator inside drops a tangent that `out` depends on.
    """
    primals, tangents = checked(primals, tangents)
    if mode == "exact":
        return exact(fn, primals, tangents, AttentionCalls() if calls is None else calls)
    if mode == "finite_difference":
        return fn(*primals), central(fn, primals, tangents, difference_step(primals, tangents))
    raise ValueError(f"mode: {mode!r}; allowed: exact, finite_difference")
