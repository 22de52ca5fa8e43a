from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from fastgen.evaluation.diversity import mode_entropy, pairwise_distance, vendi_score


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
    for measure, rows in ((pairwise_distance, torch.randn(3, 2)), (vendi_score, torch.randn(3, 2)), (mode_entropy, torch.tensor([0, 1, 2]))):
        with pytest.raises(ValueError, match="all 3 prompts"):
            measure(rows, ["a", "b", "c"])
        with pytest.raises(ValueError, match="got 2 groups"):
            measure(rows, ["a", "b"])
    for matrix in (pairwise_distance, vendi_score):
        with pytest.raises(ValueError, match=r"shape \(3,\)"):
            matrix(torch.randn(3), ["a"] * 3)
    with pytest.raises(ValueError, match=r"float32 and shape \(3,\)"):
        mode_entropy(torch.ones(3), ["a"] * 3)
    with pytest.raises(ValueError, match=r"int64 and shape \(3, 1\)"):
        mode_entropy(torch.ones(3, 1, dtype=torch.int64), ["a"] * 3)


def vendi_from_the_definition(features: torch.Tensor) -> float:
    """Eq. 1 and sec. 3 of Friedman & Dieng 2023: the (n, n) kernel itself, and its eigenvalues."""
    kernel = torch.nn.functional.cosine_similarity(features[:, None].double(), features[None].double(), dim=-1)
    values = torch.linalg.eigvalsh(kernel / len(kernel)).tolist()
    return math.exp(-sum(value * math.log(value) for value in values if value > 1e-15))


@pytest.mark.parametrize(("count", "dim"), [(40, 6), (6, 40), (7, 7)])
def test_vendi_is_its_definition_with_features_of_any_length(count: int, dim: int):
    features = torch.randn(2 * count + 1, dim, generator=torch.Generator().manual_seed(0)) + 0.5
    groups = ["a", "b"] * count + ["alone"]
    scores = [vendi_from_the_definition(features[:-1][start::2]) for start in (0, 1)]
    assert vendi_score(features, groups) == pytest.approx(sum(scores) / 2, rel=1e-10)
    assert vendi_score(features * 7, groups) == pytest.approx(sum(scores) / 2, rel=1e-6)  # lengths do not matter; fp32 rounds


def test_vendi_counts_clusters():
    equal = torch.randn(5, generator=torch.Generator().manual_seed(1)).expand(300, 5)
    assert vendi_score(equal, ["a"] * 300) == pytest.approx(1, abs=1e-12)
    for k in (2, 5, 9):
        clusters = torch.eye(9, dtype=torch.float64)[:k].repeat_interleave(20, 0) * torch.arange(1, 20 * k + 1)[:, None]
        assert vendi_score(clusters, ["a"] * len(clusters)) == pytest.approx(k, abs=1e-10)
    # Two samples at an angle: eigenvalues (1 ± cos)/2.
    half = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    assert vendi_score(half, ["a", "a"]) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), abs=1e-12)


def test_blank_features_are_a_cluster_of_their_own():
    features = torch.zeros(6, 3)
    assert vendi_score(features, ["a"] * 6) == pytest.approx(1, abs=1e-12)
    features[:3] = torch.tensor([0.0, 2.0, 1.0])
    assert vendi_score(features, ["a"] * 6) == pytest.approx(2, abs=1e-12)


def test_mode_entropy_of_known_counts():
    assert mode_entropy(torch.full((8,), 3), ["a"] * 8) == 1
    assert mode_entropy(torch.arange(20) % 10, ["a"] * 20) == pytest.approx(10, abs=1e-12)
    assert mode_entropy(torch.tensor([7, 7, 7, 0]), ["a"] * 4) == pytest.approx(4 / 27**0.25, abs=1e-12)  # exp(H(3/4, 1/4))
    labels, groups = [1, 1, 2, 2, 2, 5, 5, 9, 9, 9, 4], list("abababababc")
    wanted = []
    for group in "ab":
        counts = Counter(label for label, g in zip(labels, groups, strict=True) if g == group)
        wanted.append(math.exp(-sum(c / counts.total() * math.log(c / counts.total()) for c in counts.values())))
    assert mode_entropy(torch.tensor(labels), groups) == pytest.approx(sum(wanted) / 2, abs=1e-12)


SCORES: list[Callable[[torch.Tensor, list[str]], float]] = [
    pairwise_distance,
    vendi_score,
    lambda features, groups: mode_entropy(features.argmax(1), groups),
]


@pytest.mark.parametrize("score", SCORES, ids=["distance", "vendi", "modes"])
def test_order_does_not_matter_and_groups_weigh_the_same(score: Callable[[torch.Tensor, list[str]], float]):
    generator = torch.Generator().manual_seed(2)
    features, groups = torch.randn(60, 5, generator=generator), ["small"] * 4 + ["large"] * 56
    small, large = score(features[:4], groups[:4]), score(features[4:], groups[4:])
    assert abs(small - large) > 0.1
    order = torch.randperm(60, generator=generator)
    for rows, names in ((features, groups), (features[order], [groups[i] for i in order.tolist()])):
        assert score(rows, names) == pytest.approx((small + large) / 2, rel=1e-10)
