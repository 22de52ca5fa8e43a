"""Weights of any size: their proportions, as cumulative probabilities and as rows."""

from __future__ import annotations

import pytest
import torch

from fastgen.data import weighted


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([3.0, 1.0], [0.75, 1]),
        ([1e308, 1e308, 0, 1e308, 1e308], [0.25, 0.5, 0.5, 0.75, 1]),
        ([5e-324, 1.5e-323], [0.25, 1]),
        ([1e308, 1e-300, 1e308], [0.5, 0.5, 1]),
    ],
)
def test_cumulative_probabilities(weights: list[float], expected: list[float]) -> None:
    table = weighted.cumulative(weights)
    assert table.dtype == torch.float64
    assert table.tolist() == pytest.approx(expected, rel=1e-15)


def test_scaling_is_exact() -> None:
    weights = [1.7e308, 1e300, 3.0, 0.0]
    assert [share / 2**-1024 for share in weighted.scaled(weights)[1:]] == weights[1:]
    assert weighted.scaled([3.0, 0.1]) == [0.75, 0.025]
    assert weighted.scaled([]) == []
    assert weighted.scaled([0.0, 0.0]) == [0.0, 0.0]


def test_shares_of_groups() -> None:
    assert weighted.shares([[1.0, 2.0], [], [5.0]]) == [0.375, 0.0, 0.625]
    assert weighted.shares([[0.0], []]) == [0.0, 0.0]


def test_rows_are_drawn_within_their_share() -> None:
    table = weighted.cumulative([1e308, 0.0, 1e308])
    assert weighted.rows(table, torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-24])).tolist() == [0, 0, 2, 2]
