"""How much does attention's tangent cost? One fused launch against what PyTorch offers.

    python benchmarks/kernels/jvp_attention.py             # on a CUDA GPU: checks, then measures, then writes the JSON lines
    python benchmarks/kernels/jvp_attention.py --smoke     # tiny shapes on the CPU: tries the script, says nothing about speed

Each problem is first checked against float64 on part of its queries; a wrong result ends the run before any time is printed. `ratio` is the
time over that of SDPA's FlashAttention forward of the same problem, whose floor by arithmetic is 3 (2 with constant keys and values).
FLOPs: 12·N·M·d a head with all tangents, 8·N·M·d with constant keys and values, 4·N·M·d for the output alone.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fastgen_kernels.jvp_attention import jvp_attention
from fastgen_kernels.jvp_attention.reference import jvp_attention as reference
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

RESULTS = Path(__file__).parent.parent / "results" / "jvp_attention.jsonl"
BOUNDS = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
FLOPS = {"qkv": 12, "q": 8, "": 4}


@dataclass(frozen=True)
class Problem:
    """tangents: "qkv", or "q" where keys and values are constant (cross-attention to text)."""

    name: str
    heads: int
    num_queries: int
    num_keys: int
    head_size: int
    tangents: str = "qkv"

    def tensors(self, device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor | None]]:
        """q, k, v and their tangents: (1, heads, tokens, head size), laid out as diffusers does, tokens before heads."""
        generator = torch.Generator(device).manual_seed(0)
        lengths = (self.num_queries, self.num_keys, self.num_keys)

        def draw(tokens: int) -> Tensor:
            return torch.randn(1, tokens, self.heads, self.head_size, generator=generator, device=device, dtype=dtype).transpose(1, 2)

        return [draw(n) for n in lengths], [draw(n) if name in self.tangents else None for name, n in zip("qkv", lengths, strict=True)]

    def flops(self, tangents: str) -> int:
        return FLOPS[tangents] * self.heads * self.num_queries * self.num_keys * self.head_size


PROBLEMS = [Problem(f"self_{n // 1024}k", 16, n, n, d) for d in (64, 128) for n in (1024, 4096, 8192, 32768)]
PROBLEMS += [Problem(f"text_{n // 1024}k", 16, n, 512, d, "q") for d in (64, 128) for n in (4096, 32768)]
PROBLEMS += [Problem("wan_1.3b_480p", 12, 32760, 32760, 128), Problem("wan_1.3b_480p_text", 12, 32760, 512, 128, "q")]
SMOKE = [Problem("self_tiny", 2, 64, 64, 16), Problem("text_tiny", 2, 64, 20, 16, "q")]


def check(problem: Problem, primals: list[Tensor], tangents: list[Tensor | None]) -> dict[str, float]:
    """Relative errors per head of output and tangent for the first 256 queries of two heads. Raises SystemExit when one is too large."""
    q, k, v, tq, tk, tv = (None if x is None else x[:, :2].double() for x in (*primals, *tangents))
    assert q is not None and k is not None and v is not None
    true = reference(q[:, :, :256], k, v, None if tq is None else tq[:, :, :256], tk, tv)[:2]
    found = jvp_attention(*primals, *tangents)[:2]
    errors = {}
    for name, a, b in zip(("error_o", "error_to"), found, true, strict=True):
        assert a is not None and b is not None
        errors[name] = ((a[:, :2, :256] - b).flatten(2).norm(dim=-1) / b.flatten(2).norm(dim=-1)).max().item()
    if not max(errors.values()) <= BOUNDS[primals[0].dtype]:
        raise SystemExit(f"{problem.name}: wrong result, nothing is measured: {errors}")
    return errors


def contenders(problem: Problem, primals: list[Tensor], tangents: list[Tensor | None]) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(name, its tangents, call); those that cannot run here raise when called."""
    yield "flash_forward", "", lambda: _sdpa(SDPBackend.FLASH_ATTENTION, primals)
    yield "cudnn_forward", "", lambda: _sdpa(SDPBackend.CUDNN_ATTENTION, primals)
    yield "fastgen_forward", "", lambda: jvp_attention(*primals)
    yield "fastgen_jvp", problem.tangents, lambda: jvp_attention(*primals, *tangents)
    yield "math_jvp", problem.tangents, lambda: _math_jvp(primals, tangents)
    if problem.tangents == "qkv" and problem.num_queries == problem.num_keys and problem.num_queries % 32 == 0:
        copies = [[x.contiguous() for x in some if x is not None] for some in (primals, tangents)]  # it would copy at every call
        yield "jvp_flash_attention", "qkv", lambda: _peer(*copies)


