"""What families share whose pipelines pack latents 2x2 into tokens (FLUX.1, Qwen-Image), and pass their scheduler sigmas and mu."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.families.pipelined import Pipelined


def pack(x: Tensor) -> Tensor:
    """Tokens (B, H/2 W/2, 4 C) of latents (B, C, H, W): rows of 2x2 squares, channel by channel."""
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Latents of `shape` (B, C, H, W), of tokens (B, H/2 W/2, 4 C)."""
    _, channels, height, width = shape
    squares = tokens.unflatten(1, (height // 2, width // 2)).unflatten(3, (channels, 2, 2))
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), channels, height, width)


@contextmanager
def exact_time(embedding: nn.Module, t: Tensor, scale: float, *others: Tensor) -> Iterator[None]:
    """Within it, a network's embedding of the time is told scale t, and the same of what it embeds beside, in fp32 or wider. In half precision
    these networks round the time before they embed it, by up to 4 of 1000: pictures bear that, derivatives along it are off by half."""

    def replace(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        wide = torch.promote_types(given[0].dtype, torch.float32)
        return (*(value.to(wide) * scale for value in (t, *others)), *given[1 + len(others) :])

    handle = embedding.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


class Packed(Pipelined):
    """Guidance is the call's `true_cfg_scale`, which acts only where a negative prompt is given."""

    pack = 2
    gives_sigmas = True

    @property
    def patch(self) -> int:
        return 1  # its configuration's patch_size is what `pack` does already

    def call_arguments(self, steps: int, guidance: float, grid: Sequence[float] | None = None) -> dict[str, Any]:
        arguments = super().call_arguments(steps, guidance, grid) | {"true_cfg_scale": guidance, "guidance_scale": self.embedded_guidance}
        return {name: value for name, value in arguments.items() if value is not None}

    def negative_arguments(self, text: str | None, guidance: float) -> dict[str, Any]:
        return {"negative_prompt": text or ""} if guidance > 1 else {}
