"""Stateless randomness: every number depends on (seed, scope, stream name, global sample id) and on nothing else.

So a sample draws the same noise on one process or on sixteen, on CPU or GPU, before or after a resume, and nothing has to be
saved. The generator is Philox-4x64 (Salmon et al. 2011), counter-based: a stream is a key of 128 bits, a sample the counter's highest
word, so no two samples of a stream share a number. Numbers are drawn on the CPU and moved to the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

# Global sample id of numbers that all samples of an update share.
SHARED = -1


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts, stable across machines and Python versions. torch's CPU generator uses its lowest 32 bits
    only, so of many such seeds some repeat."""
    return _hash(8, *parts) >> 1


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Run with torch's global CPU generator at `derive_seed(*parts)`, for constructors that draw from it, and put it back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(*parts))
        yield


def _hash(num_bytes: int, *parts: object) -> int:
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=num_bytes).digest(), "little")


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
        return self._draw(name, shape, lambda generator, row: generator.standard_normal(dtype=np.float32, out=row))

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape), fp32."""
        return self._draw(name, shape, lambda generator, row: generator.random(dtype=np.float32, out=row))

    def shared_index(self, name: str, count: int) -> int:
        """One integer in [0, count), the same for every sample, hence on every process."""
        return derive_seed(self.seed, *self.scope, name, SHARED) % count

    def shared_uniform(self, name: str, count: int) -> Tensor:
        """Uniform numbers in [0, 1), (count,) fp32, the same for every sample, hence on every process."""
        return replace(self, ids=(SHARED,)).uniform(name, (count,))[0]

    def _draw(self, name: str, shape: Sequence[int], fill: Callable[[np.random.Generator, np.ndarray], object]) -> Tensor:
        philox = np.random.Philox(key=_hash(16, self.seed, *self.scope, name), counter=0)
        generator, state = np.random.Generator(philox), philox.state
        rows = np.empty((len(self.ids), prod(shape)), np.float32)
        for row, sample in zip(rows, self.ids, strict=True):
            state["state"]["counter"][:] = (0, 0, 0, sample % 2**64)
            philox.state = state  # five times as fast as a new generator
            fill(generator, row)
        return torch.from_numpy(rows).view(len(rows), *shape).to(self.device)
