from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastgen.evaluation.intervals import group_sums, mean_interval
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
    """With as many of each, wherever they lie, it is Student's of the prompts' means."""
    for groups in ([row // 100 for row in range(300)], [row % 3 for row in range(300)]):
        scores = torch.tensor([1.0, 2.0, 4.0])[torch.tensor(groups)] + torch.linspace(-1, 1, 300, dtype=torch.float64)
        sums, counts = group_sums(scores, groups)
        assert counts.tolist() == [100, 100, 100]
        value, std, interval = mean_interval(scores, groups)
        wanted = mean_interval(sums / counts)
        assert wanted.std is not None and wanted.interval is not None
        assert (value, std) == pytest.approx((wanted.value, wanted.std), rel=1e-12)
        assert interval == pytest.approx(wanted.interval, rel=1e-12)


def test_the_value_is_the_mean_over_pictures_whatever_the_groups() -> None:
    """Sums 2, 21, 1 of 2, 3, 1 pictures: mean 4, residuals y - 4 n = -6, 9, -3, and the variance 3/2 · (36 + 81 + 9) / 36."""
    scores, groups = torch.tensor([0.0, 5.0, 2.0, 7.0, 1.0, 9.0]), ["a", "b", "a", "b", "c", "b"]
    value, std, interval = mean_interval(scores, groups)
    assert interval is not None
    assert (value, std) == pytest.approx((4.0, math.sqrt(3 * 5.25)), rel=1e-12)
    half = 4.30265273 * math.sqrt(5.25)  # t(2, 97.5 %) from tables
    assert interval == pytest.approx((4 - half, 4 + half), rel=1e-9)


def clustered(prompts: int, seed: int) -> tuple[Tensor, list[int]]:
    """Scores whose true mean is 1 of 1 to 4 pictures a prompt, in any order: half of their variance is the prompt's."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(prompts).repeat_interleave(torch.randint(1, 5, (prompts,), generator=generator))
    groups = groups[torch.randperm(len(groups), generator=generator)]
    scores = 1 + torch.randn(prompts, generator=generator)[groups] + torch.randn(len(groups), generator=generator)
    return scores.double(), groups.tolist()


def test_groups_of_unequal_sizes_have_the_spread_of_a_bootstrap_of_groups() -> None:
    scores, groups = clustered(400, seed=0)
    sums, counts = group_sums(scores, groups)
    rows = torch.randint(400, (4000, 400), generator=torch.Generator().manual_seed(1))
    spread = float((sums[rows].sum(1) / counts[rows].sum(1)).std())
    value, std, interval = mean_interval(scores, groups)
    assert std is not None and interval is not None
    assert value == pytest.approx(float(scores.mean()), rel=1e-12)
    assert std / 20 == pytest.approx(spread, rel=0.05)  # the bootstrap's own error is 1 %, and it lacks G / (G - 1)
    assert spread > 1.2 * float(scores.std()) / math.sqrt(len(scores))  # what independent draws would have


def test_groups_of_unequal_sizes_hold_the_true_mean_as_often_as_they_say() -> None:
    hits, naive = 0, 0
    for seed in range(1000):
        scores, groups = clustered(30, seed)
        intervals = [mean_interval(scores, each).interval for each in (groups, None)]
        hits, naive = (count + (each is not None and each[0] < 1 < each[1]) for count, each in zip((hits, naive), intervals, strict=True))
    assert hits / 1000 == pytest.approx(0.95, abs=0.028)  # four standard deviations
    assert naive / 1000 < 0.9


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
