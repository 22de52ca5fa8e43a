"""Launching the Triton kernels, and the autograd Function around them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgen_kernels.jvp_attention import configs
from fastgen_kernels.jvp_attention.arguments import Arguments
from fastgen_kernels.jvp_attention.centring import Centred, centre, key_weights
from fastgen_kernels.jvp_attention.configs import Config
from fastgen_kernels.jvp_attention.triton_backward import delta_kernel, dkdv_kernel, dq_kernel
from fastgen_kernels.jvp_attention.triton_forward import FULL_MASK, KEY_MASK, NO_MASK, forward_kernel

DELTA_ROWS = 32


def interpreting() -> bool:
    """Whether the kernels were imported with TRITON_INTERPRET=1."""
    return not isinstance(forward_kernel, triton.JITFunction)


def attend(args: Arguments, config: Config | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """(o, to, lse) of checked fp16, bf16 or fp32 arguments; o is differentiable. config fixes the forward kernel's tiles."""
    if args.q.dtype != torch.float32:
        return _attend(args, config)
    # Half types need no centring in the forward pass, where sums are consistent, and would be rounded once more by it.
    with torch.autocast(args.q.device.type, enabled=False):
        centred = Centred.of(args)
        o, to, lse = _attend(centred.args, config)
        o, lse = centred.restored(o, lse)
    return o, to, lse


def _attend(args: Arguments, config: Config | None) -> tuple[Tensor, Tensor | None, Tensor]:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (args.q, args.k, args.v)):
        tensors = (args.q, args.k, args.v, args.tq, args.tk, args.tv, args.mask)
        return _Attention.apply(*tensors, args.scale, args.causal, config)[:3]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    return forward(args, config)[:3]


class _Attention(torch.autograd.Function):
    """forward() with the gradient of o; to, lse and the residual are constants."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, tq: Any, tk: Any, tv: Any, mask: Any, scale: float, causal: bool, config: Config | None) -> Any:
        return forward(Arguments(q, k, v, tq, tk, tv, scale, causal, mask), config, keep_residual=q.dtype != torch.float32)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        q, k, v, _, _, _, mask, ctx.scale, ctx.causal, _ = inputs
        o, to, lse, residual = output
        ctx.mark_non_differentiable(*(x for x in (to, lse, residual) if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, mask, o, residual, lse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if do is not None:
            q, k, v, mask, o, residual, lse = ctx.saved_tensors
            args = Arguments(q, k, v, None, None, None, ctx.scale, ctx.causal, mask)
            wanted = ctx.needs_input_grad
            grads = backward(args, o, residual, lse, do, want_q=wanted[0], want_kv=wanted[1] or wanted[2])
        return *grads, *[None] * 7


def forward(args: Arguments, config: Config | None = None, *, keep_residual: bool = False) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(o, to, lse, residual) without a graph; residual is what o lost when it was rounded. o and to keep q's layout: BSHD seen as BHSD stays that."""
    args = args.with_last_stride_one()
    o = torch.empty_like(args.q)
    to = torch.empty_like(o) if args.has_tangents else None
    residual = torch.empty_like(o) if keep_residual else None
    lse = torch.empty(args.q.shape[:3], dtype=torch.float32, device=o.device)
    candidates = configs.forward_candidates if args.has_tangents else configs.primal_candidates
    _run(forward_kernel, args, candidates, config, lambda config: forward_arguments(args, o, to, residual, lse, config))
    return o, to, lse, residual


