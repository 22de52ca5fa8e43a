"""What is checked of a network's tangent at the start of a run: against finite differences, and in the run's own precision."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastgen.errors import UserError
from fastgen.jvp.attention import AttentionCalls
from fastgen.jvp.differences import Network, Tangents, central, difference_step
from fastgen.jvp.exact import checked, exact
from fastgen.jvp.lost import ADVICE
from fastgen.jvp.trace import RESOLUTION, Trace, relative
from fastgen.jvp.unsupported import refuse_unsupported
from fastgen.tf32 import no_tf32


class TangentCheck(NamedTuple):
    """relative_error: of the exact tangent against the best of several finite differences; step: of that one; calls: how attention ran."""

    relative_error: float
    step: float
    calls: AttentionCalls
    tangent: Tensor


def check_tangent(
    fn: Network, primals: Sequence[Tensor], tangents: Tangents, module: nn.Module | None = None, *, tolerance: float = 1e-2
) -> TangentCheck:
    """Compare the exact tangent with finite differences over three orders of magnitude of the step; UserError where none agrees.

    Run it once on the real network, on a small batch, computing in fp32 or wider: in bf16 no difference is a reference.
    module: what `fn` runs; then unsupported settings are refused first, and the error names the layer whose tangent is the first to be
    wrong though that of its inputs is right. An exact tangent of zero passes only if the finite differences are zero too, and none passes
    that depends on what an operator has dropped, however little that is.
    """
    if module is not None:
        refuse_unsupported(module)
    primals, tangents = checked(primals, tangents)
    calls = AttentionCalls()
    trace = Trace(module)
    try:
        with torch.no_grad(), no_tf32(), trace.recording(lambda x: forward_ad.unpack_dual(x).tangent):
            out, d_out = exact(fn, primals, tangents, calls, watch=True)
    except NotImplementedError as error:  # PyTorch's answer where an operator has no forward-mode rule
        at = trace.layer(trace.running[-1]) if trace.running else "the network"
        raise UserError(f"no exact tangent in {at}: {str(error).splitlines()[0]} {ADVICE}") from error
    steps = [difference_step(primals, tangents) * 4.0**k for k in range(-2, 4)]
    error, step = min(_errors(fn, primals, tangents, out, d_out, steps))
    if error <= tolerance:
        return TangentCheck(error, step, calls, d_out)
    said = "is zero, finite differences are not" if not d_out.any() else "disagrees with finite differences"
    culprit = trace.first_wrong(fn, primals, tangents, steps[2:5])
    at = "" if culprit is None else f", first in {trace.layer(culprit)}"
    raise UserError(f"the exact tangent {said}: relative error {error:.1e} (allowed {tolerance:.0e}){at}. {ADVICE}")


def check_precision(fn: Network, primals: Sequence[Tensor], tangents: Tangents, full: TangentCheck) -> float:
    """Relative difference of the exact tangent in the precision that `fn` now computes in from that of `full`, a check in fp32 or wider.

    UserError where the same attention calls do not have the same tangents in both, where an operator drops one, or where the difference is
    above .3. The difference alone says little: rounding makes .02 to .07 of it, and a network without any attention tangent may be below .3.
    """
    calls = AttentionCalls()
    with torch.no_grad():
        own = exact(fn, *checked(primals, tangents), calls, watch=True)[1]
    pairs = itertools.zip_longest(calls.order, full.calls.order, fillvalue="not there")
    for i, (here, there) in enumerate(pairs):
        if here != there:
            raise UserError(
                f"recipe key train.precision: attention keeps other tangents in this precision than in fp32 (call {i + 1} of "
                f"{full.calls.total} is {here}; in fp32 it is {there}); use fp32, or set distiller.tangent to finite_difference"
            )
    error = float((own - full.tangent).norm() / full.tangent.norm().clamp(min=1e-30))
    if not error <= _HALF_PRECISION_ERROR:
        raise UserError(f"recipe key train.precision: the network's tangent is off by {error:.0%} in this precision; use fp32")
    return error


# Largest relative difference of the start's tangents in training precision and in fp32; bf16 has .02 to .07 on the digits network.
_HALF_PRECISION_ERROR = 0.3


def _errors(
    fn: Network, primals: Sequence[Tensor], tangents: Tangents, out: Tensor, exact: Tensor, steps: Sequence[float]
) -> Iterator[tuple[float, float]]:
    """(relative error, step) of central differences at each step, and of the Richardson extrapolation of each pair of neighbours."""
    floor = RESOLUTION * float(out.double().norm()) / steps[-1]
    last = None
    for step in steps:
        difference = central(fn, primals, tangents, step)
        yield relative(exact, difference, floor), step
        if last is not None:
            yield relative(exact, (16 * last - difference) / 15, floor), step
        last = difference
