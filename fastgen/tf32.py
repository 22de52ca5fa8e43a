"""TF32, which CUDA's convolutions take for fp32 unless told not to: 10 bits of a number in place of 23."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def no_tf32() -> Iterator[None]:
    """Neither matrix products nor convolutions take TF32 in here; afterwards those that did do so again."""
    flags: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = False
        yield
    finally:
        for flag, allowed in zip(flags, before, strict=True):
            flag.allow_tf32 = allowed