def backward(
    args: Arguments,
    o: Tensor,
    residual: Tensor | None,
    lse: Tensor,
    do: Tensor,
    *,
    want_q: bool = True,
    want_kv: bool = True,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv) for the gradient `do` of o; args without tangents, residual as forward() kept it."""
    args = args.with_last_stride_one()
    do = do if do.stride(-1) == 1 else do.contiguous()
    delta = torch.empty_like(lse)
    rows = Config(DELTA_ROWS, DELTA_ROWS, num_warps=4, num_stages=1)
    _run(delta_kernel, args, None, rows, lambda config: delta_arguments(args, o, residual, do, delta, config))
    dq, dk, dv = None, None, None
    if want_q:
        dq = torch.empty_like(args.q)
        centre = None if args.q.dtype == torch.float32 else key_centre(args)
        _run(dq_kernel, args, configs.backward_candidates, config, lambda config: dq_arguments(args, centre, do, lse, delta, dq, config))
    if want_kv:
        dk, dv = torch.empty_like(args.k), torch.empty_like(args.v)
        _run(dkdv_kernel, args, configs.backward_candidates, config, lambda config: dkdv_arguments(args, do, lse, delta, dk, dv, config))
    return dq, dk, dv


def key_centre(args: Arguments) -> Tensor:
    """(B, Hkv, D) in fp32, a mean of the keys of each head."""
    with torch.autocast(args.k.device.type, enabled=False):
        return centre(key_weights(args), args.k).expand(*args.k.shape[:2], 1, args.k.shape[3]).squeeze(2).contiguous()


def forward_arguments(args: Arguments, o: Tensor, to: Tensor | None, residual: Tensor | None, lse: Tensor, config: Config) -> dict[str, Any]:
    """Every argument of forward_kernel by name."""
    tensors = {"q": args.q, "k": args.k, "v": args.v, "tq": args.tq, "tk": args.tk, "tv": args.tv, "o": o}
    flags = {"HAS_TQ": args.tq is not None, "HAS_TK": args.tk is not None, "HAS_TV": args.tv is not None, "HAS_RESIDUAL": residual is not None}
    return _tensor_arguments(tensors) | {"to_ptr": to, "residual_ptr": residual, "lse_ptr": lse} | flags | _problem_arguments(args, config)


def delta_arguments(args: Arguments, o: Tensor, residual: Tensor | None, do: Tensor, delta: Tensor, config: Config) -> dict[str, Any]:
    """Every argument of delta_kernel by name."""
    problem = _problem_arguments(args, config)
    shared = {name: problem[name] for name in ("num_heads", "num_queries", "D", "BLOCK_D", "BLOCK_M")}
    pointers = {"residual_ptr": residual, "delta_ptr": delta, "HAS_RESIDUAL": residual is not None}
    return _tensor_arguments({"o": o, "do": do}) | pointers | shared


def dq_arguments(args: Arguments, centre: Tensor | None, do: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, config: Config) -> dict[str, Any]:
    """Every argument of dq_kernel by name."""
    tensors: dict[str, Tensor | None] = {"q": args.q, "k": args.k, "v": args.v, "do": do, "dq": dq}
    pointers = {"centre_ptr": centre, "lse_ptr": lse, "delta_ptr": delta, "HAS_CENTRE": centre is not None}
    return _tensor_arguments(tensors) | pointers | _problem_arguments(args, config)


def dkdv_arguments(args: Arguments, do: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, config: Config) -> dict[str, Any]:
    """Every argument of dkdv_kernel by name."""
    tensors: dict[str, Tensor | None] = {"q": args.q, "k": args.k, "v": args.v, "do": do, "dk": dk, "dv": dv}
    return _tensor_arguments(tensors) | {"lse_ptr": lse, "delta_ptr": delta} | _problem_arguments(args, config)


def _tensor_arguments(tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    """Pointers, strides in units of UNIT elements, and UNIT: 8 (16 bytes of fp16) where all strides allow, so that loads are wide."""
    strides = {f"{name}_s{axis}": 0 for name in tensors for axis in "bhn"}
    for name, x in tensors.items():
        if x is not None:
            assert x.stride(-1) == 1
            strides |= {f"{name}_s{axis}": x.stride(i) for i, axis in enumerate("bhn") if x.shape[i] > 1}
    unit = 1 if any(stride % 8 for stride in strides.values()) else 8
    pointers = {f"{name}_ptr": x for name, x in tensors.items()}
    return pointers | {name: stride // unit for name, stride in strides.items()} | {"UNIT": unit}


def _problem_arguments(args: Arguments, config: Config) -> dict[str, Any]:
    """Sizes, tiles and mask: what every kernel over the scores takes."""
    mask, strides = args.mask, [0, 0, 0, 0]
    if mask is not None:
        strides = [stride if size > 1 else 0 for stride, size in zip(mask.stride(), mask.shape, strict=True)]
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return {
        "num_heads": args.q.shape[1],
        "groups": args.groups,
        "num_queries": args.q.shape[2],
        "num_keys": args.k.shape[2],
        "scale": args.scale,
        "mask_ptr": mask,
        **dict(zip(("mask_sb", "mask_sh", "mask_sn", "mask_sk"), strides, strict=True)),
        "D": args.q.shape[3],
        "BLOCK_D": _padded(args),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        **_mask_branches(args),
        "CAUSAL": args.causal,
        "UPCAST": interpreting() and args.q.dtype == torch.bfloat16,
    }


def _mask_branches(args: Arguments) -> dict[str, Any]:
    """Which branches of the kernels the mask takes."""
    if args.mask is None:
        return {"MASK": NO_MASK.value, "BIAS": False}
    return {"MASK": (KEY_MASK if args.key_only_mask else FULL_MASK).value, "BIAS": args.mask.dtype != torch.bool}


def _padded(args: Arguments) -> int:
    """The head size as the kernels hold it: a power of two, at least the 16 that a matrix product takes."""
    return max(16, configs.bucket(args.q.shape[3]))


def _run(
    kernel: Any,
    args: Arguments,
    candidates: Callable[[tuple[int, int], int, torch.dtype], list[Config]] | None,
    config: Config | None,
    arguments: Callable[[Config], dict[str, Any]],
) -> None:
    """Launch a kernel with the tiles given, or with those chosen for this kind of problem."""
    keys_share_a_program = kernel is dkdv_kernel

    def launch(config: Config) -> None:
        tokens, heads = (args.k.shape[2], args.k.shape[1]) if keys_share_a_program else (args.q.shape[2], args.q.shape[1])
        num_programs = triton.cdiv(tokens, config.block_n if keys_share_a_program else config.block_m) * heads * args.q.shape[0]
        kernel[(num_programs,)](**arguments(config), num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)

    with _on_device(args.q):
        if config is not None:
            launch(config)
        elif interpreting():
            launch(configs.INTERPRETER)
        else:
            assert candidates is not None
            num_scores = args.q.shape[:3].numel() * args.k.shape[2]
            capability = torch.cuda.get_device_capability(args.q.device)
            key = (kernel.__name__, torch.cuda.get_device_name(args.q.device), *_problem_key(args))
            table = candidates(capability, _padded(args), args.q.dtype)
            configs.launch_chosen(key, configs.suited(table, args.q.shape[2]), launch, num_scores)


def _problem_key(args: Arguments) -> tuple[Any, ...]:
    """What a choice of tiles depends on: buckets of lengths, never lengths."""
    tangents = tuple(x is not None for x in (args.tq, args.tk, args.tv))
    buckets = tuple(configs.bucket(n) for n in (args.q.shape[2], args.k.shape[2], args.q.shape[0] * args.q.shape[1]))
    return (args.q.shape[3], args.q.dtype, *_mask_branches(args).values(), args.causal, *tangents, *buckets)


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
