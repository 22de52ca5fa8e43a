"""How much does attention's tangent cost? One fused launch against what PyTorch and other packages offer, on the same card in the same run.

    python benchmarks/gpu.py --only attention              # on a CUDA GPU
    python benchmarks/gpu.py --rehearse --only attention   # tiny shapes on the CPU: says nothing about speed

Each contender is first checked against float64; one that is wrong gets its errors and no time. `ratio` is the time over that of SDPA's
FlashAttention forward of the same problem, whose floor by arithmetic is 3 for all tangents and 2 for the queries' alone.

FLOPs, for every contender alike and whatever it really does: 4 N M d a head for the output of N queries and M keys; 12 N M d with all
tangents, 8 N M d with that of the queries alone (cross-attention to text, whose keys and values are constant); 2.5 times the output's more for
its gradient, which computes the scores again; half of everything where causal. Heads times head size is 2048 but for a model's own sizes.
`*_backward` is forward and backward together. Measured in bf16; `first_call_s` holds compilation and the choice of tiles, `peak_bytes` is what
a call needs beyond its inputs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.kernels.contenders import Attend, Contender, contenders, others, tiles
from benchmarks.kernels.problems import RESULTS, Inputs, Problem, Truth, errors, self_attention, text_attention, truth
from benchmarks.measuring.case import Case, LeftOut, Row, Target
from benchmarks.measuring.clock import free_memory, kernel_time, peak_bytes
from benchmarks.measuring.worker import first_line

# Relative errors of (output and tangent, gradients) from which a result counts as wrong: ours by its tests, others' four times that.
BOUNDS = {torch.bfloat16: (5e-3, 1e-2), torch.float16: (1e-3, 2e-3), torch.float32: (1e-5, 1e-5)}
LENIENCE = 4
K = 1024
WAN = [Problem("wan_1.3b_480p", 12, 32760, 32760, 128), Problem("wan_1.3b_480p_text", 12, 32760, 512, 128, "q")]
# In order of value, since a borrowed GPU may be gone before the end.
FIRST = [self_attention(d, n * K) for d in (128, 64) for n in (4, 8, 16)]
REST = [
    *(text_attention(d, 4 * K) for d in (128, 64)),
    *(self_attention(d, n * K, causal=True) for d in (128, 64) for n in (4, 16)),
    *WAN,
    *(self_attention(d, n * K) for d in (128, 64) for n in (1, 32)),
    *(self_attention(256, n * K) for n in (4, 16)),
    *(text_attention(d, 32 * K) for d in (128, 64)),
    *(self_attention(d, n * K, causal=True) for d in (128, 64) for n in (1, 8, 32)),
    *(self_attention(256, n * K) for n in (1, 8, 32)),
    *(self_attention(256, n * K, causal=True) for n in (4, 16)),
    *(text_attention(256, n * K) for n in (4, 32)),
]
# Those that flex_attention and the other packages are tried on: each compiles again for each of them.
COMPARED = [
    *FIRST,
    *(self_attention(d, 4 * K, causal=True) for d in (128, 64)),
    WAN[0],
    self_attention(256, 4 * K),
]
TINY = [
    Problem("self_tiny", 2, 64, 64, 16),
    Problem("causal_tiny", 2, 96, 96, 16, causal=True),
    Problem("text_tiny", 2, 64, 20, 16, "q"),
]


def cases(target: Target) -> Iterator[Case]:
    """Of each problem one with PyTorch's attention and ours, and of some a second one with the rest: first those of most worth."""
    first, compared, rest = (TINY, TINY, []) if target.rehearsal else (FIRST, COMPARED, REST)
    compiled: set[tuple[int, str, bool]] = set()

    def own(problem: Problem) -> Case:
        kind = (problem.head_size, problem.tangents, problem.causal)
        compiling = 0.0 if kind in compiled else 25.0
        compiled.add(kind)
        return _case(problem.name, problem, contenders(), target, compiling)

    yield from map(own, first)
    yield from (_case(f"{problem.name}_others", problem, others(), target, 15.0) for problem in compared)
    yield from map(own, rest)


