from __future__ import annotations

import pytest
import torch

from fastgen.evaluation.diversity import pairwise_distance


def brute_force(features: torch.Tensor, groups: list[str]) -> float:
    means = []
    for group in sorted(set(groups)):
        rows = [f for f, g in zip(features.double(), groups, strict=True) if g == group]
        pairs = [float((a - b).norm()) for i, a in enumerate(rows) for b in rows[:i]]
        if pairs:
            means.append(sum(pairs) / len(pairs))
    return sum(means) / len(means)


def test_matches_brute_force_with_unequal_interleaved_groups():
    features = torch.randn(23, 5, generator=torch.Generator().manual_seed(0)) * 3
    groups = ["a", "b", "b", "c", "a", "b"] * 3 + ["b", "d", "a", "b", "e"]  # d and e have one sample
    assert pairwise_distance(features, groups) == pytest.approx(brute_force(features, groups), rel=1e-12)


def test_a_group_counts_once_whatever_its_size():
    features = torch.tensor([[0.0], [2.0], [0.0], [0.0], [0.0], [0.0]])
    assert pairwise_distance(features, ["pair", "pair", *["same"] * 4]) == pytest.approx(1.0)


def test_groups_without_a_pair_are_refused():
    with pytest.raises(ValueError, match="all 3 prompts"):
        pairwise_distance(torch.randn(3, 2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="got 2 groups"):
        pairwise_distance(torch.randn(3, 2), ["a", "b"])
