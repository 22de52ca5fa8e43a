"""Compiling the kernels for a GPU that is not there: Triton brings ptxas and cuobjdump."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8"}
MASKS = {
    "none": None,
    "key_bool": ((1, 1, 1, 256), torch.bool),
    "key_float": ((1, 1, 1, 256), torch.float32),
    "full_float": ((256, 256), torch.float32),
}


def tools_missing() -> str:
    """Which program of Triton's is not there; empty if none."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return ", ".join(name for name in ("ptxas", "cuobjdump") if not (folder / name).is_file())


def resources(
    kernel: str,
    capability: int,
    head_size: int,
    dtype: torch.dtype,
    config: tuple[int, int, int, int],
    tangents: str = "qkv",
    mask: str = "none",
    causal: bool = False,
    keep_residual: bool = False,
) -> dict[str, int]:
    """Bytes of stack a thread, registers a thread and bytes of shared memory of a kernel compiled with a configuration."""
    from fastgen_kernels.jvp_attention import triton as launcher
    from fastgen_kernels.jvp_attention.arguments import check
    from fastgen_kernels.jvp_attention.configs import Config

    chosen = Config(*config)
    shape = (1, 256, 4, head_size)
    q, k, v, o, dq, dk, dv = (torch.empty(shape, dtype=dtype).transpose(1, 2) for _ in range(7))
    tq, tk, tv = (torch.empty_like(q) if name in tangents else None for name in "qkv")
    lse, centre = torch.empty(1, 4, 256), None if dtype == torch.float32 else torch.empty(1, 4, head_size)
    residual = torch.empty_like(o) if keep_residual else None
    described = MASKS[mask]
    made = None if described is None else torch.zeros(described[0], dtype=described[1])
    args = check(q, k, v, tq, tk, tv, scale=None, causal=causal, mask=made, dropout_p=0.0)
    arguments = {
        "forward": lambda: launcher.forward_arguments(args, o, o if tangents else None, residual, lse, chosen),
        "dq": lambda: launcher.dq_arguments(args, centre, o, lse, lse, dq, chosen),
        "dkdv": lambda: launcher.dkdv_arguments(args, o, lse, lse, dk, dv, chosen),
        "delta": lambda: launcher.delta_arguments(args, o, residual, o, lse, chosen),
    }[kernel]()
    return _compile(getattr(launcher, f"{kernel}_kernel"), arguments, capability, chosen.num_warps, chosen.num_stages)


def _compile(function: Any, arguments: dict[str, Any], capability: int, num_warps: int, num_stages: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(ASTSource(function, signature, constants, attributes), target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"\b{label}:(\d+)", said).group(1)) for name, label in (("stack", "STACK"), ("registers", "REG"))}  # pyright: ignore[reportOptionalMemberAccess]
    return found | {"shared": compiled.metadata.shared}
