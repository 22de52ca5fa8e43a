"""Attention and its directional derivative in one launch: Triton on NVIDIA GPUs, plain PyTorch elsewhere. Derivation in README.md."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen_kernels.jvp_attention import reference
from fastgen_kernels.jvp_attention.arguments import check

__all__ = ["describe", "jvp_attention"]


def jvp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """softmax(scale·QKᵀ + mask)·V, its derivative along (tq, tk, tv), and the softmax's log-normaliser.

    q: (B, Hq, Nq, D); k, v: (B, Hkv, Nk, D), Hkv divides Hq; fp16, bf16, fp32 or fp64, all alike; D ≤ 256; any strides.
    tq, tk, tv: like q, k, v, or None where the primal is constant. They are detached.
    scale: default D ** −0.5. causal: query i sees keys 0…i (top-left, as in SDPA), on top of the mask.
    mask: broadcasts to (B, Hq, Nq, Nk); bool (True = attend) or floating point (added to the scores). It gets no gradient and has no tangent.
    dropout_p: only 0; accepted so that SDPA's arguments can be passed on.

    Returns o and to, (B, Hq, Nq, D) in q's dtype, and lse, (B, Hq, Nq), the natural logarithm in fp32 (fp64 for fp64 inputs).
    o is differentiable in q, k, v, once; to and lse are non-differentiable constants. to is None when all three tangents are.
    A query that may see no key at all has o = to = 0 and lse = −inf. Under torch.compile the call is a graph break.
    Raises ValueError naming the argument for wrong shapes, dtypes, devices, head counts and masks, for dropout, and for forward-mode dual
    tensors, whose tangent would silently be lost.
    """
    return _attend(q, k, v, tq, tk, tv, scale=scale, causal=causal, mask=mask, dropout_p=dropout_p)


def _attend_eagerly(*tensors: Any, **options: Any) -> Any:
    args = check(*tensors, **options)
    if not _has_kernel(args.q.device, args.q.dtype):
        return reference.attend(args)
    from fastgen_kernels.jvp_attention import triton

    return triton.attend(args)


# Out of torch.compile's sight: Dynamo would trace into the launch.
_attend: Callable[..., Any] = torch.compiler.disable(_attend_eagerly)


def describe() -> str:
    """One line for `fastgen doctor`: which path is active here."""
    if not _triton_version():
        return "plain PyTorch reference (Triton is not installed)"
    if _interpreted():
        return f"Triton {_triton_version()} interpreter (TRITON_INTERPRET=1): for tests only, slow"
    if not torch.cuda.is_available():
        return "plain PyTorch reference (no CUDA device)"
    if not _runs_triton(torch.device("cuda")):
        return f"plain PyTorch reference ({torch.cuda.get_device_name()} is older than compute capability 8.0)"
    return f"Triton {_triton_version()} on {torch.cuda.get_device_name()}: output, tangent and gradient"


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel takes the call. The reference on anything but a CPU, where nothing faster exists, says so once."""
    if device.type == "cpu":
        return _interpreted() and dtype != torch.float64
    if dtype == torch.float64:
        _warn_once("float64 has no kernel")
    elif not _triton_version():
        _warn_once("Triton is not installed")
    elif not _runs_triton(device):
        _warn_once(f"the kernel needs a CUDA device of compute capability 8.0 or newer, not {device}")
    else:
        return True
    return False


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"jvp_attention takes the plain PyTorch path, with all scores in memory: {reason}", stacklevel=5)


@functools.cache
def _runs_triton(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


@functools.cache
def _triton_version() -> str:
    """Empty where Triton cannot be imported: it has wheels for Linux alone."""
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return ""


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python (TRITON_INTERPRET=1, for tests)."""
    return bool(_triton_version()) and importlib.import_module("triton").knobs.runtime.interpret
