"""tangent(): a network's value and directional derivative in one pass, exact or by finite differences, with every guard around it.

PyTorch's fused attention has no forward-mode rule, so plain forward AD stops at the first `F.scaled_dot_product_attention`. Here a
`TorchFunctionMode` takes each such call, splits the dual tensors, makes one call of `fastgen_kernels.jvp_attention`, and joins the two
results to a dual again. The rest of a diffusers network has forward-mode rules, so no network is modified.

What forward AD does silently wrong is found by `check_tangent`: an operator that is fed raw duals and has no rule for them (a Triton
kernel, a `torch.library.custom_op`, an attention library outside PyTorch) drops the tangent and goes on with zero.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fastgen.errors import UserError

Network = Callable[..., Tensor]
Tangents = Sequence[Tensor | None]


@dataclass
class AttentionCalls:
    """How the attention calls of exact passes were computed.

    fused: value and tangent in one launch; constant: no input had a tangent, so PyTorch's own attention ran; math: PyTorch's unfused
    attention, for what the kernel does not take (a mask with a tangent or gradient, head sizes above 256).
    """

    fused: int = 0
    constant: int = 0
    math: int = 0

    @property
    def total(self) -> int:
        return self.fused + self.constant + self.math


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
    ValueError on inputs that do not fit; RuntimeError in inference mode and inside another forward-AD level.
    """
    primals, tangents = _checked(primals, tangents)
    if mode == "exact":
        return _exact(fn, primals, tangents, AttentionCalls() if calls is None else calls)
    if mode == "finite_difference":
        return fn(*primals), _central(fn, primals, tangents, difference_step(primals, tangents))
    raise ValueError(f"mode: {mode!r}; allowed: exact, finite_difference")


def _checked(primals: Sequence[Tensor], tangents: Tangents) -> tuple[list[Tensor], list[Tensor | None]]:
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


# Exact: forward AD with fused attention


def _exact(fn: Network, primals: Sequence[Tensor], tangents: Tangents, calls: AttentionCalls) -> tuple[Tensor, Tensor]:
    # force_eager: what Dynamo compiles drops tangents, be it a compiled module or the frames of this file around it.
    with torch.compiler.set_stance("force_eager"), forward_ad.dual_level(), _checkpointing_off(), _FusedAttention(calls):
        out, d_out = forward_ad.unpack_dual(fn(*_duals(primals, tangents)))
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