def _case(name: str, problem: Problem, who: Sequence[Contender], target: Target, compiling: float) -> Case:
    """compiling: seconds for that; a kernel takes one, and serves all lengths. A contender is called about fifteen times."""
    speed = 250e12 if problem.head_size <= 128 else 100e12
    seconds = 3.0 + compiling + 15 * sum(problem.flops(contender.work) for contender in who) / speed
    return Case(name, lambda: measure(problem, who, target), seconds)


def measure(problem: Problem, who: Sequence[Contender], target: Target, dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """A row for each contender, with its time over that of the first."""
    inputs = problem.inputs(target.device, dtype)
    with torch.no_grad():
        true = truth(problem, inputs)
    found: list[Row] = []
    for contender in who:
        if target.is_gpu:
            free_memory()
        row = attempt(contender, problem, inputs, true, target)
        found.append(row)
        if "median_ms" in row and "median_ms" in found[0]:
            row["ratio"] = row["median_ms"] / found[0]["median_ms"]
    return found


def attempt(contender: Contender, problem: Problem, inputs: Inputs, true: Truth, target: Target) -> Row:
    """One contender's row: measured; failed, where it is wrong or is ours and raises; or left out with the reason. The device's errors are raised."""
    row = {"contender": contender.name, "work": contender.work, "problem": dataclasses.asdict(problem), "dtype": str(inputs.q.dtype)[6:]}
    try:
        with contender.open(problem, inputs, target) as call:
            return row | _measured(contender, call, problem, inputs, true, target)
    except LeftOut as reason:
        return row | {"status": "left out", "reason": str(reason)}
    except torch.OutOfMemoryError as error:
        return row | {"status": "left out", "reason": f"out of memory: {first_line(error)}"}
    except torch.AcceleratorError:
        raise
    except Exception as error:  # whatever another package raises: the next contender shall be measured, and this one is named
        return row | {"status": "failed" if contender.ours else "left out", "reason": f"{type(error).__name__}: {first_line(error)}"}


def _measured(contender: Contender, call: Attend, problem: Problem, inputs: Inputs, true: Truth, target: Target) -> Row:
    """Check, then time: a wrong result has no speed."""
    found, first_call = _timed(call, target)
    said = errors(dict(zip(RESULTS[contender.work], found, strict=True)), true)
    del found
    chosen = tiles() if contender.ours else None
    row: Row = {**said, "first_call_s": first_call} | ({} if chosen is None else {"tiles": chosen})
    if wrong := [name for name, error in said.items() if not error <= bound(name, inputs.q.dtype, ours=contender.ours)]:
        return row | {"status": "failed", "reason": f"wrong result: {', '.join(f'{name} {said[name]:.2g}' for name in wrong)}"}
    row |= {"peak_bytes": _peak(call, target)} | kernel_time(call, target, milliseconds=200.0)
    return row | {"tflop_per_s": problem.flops(contender.work) / row["median_ms"] / 1e9}


def bound(name: str, dtype: torch.dtype, *, ours: bool) -> float:
    """Error from which a result counts as wrong."""
    return BOUNDS[dtype][name.startswith("error_d")] * (1 if ours else LENIENCE)


def _timed(call: Attend, target: Target) -> tuple[tuple[torch.Tensor, ...], float]:
    """Results and seconds of a call, compilation included."""
    start = time.perf_counter()
    found = call()
    _wait(target)
    return found, time.perf_counter() - start


def _peak(call: Callable[[], object], target: Target) -> int | None:
    """Memory of a call beyond what was held before it; None on a CPU."""
    before = torch.cuda.memory_allocated() if target.is_gpu else 0
    with peak_bytes(target) as peak:
        call()
        _wait(target)
        found = peak()
    return None if found is None else found - before


def _wait(target: Target) -> None:
    if target.is_gpu:
        torch.cuda.synchronize()
