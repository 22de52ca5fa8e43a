from __future__ import annotations

import math

import pytest
import torch

from fastgen.evaluation.intervals import group_means, mean_interval
from fastgen.evaluation.weights import Unavailable


def test_it_is_the_textbooks_interval() -> None:
    """1, 2, 3, 4: mean 2.5, variance 5/3, and t(3, 97.5 %) = 3.182446305284263 from tables."""
    value, std, interval = mean_interval(torch.tensor([4.0, 1.0, 3.0, 2.0]))
    assert interval is not None
    assert (value, std) == pytest.approx((2.5, math.sqrt(5 / 3)), rel=1e-15)
    half = 3.182446305284263 * math.sqrt(5 / 3) / 2
    assert interval == pytest.approx((2.5 - half, 2.5 + half), rel=1e-12)


def test_many_scores_have_the_normal_interval() -> None:
    scores = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7
    value, std, interval = mean_interval(scores)
    assert std is not None and interval is not None
    assert interval[1] - value == pytest.approx(1.959963984540054 * std / math.sqrt(200_000), rel=1e-4)


def test_the_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(2000):
        interval = mean_interval(torch.randn(5, generator=generator)).interval
        assert interval is not None
        hits += interval[0] < 0 < interval[1]
    assert hits / 2000 == pytest.approx(0.95, abs=0.02)  # four standard deviations


def test_pictures_of_one_prompt_count_as_one_draw() -> None:
    scores, groups = torch.tensor([0.0, 2.0, 5.0, 7.0, 9.0, 1.0]), ["a", "a", "b", "b", "b", "c"]
    assert torch.equal(group_means(scores, groups), torch.tensor([1.0, 7.0, 1.0], dtype=torch.float64))
    assert mean_interval(scores, groups) == mean_interval(torch.tensor([1.0, 7.0, 1.0]))
    repeated = torch.tensor([1.0, 2.0, 4.0]).repeat_interleave(100)
    assert mean_interval(repeated, [row // 100 for row in range(300)]) == mean_interval(torch.tensor([1.0, 2.0, 4.0]))


def test_a_single_score_has_no_interval() -> None:
    assert mean_interval(torch.tensor([3.0])) == (3.0, None, None)
    assert mean_interval(torch.tensor([3.0, 5.0]), ["a", "a"]) == (4.0, None, None)


def test_sums_are_of_double_precision() -> None:
    scores = torch.full((300_000,), 0.1)
    assert mean_interval(scores).value == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_what_has_no_mean_is_refused() -> None:
    with pytest.raises(Unavailable, match="no scores"):
        mean_interval(torch.tensor([]))
    with pytest.raises(Unavailable, match="2 of 3 scores are not finite"):
        mean_interval(torch.tensor([1.0, math.nan, math.inf]))
    with pytest.raises(ValueError, match=r"got shape \(3,\) and 2 groups"):
        mean_interval(torch.zeros(3), ["a", "b"])
    with pytest.raises(ValueError, match=r"got shape \(3, 1\)"):
        mean_interval(torch.zeros(3, 1))
