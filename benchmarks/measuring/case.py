"""What a benchmark is made of: cases, each measured on a target, each giving rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Row = dict[str, Any]
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # variables that libraries read when they are loaded


class LeftOut(Exception):
    """A case that cannot be measured here, with the reason: a GPU too small, a package that is missing."""


@dataclass(frozen=True)
class Target:
    """Where it is measured. rehearsal: on the CPU with tiny shapes, to see that everything runs; such numbers say nothing about speed."""

    device: Literal["cuda", "cpu"]
    rehearsal: bool = False

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    def free_bytes(self) -> int:
        """Memory that is free on the GPU; on a CPU, which no case is too large for in a rehearsal, 2**40."""
        return torch.cuda.mem_get_info()[0] if self.is_gpu else 2**40


@dataclass(frozen=True)
class Case:
    """One thing that is measured. name: the only one of its slice; measure: gives its rows, or raises LeftOut; seconds: what it takes on a
    recent GPU, about, so that none is begun for which there is no time."""

    name: str
    measure: Callable[[], Iterable[Row]]
    seconds: float = 10.0
