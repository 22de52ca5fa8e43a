"""What families share in whose networks text and picture become one stream of tokens, the picture behind the text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def last(output: Tensor | tuple[Tensor, ...], count: int) -> Tensor:
    """The picture's `count` tokens (B, count, C) in what a block gives: the last of several streams, or the end of one."""
    return (output[-1] if isinstance(output, tuple) else output)[:, -count:]


def behind_texts(stream: Tensor, lengths: Tensor, count: int) -> Tensor:
    """The same where each picture stands right behind its own text, of `lengths` (B,), in a stream (B, N, C); as it is where it has no more
    than those."""
    if stream.shape[1] == count:
        return stream
    places = lengths[:, None] + torch.arange(count, device=stream.device)
    return stream.gather(1, places[..., None].expand(-1, -1, stream.shape[2]))


@contextmanager
def counted(positions: Any) -> Iterator[None]:
    """Within it, a network's positions (diffusers' Lumina2RotaryPosEmbed) count a mask on the meta device as full, and have places to look up
    though their network was made there, where neither has numbers."""
    if positions.freqs_cis[0].is_meta:
        with torch.device("cpu"):
            positions.freqs_cis = positions._precompute_freqs_cis(positions.axes_dim, positions.axes_lens, positions.theta)

    def count(_module: Any, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, mask = given
        return x, torch.ones(mask.shape, dtype=torch.long, device="cpu") if mask.is_meta else mask

    handle = positions.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()