def _sdpa(backend: SDPBackend, primals: list[Tensor]) -> Tensor:
    q, k, v = primals
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


def _math_jvp(primals: list[Tensor], tangents: list[Tensor | None]) -> Any:
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        q, k, v = (x if t is None else forward_ad.make_dual(x, t) for x, t in zip(primals, tangents, strict=True))
        return forward_ad.unpack_dual(scaled_dot_product_attention(q, k, v))


def _peer(primals: list[Tensor], tangents: list[Tensor]) -> Any:
    """The package jvp-flash-attention, where it is installed."""
    attention = importlib.import_module("jvp_flash_attention.jvp_attention").JVPAttn
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(primals, tangents, strict=True)]
        return forward_ad.unpack_dual(attention.fwd_dual(*duals))


def median_ms(call: Callable[[], Any], device: str) -> tuple[float, int]:
    """(median milliseconds, number of runs), after a warm-up that also compiles and tunes."""
    call()
    if device == "cpu":
        times = [_timed(call) for _ in range(5)]
    else:
        times = importlib.import_module("triton.testing").do_bench(call, warmup=100, rep=500, return_mode="all")
    return statistics.median(times), len(times)


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """GPU memory that a call needs on top of its inputs."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(problem: Problem, device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """A row for each contender that can run."""
    primals, tangents = problem.tensors(device, dtype)
    errors = check(problem, primals, tangents)
    flash = None
    for name, kind, call in contenders(problem, primals, tangents):
        try:
            if name == "math_jvp" and not _math_fits(problem, device):
                raise RuntimeError("its scores do not fit into memory")
            milliseconds, runs = median_ms(call, device)
        except (RuntimeError, ImportError, AssertionError, NotImplementedError) as error:
            print(f"  {problem.name:20} {problem.head_size:4} {name:20} not run: {str(error).strip().splitlines()[0][:100]}")
            continue
        flash = milliseconds if name == "flash_forward" else flash
        yield {
            "name": "jvp_attention",
            "kernel": name,
            "problem": asdict(problem),
            "dtype": str(dtype).removeprefix("torch."),
            "median_ms": milliseconds,
            "n": runs,
            "tflops_per_second": problem.flops(kind) / milliseconds / 1e9,
            "ratio": milliseconds / flash if flash else None,
            "peak_bytes": peak_bytes(call, device),
            **(errors if name == "fastgen_jvp" else {}),
            "provenance": provenance(device),
        }


def _math_fits(problem: Problem, device: str) -> bool:
    """Math attention holds about eight arrays of all scores, in fp32 at worst."""
    needed = 8 * 4 * problem.heads * problem.num_queries * problem.num_keys
    return device == "cpu" or needed < 0.8 * torch.cuda.mem_get_info()[0]


def provenance(device: str) -> dict[str, Any]:
    """Where and with what a row was measured."""
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "triton") if importlib.util.find_spec(name)}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU",
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **versions},
    }


def _print_row(row: dict[str, Any]) -> None:
    ratio = f"×{row['ratio']:6.2f}" if row["ratio"] else ""
    speed = f"{row['median_ms']:9.3f} ms {row['tflops_per_second']:7.1f} TFLOP/s"
    print(f"  {row['problem']['name']:20} {row['problem']['head_size']:4} {row['kernel']:20} {speed} {ratio}")


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, or 2 where there is nothing to measure on."""
    parser = argparse.ArgumentParser(description="Time attention with its tangent.")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU; writes only to an explicit --output")
    parser.add_argument("--output", type=Path, help=f"JSON lines (default: {RESULTS.name} in benchmarks/results)")
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    chosen = parser.parse_args(arguments)
    if not chosen.smoke and not torch.cuda.is_available():
        print("not yet measured: needs a CUDA GPU", file=sys.stderr)
        return 2
    device, problems = ("cpu", SMOKE) if chosen.smoke else ("cuda", PROBLEMS)
    dtype = torch.float32 if chosen.smoke else {"bf16": torch.bfloat16, "fp16": torch.float16}[chosen.dtype]
    rows = []
    for problem in problems:
        for row in measure(problem, device, dtype):
            rows.append(row)
            _print_row(row)
    output = chosen.output or (None if chosen.smoke else RESULTS)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
