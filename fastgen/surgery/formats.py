"""Ways to write a weight in fewer bits, and to read it again: rounded to bf16, or quantised to fp8, int8 or nf4.

A code is a weight (O, ...) divided by a scale and rounded. fp8 (e4m3) and int8 have a scale for each of the O output channels, its largest
absolute weight over the largest code (torchao's weight-only int8 takes 127.5 for 127, and so clips). nf4 (Dettmers et al. 2023,
arXiv:2305.14314) has sixteen codes, the quantiles of a normal distribution, and a scale for each 64 weights in a row; it is bitsandbytes'.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastgen.optional import check_package

Name = Literal["bf16", "fp8", "int8", "nf4"]


class Format(ABC):
    """package: the distribution that it needs beside torch, if any."""

    package: ClassVar[str | None] = None

    @abstractmethod
    def write(self, weight: Tensor) -> dict[str, Tensor]:
        """A weight (O, ...) as tensors, by name, on its device."""

    @abstractmethod
    def read(self, written: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weight of `shape` that was written, computed in fp32 or wider and rounded to `dtype`."""


class Rounded(Format):
    """bf16."""

    def write(self, weight: Tensor) -> dict[str, Tensor]:
        return {"codes": weight.to(torch.bfloat16)}

    def read(self, written: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return written["codes"].to(dtype)


class Scaled(Format):
    """Codes of one dtype, up to `largest`, and a scale (O, 1, ...) fp32 for each output channel."""

    def __init__(self, codes: torch.dtype, largest: float) -> None:
        self.codes, self.largest = codes, largest

    def write(self, weight: Tensor) -> dict[str, Tensor]:
        weight = weight.float()
        scale = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True) / self.largest
        scaled = weight / scale.clamp(min=torch.finfo(torch.float32).tiny)
        return {"codes": (scaled if self.codes.is_floating_point else scaled.round()).to(self.codes), "scale": scale}

    def read(self, written: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        return (written["codes"].to(wide) * written["scale"]).to(dtype)


class NF4(Format):
    """Codes (n/2, 1), two in a byte, and a scale (n/64,) fp32, of the n weights in the order of memory."""

    package = "bitsandbytes"
    _BLOCK = 64

    def write(self, weight: Tensor) -> dict[str, Tensor]:
        codes, state = self._library().quantize_4bit(weight.float().contiguous(), blocksize=self._BLOCK, quant_type="nf4")
        return {"codes": codes, "scale": state.absmax, "levels": state.code.to(codes.device)}

    def read(self, written: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        library = self._library()
        own = torch.float32 if dtype == torch.float64 else dtype
        levels = {"code": written["levels"], "blocksize": self._BLOCK, "quant_type": "nf4"}
        # In one row: bitsandbytes 0.50 on the CPU begins a new scale with each row, which is not how it writes them.
        state = library.QuantState(absmax=written["scale"], shape=torch.Size([math.prod(shape)]), dtype=own, **levels)
        return library.dequantize_4bit(written["codes"], state).to(dtype).view(torch.Size(shape))

    @staticmethod
    def _library() -> Any:
        import bitsandbytes.functional  # type: ignore[import-not-found]

        return bitsandbytes.functional


FORMATS: Mapping[Name, Format] = {"bf16": Rounded(), "fp8": Scaled(torch.float8_e4m3fn, 448.0), "int8": Scaled(torch.int8, 127.0), "nf4": NF4()}


def check_installed(name: Name, key: str) -> None:
    """UserError where a format needs a package that is not here; key: the recipe key that asks for it."""
    package = FORMATS[name].package
    if package is not None:
        check_package(package, f"recipe key {key}: {name}")
