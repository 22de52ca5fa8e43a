"""Who makes attention, its gradient or its tangent: ours, PyTorch's back ends, and other packages.

`open` prepares a problem (copies, masks, compilation) and gives the call to be timed, which returns its results in the order of
problems.RESULTS. It raises LeftOut where it cannot run here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fastgen_kernels.jvp_attention import configs, jvp_attention
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.peers import PEERS, Peer
from benchmarks.kernels.problems import Inputs, Problem, Work
from benchmarks.measuring.case import LeftOut, Target

Results = tuple[Tensor, ...]
Three = tuple[Tensor, Tensor, Tensor]
Attend = Callable[[], Results]


@dataclass(frozen=True)
class Contender:
    """work: what its call does; ours: held to the kernel's own error bounds."""

    name: str
    work: Work
    open: Callable[[Problem, Inputs, Target], AbstractContextManager[Attend]]
    ours: bool = False


def contenders() -> list[Contender]:
    """PyTorch's and ours. The first gives the time that the others are divided by."""
    cudnn, flash = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    return [
        Contender("flash_forward", "forward", sdpa(flash)),
        Contender("fastgen_forward", "forward", fastgen("forward"), ours=True),
        Contender("fastgen_jvp", "jvp", fastgen("jvp"), ours=True),
        Contender("fastgen_backward", "backward", fastgen("backward"), ours=True),
        Contender("fastgen_jvp_backward", "jvp_backward", fastgen("jvp_backward"), ours=True),
        Contender("flash_backward", "backward", sdpa(flash, backward=True)),
        Contender("cudnn_forward", "forward", sdpa(cudnn)),
        Contender("cudnn_backward", "backward", sdpa(cudnn, backward=True)),
        Contender("fa3_forward", "forward", flash3()),
        Contender("fa3_backward", "backward", flash3(backward=True)),
        Contender("math_jvp", "jvp", math_jvp),
    ]


def others() -> list[Contender]:
    """Those that take long to compile, or may break the process that they run in; the first again for comparison."""
    return [contenders()[0], Contender("flex_forward", "forward", flex), *(Contender(peer.name, "jvp", package(peer)) for peer in PEERS)]


def fastgen(work: Work) -> Callable[[Problem, Inputs, Target], AbstractContextManager[Attend]]:
    """Our kernel, which chooses its tiles anew."""

    @contextmanager
    def open(problem: Problem, inputs: Inputs, target: Target) -> Iterator[Attend]:
        tangents = inputs.tangents if work in ("jvp", "jvp_backward") else (None, None, None)
        configs.forget()
        if work in ("forward", "jvp"):
            with torch.no_grad():
                yield lambda: _present(jvp_attention(*inputs.primals, *tangents, causal=problem.causal)[:2])
            return
        leaves = _leaves(inputs)

        def call() -> Results:
            o, to, _ = jvp_attention(*leaves, *tangents, causal=problem.causal)
            return _present((o, to, *torch.autograd.grad(o, leaves, inputs.do)))

        yield call

    return open


def tiles() -> dict[str, dict[str, int]] | None:
    """Which tiles our kernels have chosen since the contender was opened; None where they did not run."""
    return {str(key[0]): dataclasses.asdict(config) for key, config in configs.chosen().items()} or None


def sdpa(backend: SDPBackend, *, backward: bool = False) -> Callable[[Problem, Inputs, Target], AbstractContextManager[Attend]]:
    """One of scaled_dot_product_attention's back ends."""

    @contextmanager
    def open(problem: Problem, inputs: Inputs, target: Target) -> Iterator[Attend]:
        if backend == SDPBackend.CUDNN_ATTENTION and not target.is_gpu:
            raise LeftOut("cuDNN's attention needs CUDA")
        leaves = _leaves(inputs) if backward else inputs.primals

        def call() -> Results:
            o = scaled_dot_product_attention(*leaves, is_causal=problem.causal)
            return (o, *torch.autograd.grad(o, leaves, inputs.do)) if backward else (o,)

        with sdpa_kernel(backend), torch.set_grad_enabled(backward):
            yield call

    return open


def flash3(*, backward: bool = False) -> Callable[[Problem, Inputs, Target], AbstractContextManager[Attend]]:
    """scaled_dot_product_attention with FlashAttention 3 in FlashAttention's place, where PyTorch offers that and its package is there."""

    @contextmanager
    def open(problem: Problem, inputs: Inputs, target: Target) -> Iterator[Attend]:
        with _flash3_active(), sdpa(SDPBackend.FLASH_ATTENTION, backward=backward)(problem, inputs, target) as call:
            yield call

    return open


@contextmanager
def _flash3_active() -> Iterator[None]:
    registry: Any = torch.nn.attention
    if "FA3" not in getattr(registry, "list_flash_attention_impls", list)():
        raise LeftOut(f"PyTorch {torch.__version__} offers no FlashAttention 3")
    try:
        registry.activate_flash_attention_impl("FA3")
    except ImportError as error:
        raise LeftOut(f"FlashAttention 3 is PyTorch's through a package that is not installed: {error}") from error
    try:
        yield
    finally:
        registry.restore_flash_attention_impl()


@contextmanager
def math_jvp(problem: Problem, inputs: Inputs, target: Target) -> Iterator[Attend]:
    """What PyTorch itself has for a tangent: forward mode through scores in memory."""
    needed, free = problem.score_bytes(), target.free_bytes()
    if needed > 0.8 * free:
        raise LeftOut(f"its scores need {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")

    def call() -> Results:
        with forward_ad.dual_level():
            return _tangent(scaled_dot_product_attention(*_duals(inputs), is_causal=problem.causal))

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        yield call


@contextmanager
def flex(problem: Problem, inputs: Inputs, target: Target) -> Iterator[Attend]:
    """PyTorch's own Triton attention, compiled for this problem; as it is on a CPU, to try the code."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if problem.causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, problem.num_queries, problem.num_keys, device=target.device)
    attend = torch.compile(flex_attention, dynamic=False) if target.is_gpu else flex_attention
    try:
        with torch.no_grad():
            yield lambda: (attend(*inputs.primals, block_mask=mask),)  # pyright: ignore[reportReturnType]
    finally:
        torch.compiler.reset()  # else the ninth problem would run uncompiled, with all scores in memory


def package(peer: Peer) -> Callable[[Problem, Inputs, Target], AbstractContextManager[Attend]]:
    """Another package, called as its page says, on copies in the layout that it would otherwise make at every call."""

    @contextmanager
    def open(problem: Problem, inputs: Inputs, target: Target) -> Iterator[Attend]:
        if reason := peer.obstacle(problem, target.device):
            raise LeftOut(reason)
        attention = peer.module().JVPAttn
        copies = Inputs(*(x.contiguous() for x in vars(inputs).values()))

        def call() -> Results:
            with forward_ad.dual_level():
                return _tangent(attention.fwd_dual(*_duals(copies), causal=problem.causal))

        with torch.no_grad():
            yield call

    return open


def _leaves(inputs: Inputs) -> Three:
    q, k, v = (x.detach().requires_grad_() for x in inputs.primals)
    return q, k, v


def _duals(inputs: Inputs) -> Three:
    q, k, v = (x if t is None else forward_ad.make_dual(x, t) for x, t in zip(inputs.primals, inputs.tangents, strict=True))
    return q, k, v


def _tangent(dual: Tensor) -> Results:
    o, to = forward_ad.unpack_dual(dual)
    assert to is not None
    return o, to


def _present(results: Iterable[Tensor | None]) -> Results:
    return tuple(x for x in results if x is not None)
