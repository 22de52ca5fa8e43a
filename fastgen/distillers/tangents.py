"""What methods that differentiate the student along a trajectory share: the check at the start, and the precision of differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from fastgen import jvp
from fastgen.conditioning import Conditioning, select
from fastgen.denoiser import Predictor, full_precision
from fastgen.sampling import Predict
from fastgen.surgery import moe

Network = Callable[[Tensor, Tensor, Conditioning], Tensor]


def faded(step: int, warmup: int) -> float:
    """Share of the time-derivative part at student step `step`: rises linearly to 1 over `warmup` steps."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


@contextmanager
def precise(student: Predict) -> Iterator[bool]:
    """The student computes in its weights' own precision inside: differences of bf16 outputs are noise. Yields whether it did not before."""
    module = _module(student)
    if module is None:
        yield False
        return
    with full_precision(module) as changed:
        yield changed


def derivative(
    student: Predict,
    network: Network,
    x: Tensor,
    t: Tensor,
    cond: Conditioning,
    tangents: tuple[Tensor, Tensor | None],
    mode: Literal["exact", "finite_difference"],
) -> Tensor:
    """d/ds network(x + s dx, t + s dt) at s = 0, (B, ...), without gradients. network calls `student`; a dt of None holds t."""
    if mode == "exact":
        return jvp.tangent(lambda x, t: network(x, t, cond), (x, t), tangents)[1]
    with precise(student), _choosing_once(student, network, cond) as fn:
        return jvp.tangent(fn, (x, t), tangents, mode="finite_difference")[1]


def check_student(student: Predict, network: Network, x: Tensor, t: Tensor, cond: Conditioning, tangents: tuple[Tensor, Tensor | None]) -> None:
    """Once, at the start, on the real network and two samples: the exact tangent against finite differences in fp32, then the same
    tangent, attention call by attention call, in the run's own precision against that of fp32. UserError where they disagree.

    The two samples are those of the most ordinary times: at the ends of the path a difference step would leave it.
    """
    few = (t - t.median()).abs().argsort()[:2]
    dx, dt = tangents
    x, t, cond, tangents = x[few], t[few], select(cond, few), (dx[few], None if dt is None else dt[few])
    with _choosing_once(student, network, cond) as fn:
        with precise(student):
            full = jvp.check_tangent(fn, (x, t), tangents, module=_module(student))
        jvp.check_precision(fn, (x, t), tangents, full)


@contextmanager
def _choosing_once(student: Predict, network: Network, cond: Conditioning) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """`network` as a function of x and t for which a student of experts goes to the same experts and blocks wherever it is evaluated: tangents hold
    the choice constant, and one that flips within a difference's step would make the difference jump."""
    module = _module(student)
    if module is None:
        yield lambda x, t: network(x, t, cond)
        return
    with moe.holding(module) as held:

        def fn(x: Tensor, t: Tensor) -> Tensor:
            held.restart()
            return network(x, t, cond)

        yield fn


def _module(student: Predict) -> nn.Module | None:
    return student.denoiser if isinstance(student, Predictor) and isinstance(student.denoiser, nn.Module) else None
