"""Stateless randomness: every number depends on (seed, scope, stream name, global sample id) and on nothing else.

So a sample draws the same noise on one process or on sixteen, on CPU or GPU, before or after a resume, and nothing has to be
saved. Numbers are drawn on the CPU with one reseeded generator and moved to the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Global sample id of numbers that all samples of an update share.
SHARED = -1


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts, stable across machines and Python versions."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class SampleRng:
    """Random numbers for the samples `ids` (global ids) of one update; asking twice for one name gives the same numbers."""

    seed: int
    scope: tuple[object, ...]
    ids: Sequence[int]
    device: torch.device | str = "cpu"

    def at(self, *scope: object) -> SampleRng:
        """The same samples in a narrower scope, whose names are its own."""
        return replace(self, scope=(*self.scope, *scope))

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers (B, *shape), fp32."""
        return self._draw(name, lambda generator: torch.randn(tuple(shape), generator=generator))

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape), fp32."""
        return self._draw(name, lambda generator: torch.rand(tuple(shape), generator=generator))

    def shared_index(self, name: str, count: int) -> int:
        """One integer in [0, count), the same for every sample, hence on every process."""
        return derive_seed(self.seed, *self.scope, name, SHARED) % count

    def shared_uniform(self, name: str, count: int) -> Tensor:
        """Uniform numbers in [0, 1), (count,) fp32, the same for every sample, hence on every process."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *self.scope, name, SHARED))
        return torch.rand(count, generator=generator).to(self.device)

    def _draw(self, name: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        generator = torch.Generator()
        rows = [draw(generator.manual_seed(derive_seed(self.seed, *self.scope, name, sample))) for sample in self.ids]
        return torch.stack(rows).to(self.device)
