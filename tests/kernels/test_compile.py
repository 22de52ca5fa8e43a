"""The shipped configurations, compiled offline for GPUs that are not here. A thread's stack is where spilled registers go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgen_kernels.jvp_attention import configs
from offline import resources, tools_missing

Run = Callable[..., Any]
SHARED_MEMORY = {90: 232448, 80: 166912, 86: 101376}  # bytes a program may have


@pytest.fixture(autouse=True)
def _tools(compiling: Run) -> None:
    if missing := compiling(tools_missing):
        pytest.skip(f"Triton is installed without {missing}")


def shipped() -> list[Any]:
    """All forward configurations at head sizes 64 and 128; the less telling combinations of dtype and tangents are marked slow."""
    found = []
    for capability in (90, 80):
        for head_size in (64, 128):
            for i, config in enumerate(configs.forward_candidates((capability // 10, 0), head_size, torch.bfloat16)):
                for dtype, tangents in ((torch.bfloat16, "qkv"), (torch.bfloat16, "q"), (torch.float16, "qkv"), (torch.float16, "q")):
                    marks = [] if i == 0 or (dtype, tangents) == (torch.bfloat16, "qkv") else [pytest.mark.slow]
                    name = f"sm_{capability}-{head_size}-{'x'.join(map(str, dataclasses.astuple(config)))}-{dtype}-{tangents}".replace("torch.", "")
                    found.append(pytest.param(capability, head_size, dtype, dataclasses.astuple(config), tangents, marks=marks, id=name))
    return found


@pytest.mark.parametrize(("capability", "head_size", "dtype", "config", "tangents"), shipped())
def test_the_forward_kernel_spills_nothing(
    capability: int, head_size: int, dtype: torch.dtype, config: tuple[int, int, int, int], tangents: str, compiling: Run
) -> None:
    used = compiling(resources, "forward", capability, head_size, dtype, config, tangents)
    assert used["stack"] == 0
    assert used["shared"] <= SHARED_MEMORY[capability]


# What a gradient needs of it: the residual, with tangents (in grad mode they share a pass) and without.
@pytest.mark.parametrize("tangents", ["qkv", ""])
@pytest.mark.parametrize(("capability", "head_size"), [(90, 64), (90, 128), (80, 64), (80, 128)])
def test_the_forward_kernel_spills_nothing_where_a_gradient_is_wanted(capability: int, head_size: int, tangents: str, compiling: Run) -> None:
    table = configs.forward_candidates if tangents else configs.primal_candidates
    config = dataclasses.astuple(table((capability // 10, 0), head_size, torch.bfloat16)[0])
    assert compiling(resources, "forward", capability, head_size, torch.bfloat16, config, tangents, keep_residual=True)["stack"] == 0


OTHERS = [
    ("forward", 90, 64, torch.float32, "none"),
    ("forward", 90, 256, torch.bfloat16, "none"),
    ("forward", 90, 72, torch.bfloat16, "key_float"),
    ("forward", 80, 64, torch.bfloat16, "full_float"),
    ("forward", 86, 128, torch.float16, "key_bool"),
    ("dq", 90, 64, torch.bfloat16, "none"),
    ("dkdv", 90, 64, torch.bfloat16, "none"),
    ("dq", 80, 128, torch.float16, "key_bool"),
    ("dkdv", 80, 128, torch.float16, "key_bool"),
    ("dq", 90, 64, torch.float32, "none"),
    ("delta", 90, 64, torch.bfloat16, "none"),
]


@pytest.mark.parametrize(("kernel", "capability", "head_size", "dtype", "mask"), OTHERS)
def test_the_rest_compiles_and_its_last_configuration_fits(
    kernel: str, capability: int, head_size: int, dtype: torch.dtype, mask: str, compiling: Run
) -> None:
    table = configs.forward_candidates if kernel == "forward" else configs.backward_candidates
    config = table((capability // 10, capability % 10), configs.bucket(head_size), dtype)[-1]
    used = compiling(
        resources,
        kernel,
        capability,
        head_size,
        dtype,
        dataclasses.astuple(config),
        "qkv" if kernel == "forward" else "",
        mask,
        keep_residual=kernel == "delta",
    )
    assert used["shared"] <= SHARED_MEMORY[capability]