class _FusedAttention(TorchFunctionMode):
    """Computes `F.scaled_dot_product_attention` of duals; every other function runs as it is."""

    def __init__(self, calls: AttentionCalls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(self.calls, *args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:  # nn.MultiheadAttention: attends inside, where this mode is not active
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    calls: AttentionCalls,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, (..., H, N, d) with any of its inputs dual."""
    if dropout_p > 0:
        raise ValueError(f"dropout_p: {dropout_p}; attention under tangent() draws no dropout, so networks stay in eval mode")
    query, key, value = _autocast(query), _autocast(key), _autocast(value)
    attn_mask = None if attn_mask is None else _autocast(attn_mask)
    primals, tangents = zip(*(forward_ad.unpack_dual(x) for x in (query, key, value)), strict=True)
    mask_moves = attn_mask is not None and (_needs_grad(attn_mask) or forward_ad.unpack_dual(attn_mask).tangent is not None)
    plain = partial(F.scaled_dot_product_attention, query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    if not mask_moves and all(x is None for x in tangents):
        calls.constant += 1
        return plain()
    if not mask_moves and query.shape[-1] == value.shape[-1] <= 256:
        calls.fused += 1
        return _fused(primals, tangents, attn_mask, scale=scale, causal=is_causal)
    calls.math += 1
    warnings.warn("tangent() runs PyTorch's unfused attention, which is slow, for a learned mask or head sizes the kernel lacks", stacklevel=2)
    with sdpa_kernel(SDPBackend.MATH):
        return plain()


def _needs_grad(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _autocast(x: Tensor) -> Tensor:
    """What autocast does to an input of attention, tangent included; it would not cast for a kernel of ours."""
    casts = torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if casts else x


def _fused(primals: Sequence[Tensor], tangents: Tangents, mask: Tensor | None, *, scale: float | None, causal: bool) -> Tensor:
    """One launch for the output and its tangent, joined to a dual; gradients flow through the output alone."""
    from fastgen_kernels.jvp_attention import jvp_attention

    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in primals))

    def bhnd(x: Tensor) -> Tensor:
        x = x if x.ndim > 2 else x.unsqueeze(0)
        return x.expand(*batch, *x.shape[-3:]).reshape(-1, *x.shape[-3:])

    mask = None if mask is None else bhnd(mask.detach() if mask.ndim > 1 else mask.detach()[None])
    q, k, v = (bhnd(x) for x in primals)
    # Under autocast the two halves of a dual may differ in dtype.
    tq, tk, tv = (None if dx is None else bhnd(dx.detach().to(x.dtype)) for x, dx in zip(primals, tangents, strict=True))
    with torch.autocast(q.device.type, enabled=False):
        o, to, _ = jvp_attention(q, k, v, tq, tk, tv, scale=scale, causal=causal, mask=mask)  # type: ignore[call-arg]
    assert to is not None
    shape = (*batch, *primals[0].shape[-3:])
    return forward_ad.make_dual(o.reshape(shape), to.reshape(shape))


# Finite differences


def difference_step(primals: Sequence[Tensor], tangents: Tangents) -> float:
    """Step h of the central difference: the largest that moves each input by at most a twentieth of its unit.

    Networks see 1000 t, or a t in [0, 1000], in a sinusoid of frequency 1, so a time's unit is 1e-3 max(1, |t|), and inputs of at most
    two axes, (B,) or (B, T), count as times. A larger input's unit is a tenth of its RMS. In fp32 this is within 0.2 % of the exact
    tangent on twelve pipelines' networks, the best power of two; bf16 is too coarse for any h.
    """
    limits = [_unit(x) / size for x, dx in zip(primals, tangents, strict=True) if dx is not None and (size := _size(dx)) > 0]
    return 0.05 * min(limits, default=1.0)


def _size(x: Tensor) -> float:
    return float(x.double().abs().max() if x.ndim <= 2 else x.double().square().mean().sqrt())


def _unit(x: Tensor) -> float:
    return 1e-3 * max(1.0, _size(x)) if x.ndim <= 2 else 0.1 * (_size(x) or 1.0)


def _moved(primals: Sequence[Tensor], tangents: Tangents, step: float) -> list[Tensor]:
    return [x if dx is None else x + step * dx for x, dx in zip(primals, tangents, strict=True)]


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Differences need all of fp32's bits; CUDA's convolutions take TF32 unless told not to."""
    flags: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = False
        yield
    finally:
        for flag, allowed in zip(flags, before, strict=True):
            flag.allow_tf32 = allowed


@torch.no_grad()
@_no_tf32()
def _central(fn: Network, primals: Sequence[Tensor], tangents: Tangents, step: float) -> Tensor:
    return (fn(*_moved(primals, tangents, step)) - fn(*_moved(primals, tangents, -step))) / (2 * step)


# Checks at the start of a run


class TangentCheck(NamedTuple):
    """Relative error of the exact tangent against the best of several finite differences, the step of that one, and how attention ran."""

    relative_error: float
    step: float
    calls: AttentionCalls


def check_tangent(
    fn: Network, primals: Sequence[Tensor], tangents: Tangents, module: nn.Module | None = None, *, tolerance: float = 1e-2
) -> TangentCheck:
    """Compare the exact tangent with finite differences over three orders of magnitude of the step; UserError where none agrees.

    Run it once on the real network, on a small batch, computing in fp32 or wider: in bf16 no difference is a reference.
    module: what `fn` runs; then unsupported settings are refused first, and the error names the layer whose tangent is the first to be
    wrong though that of its inputs is right. An exact tangent of zero passes only if the finite differences are zero too.
    """
    if module is not None:
        refuse_unsupported(module)
    calls = AttentionCalls()
    trace = _Trace(module)
    try:
        with torch.no_grad(), _no_tf32(), trace.recording(lambda x: forward_ad.unpack_dual(x).tangent):
            out, exact = tangent(fn, primals, tangents, calls=calls)
    except NotImplementedError as error:  # PyTorch's answer where an operator has no forward-mode rule
        at = trace.layer(trace.running[-1]) if trace.running else "the network"
        raise UserError(f"no exact tangent in {at}: {str(error).splitlines()[0]} {_ADVICE}") from error
    primals, tangents = _checked(primals, tangents)
    steps = [difference_step(primals, tangents) * 4.0**k for k in range(-2, 4)]
    error, step = min(_errors(fn, primals, tangents, out, exact, steps))
    if error <= tolerance:
        return TangentCheck(error, step, calls)
    said = "is zero, finite differences are not" if not exact.any() else "disagrees with finite differences"
    culprit = trace.first_wrong(fn, primals, tangents, steps[2:5])
    at = "" if culprit is None else f", first in {trace.layer(culprit)}"
    raise UserError(f"the exact tangent {said}: relative error {error:.1e} (allowed {tolerance:.0e}){at}. {_ADVICE}")


_ADVICE = (
    "It runs an operator that forward AD cannot follow: replace that by PyTorch operators, or set recipe key distiller.tangent to finite_difference"
)


def _errors(
    fn: Network, primals: Sequence[Tensor], tangents: Tangents, out: Tensor, exact: Tensor, steps: Sequence[float]
) -> Iterator[tuple[float, float]]:
    """(relative error, step) of central differences at each step, and of the Richardson extrapolation of each pair of neighbours."""
    floor = _RESOLUTION * float(out.double().norm()) / steps[-1]
    last = None
    for step in steps:
        central = _central(fn, primals, tangents, step)
        yield _relative(exact, central, floor), step
        if last is not None:
            yield _relative(exact, (16 * last - central) / 15, floor), step
        last = central


# Derivatives below this share of value / step are not resolved by fp32 differences; a derivative of zero is never larger.
_RESOLUTION = 1e-5


def _relative(exact: Tensor, reference: Tensor, floor: float) -> float:
    """|exact - reference| over the larger norm: 1 where one of them is zero, unless the other is below the floor."""
    difference = float((exact.double() - reference.double()).norm())
    size = max(float(exact.double().norm()), float(reference.double().norm()), floor)
    return difference / size if math.isfinite(difference) and size > 0 else 0.0 if size == 0 else math.inf


class _Trace:
    """The tensors that enter and leave every submodule call, in order of execution: at which layer does the tangent go wrong?"""

    def __init__(self, module: nn.Module | None) -> None:
        self.modules = {} if module is None else dict(module.named_modules())
        self.running: list[str] = []  # submodules under execution, innermost last
        self.events: list[tuple[str | None, list[Tensor]]] = []  # which submodule made these tensors, up to 2,048 elements of each

    @contextmanager
    def recording(self, read: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Record `read` of every tensor; None stands for zeros."""
        self.running, self.events = [], []
        with ExitStack() as hooks:
            for name, module in self.modules.items():
                hooks.callback(module.register_forward_pre_hook(partial(self._enter, name, read), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(partial(self._leave, name, read)).remove)
            yield

    def _enter(self, name: str, read: Callable, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self._keep(self.running[-1] if self.running else None, (args, kwargs), read)
        self.running.append(name)

    def _leave(self, name: str, read: Callable, _module: nn.Module, _inputs: Any, out: Any) -> None:
        self._keep(name, out, read)
        self.running.pop()

    def _keep(self, maker: str | None, values: Any, read: Callable[[Tensor], Tensor | None]) -> None:
        read_values = [(x, read(x)) for x in _float_tensors(values)]
        samples = [(torch.zeros_like(x) if value is None else value).detach().flatten() for x, value in read_values]
        self.events.append((maker, [sample[:: max(1, len(sample) // 1024)].double().cpu() for sample in samples]))

    def first_wrong(self, fn: Network, primals: Sequence[Tensor], tangents: Tangents, steps: Sequence[float]) -> str | None:
        """The submodule that made the first tensor whose recorded tangent is off by 5 % of its finite difference at every step."""
        exact, passes = self.events, []
        for step in steps:
            for signed in (step, -step):
                with torch.no_grad(), _no_tf32(), self.recording(lambda x: x):
                    fn(*_moved(primals, tangents, signed))
                passes.append(self.events)
        for i, (maker, values) in enumerate(exact):
            for j, value in enumerate(values):
                pairs = [(step, passes[2 * k][i][1][j], passes[2 * k + 1][i][1][j]) for k, step in enumerate(steps)]
                floor = _RESOLUTION * float(pairs[-1][1].norm()) / steps[-1]
                if min(_relative(value, (up - down) / (2 * step), floor) for step, up, down in pairs) > 0.05:
                    return maker
        return None

    def layer(self, name: str) -> str:
        return f"layer {name or '(the whole network)'} of type {type(self.modules[name]).__name__}"


def _float_tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _float_tensors(value)
    elif isinstance(values, dict):
        yield from _float_tensors(list(values.values()))


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
