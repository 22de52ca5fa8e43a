"""CMMD: maximum mean discrepancy of CLIP embeddings (Jayasumana et al. 2024, arXiv:2401.09603)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.evaluation.metrics.base import Heading, Measured, Metric, Needs, Table, Unavailable, Value, feature

SIGMA = 10.0
SCALE = 1000.0
EMBEDDING = feature("open_clip", "image", model="ViT-L-14-336", pretrained="openai")
_BLOCK = 2048  # rows whose distances to as many others are in memory at once: 32 MiB in fp64


class Cmmd(Metric):
    """1000 · MMD² between generated and reference pictures, with the Gaussian kernel of sigma 10 on unit vectors, the biased estimate (its means
    include each picture's kernel with itself, so that fewer pictures give more)."""

    resampling = "jackknife"  # a picture that is drawn twice is like itself
    shows = {"cmmd": Heading("CMMD", "↓", 3)}  # noqa: RUF012
    convention = (
        "1000 * biased MMD^2 (V-statistic), kernel exp(-|x - y|^2 / (2 * 10^2)), L2-normalised embeddings of OpenAI's CLIP ViT-L/14@336; the "
        "original crops the largest centre square and resizes it to 336 by Pillow's bicubic: the same as here for square pictures"
    )

    def needs(self) -> Needs:
        return Needs({self.set: (EMBEDDING,)}, reference=(EMBEDDING,))

    def measure(self, measured: Measured) -> list[Value]:
        made, real = measured.tables[self.set, EMBEDDING], measured.real().table(EMBEDDING)
        if min(len(made), len(real)) < 2:
            raise Unavailable(f"needs two generated and two reference pictures or more, there are {len(made)} and {len(real)}")
        return [Value("cmmd", SCALE * squared_mmd(made, real, SIGMA), len(made))]


def squared_mmd(first: Table, second: Table, sigma: float, block: int = _BLOCK) -> float:
    """Biased estimate of MMD² of two sets of rows (N, D) and (M, D) with the kernel exp(-|x - y|² / 2 sigma²) (Gretton et al. 2012, eq. 5).

    In fp64, a block of rows against another at a time. The kernel's mean is taken of k - 1, whose 1 drops out of the sum of three: near 1
    little of the difference would be left.
    """
    return _mean(first, first, sigma, block) + _mean(second, second, sigma, block) - 2 * _mean(first, second, sigma, block)


def _mean(first: Table, second: Table, sigma: float, block: int) -> float:
    """Mean of k(x, y) - 1 over all pairs of rows; of a table with itself each block of pairs is computed once."""
    total = 0.0
    for start in range(0, len(first), block):
        rows = first.read(start, start + block).double()
        for other in range(start if first is second else 0, len(second), block):
            part = float(_kernel(rows, second.read(other, other + block).double(), sigma).sum())
            total += part if first is not second or other == start else 2 * part
    return total / (len(first) * len(second))


def _kernel(first: Tensor, second: Tensor, sigma: float) -> Tensor:
    """(n, m) of k - 1."""
    squares = first.square().sum(1)[:, None] + second.square().sum(1) - 2 * first @ second.T
    return torch.expm1(squares.clamp(min=0) / (-2 * sigma**2))
