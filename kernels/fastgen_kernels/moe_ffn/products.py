"""One product per expert on rows that are sorted by expert, differentiable to any order in reverse and forward mode.

R rows, E experts, D inputs, N outputs; ends: (E,) int32, the row after each expert's last. Two operations, each the other's derivative:

    rows(x, w)_r  = W_e(r) x_r                     (R, D), (E, N, D) -> (R, N)
    outer(g, x)_e = sum over e's rows of g_r x_rᵀ  (R, N), (R, D) -> (E, N, D)

Both are bilinear, so each derivative is again one of them. `F.grouped_mm` computes them where dtype and shape allow; it has no forward-mode
rule and takes no expanded gradient, hence the functions around it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen_kernels.moe_ffn.arguments import has_numbers


def rows(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """W_e(r) x_r for each row: (R, N)."""
    return _apply(_Rows, x, w, ends)


def outer(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The sum of g_r x_rᵀ over each expert's rows: (E, N, D), zeros where an expert has none."""
    return _apply(_Outer, g, x, ends)


def is_grouped(*tensors: Tensor) -> bool:
    """Whether `F.grouped_mm` takes these: on a CPU or CUDA, no float64, and rows, of either layout, that are multiples of 16 bytes. Without numbers
    it knows half types alone."""
    x = tensors[0]
    if x.device.type not in ("cpu", "cuda") or not has_numbers(x) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    widths = {n for tensor in tensors for n in tensor.shape[-2 if tensor.ndim == 3 else -1 :]}
    return all(n > 0 and n * x.element_size() % 16 == 0 for n in widths) and x.shape[0] > 0


def _apply(function: Any, *args: Any) -> Tensor:
    return function.apply(*args)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        if is_grouped(x, w):
            return F.grouped_mm(_aligned(x), _aligned(w).transpose(-2, -1), offs=ends)
        return torch.cat([part @ each.T for part, each in zip(_parts(x, ends), w, strict=True)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, w, ends = ctx.saved_tensors
        (g,) = grads
        if g is None:
            return None, None, None
        dx = rows(g, w.transpose(-2, -1), ends) if ctx.needs_input_grad[0] else None
        return dx, outer(g, x, ends) if ctx.needs_input_grad[1] else None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        x, w, ends = ctx.saved_tensors
        dx, dw, _ = tangents
        return _sum(None if dx is None else rows(dx, w, ends), None if dw is None else rows(x, dw, ends))


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        if is_grouped(g, x):
            return F.grouped_mm(_aligned(g).transpose(0, 1), _aligned(x), offs=ends)
        return torch.stack([a.T @ b for a, b in zip(_parts(g, ends), _parts(x, ends), strict=True)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g, x, ends = ctx.saved_tensors
        (dw,) = grads
        if dw is None:
            return None, None, None
        dg = rows(x, dw, ends) if ctx.needs_input_grad[0] else None
        return dg, rows(g, dw.transpose(-2, -1), ends) if ctx.needs_input_grad[1] else None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        g, x, ends = ctx.saved_tensors
        dg, dx, _ = tangents
        return _sum(None if dg is None else outer(dg, x, ends), None if dx is None else outer(g, dx, ends))


def _keep(ctx: Any, inputs: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # else a constant weight would come with a tangent of zeros, of its own size
    ctx.save_for_backward(*inputs)
    ctx.save_for_forward(*inputs)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _parts(x: Tensor, ends: Tensor) -> list[Tensor]:
    """Each expert's rows, as good as equally many where nobody knows. Waits for the device: only where there is no grouped product."""
    if not has_numbers(ends):
        return list(x.tensor_split(len(ends)))
    stops = ends.tolist()
    return [x[first:stop] for first, stop in zip([0, *stops[:-1]], stops, strict=True)]


def _aligned(x: Tensor) -> Tensor:
    """Dense, an expert's weight in either order, and from a 16-byte boundary on: what the grouped product takes. A copy where x is not."""
    is_dense = x.is_contiguous() or (x.ndim == 3 and x.transpose(-2, -1).is_contiguous())
    if is_dense and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
