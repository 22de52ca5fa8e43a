"""Blocks compiled by torch.compile, each on its own: one compilation serves all blocks of a kind, and hooks, adapters, recomputation and
sharding stay where they are, around them or in what is compiled."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

# Of one block: with and without gradients, of each adapter and of none, one batch and two, with each set of features taken. Past the limit torch
# says so and runs the block as it is.
_MOST_VARIANTS = 64


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Have each compiled when it is first called, in place: names of parameters and types stay, and copies of a block are not compiled.

    Sums and products come out in another order: results change by rounding.
    """
    import torch._dynamo as dynamo

    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _MOST_VARIANTS)
    for block in dict.fromkeys(blocks):
        block.compile()


def missing(device: torch.device) -> str | None:
    """What torch.compile lacks here to compile for a device; None for nothing."""
    if device.type == "cuda":
        compiler, packages = os.environ.get("CC", "gcc"), ["triton"]
    else:
        compiler, packages = os.environ.get("CXX", "g++"), []
    if shutil.which(compiler) is None:
        return f"the compiler {compiler!r} is not installed ($CC of C, $CXX of C++ name another)"
    for package in packages:
        if importlib.util.find_spec(package) is None:
            return f"the package {package!r} is not installed"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's header files are not installed (python3-dev)"
    return None
