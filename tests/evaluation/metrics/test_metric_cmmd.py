"""CMMD against its formula, and against the kernel's closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_clips import by_hand, sample_set
from torch import Tensor
from torch.nn.functional import normalize

from fastgen.evaluation.metrics.base import Unavailable
from fastgen.evaluation.metrics.cmmd import EMBEDDING, Cmmd, squared_mmd
from fastgen.evaluation.tables import Table


class Real:
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def table(self, of: Any) -> Table:
        assert of == EMBEDDING
        return Table(self.rows)


def units(count: int, seed: int, shift: float = 0.0) -> Tensor:
    rows = torch.randn(count, 24, generator=torch.Generator().manual_seed(seed))
    rows[:, 0] += shift
    return normalize(rows, dim=1)


def cmmd(made: Tensor, real: Tensor) -> float:
    seen = by_hand({EMBEDDING: made}, sample_set([""] * len(made)), reference=Real(real))
    (value,) = Cmmd(Cmmd.Config(), ["all"]).measure(seen)
    assert (value.name, value.n, value.interval) == ("cmmd", len(made), None)
    return value.value


def by_formula(made: Tensor, real: Tensor, sigma: float = 10.0) -> float:
    """1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)), all pairs, each kernel written out."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-((a.double()[:, None] - b.double()[None]) ** 2).sum(2) / (2 * sigma**2)).mean()

    return float(1000 * (kernel(made, made) + kernel(real, real) - 2 * kernel(made, real)))


@pytest.mark.parametrize(("made", "real"), [(30, 30), (17, 40), (2, 3)])
def test_the_formula(made: int, real: int) -> None:
    first, second = units(made, 0, 1.0), units(real, 1)
    assert cmmd(first, second) == pytest.approx(by_formula(first, second), rel=1e-9, abs=1e-10)


def test_blocks_change_nothing() -> None:
    first, second = Table(units(23, 0, 1.0)), Table(units(31, 1))
    whole = squared_mmd(first, second, 10.0)
    for block in (1, 4, 7, 23, 31):
        assert squared_mmd(first, second, 10.0, block) == pytest.approx(whole, rel=1e-11)


def test_a_set_has_no_distance_from_itself() -> None:
    rows = units(40, 0)
    assert abs(cmmd(rows, rows.clone())) < 1e-11


def test_two_points() -> None:
    """Sets of one repeated point each, at right angles: 2 (1 - exp(-2 / 200))."""
    first, second = (torch.eye(2)[[axis, axis]] for axis in (0, 1))
    assert cmmd(first, second) == pytest.approx(1000 * 2 * -torch.expm1(torch.tensor(-0.01, dtype=torch.float64)).item(), rel=1e-12)


def test_it_grows_with_the_shift() -> None:
    real = units(200, 1)
    near, far = cmmd(units(200, 2, 0.5), real), cmmd(units(200, 3, 2.0), real)
    assert cmmd(units(200, 4), real) < near < far


def test_what_it_needs() -> None:
    metric = Cmmd(Cmmd.Config(), ["all"])
    assert metric.needs().reference == (EMBEDDING,) and metric.needs().generated == {"all": (EMBEDDING,)}
    assert dict(EMBEDDING.options) == {"model": "ViT-L-14-336", "pretrained": "openai"}
    with pytest.raises(Unavailable, match="needs reference pictures"):
        metric.measure(by_hand({EMBEDDING: units(4, 0)}, sample_set([""] * 4)))
    with pytest.raises(Unavailable, match="two generated and two reference pictures or more, there are 4 and 1"):
        cmmd(units(4, 0), units(1, 1))
