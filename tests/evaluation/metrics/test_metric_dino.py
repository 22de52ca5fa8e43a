"""FD-DINOv2 and DINO diversity on hand-made features, against closed forms and plain loops."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from tiny_clips import by_hand, sample_set
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastgen.evaluation.extractors.base import feature
from fastgen.evaluation.frechet import FeatureStatistics, distance_with_interval, frechet_distance
from fastgen.evaluation.intervals import mean_interval
from fastgen.evaluation.metrics.base import Unavailable
from fastgen.evaluation.metrics.dino_diversity import CLS, DinoDiversity
from fastgen.evaluation.metrics.fd_dinov2 import FdDinov2
from fastgen.evaluation.tables import Table


class Real:
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def statistics(self, of: Any) -> FeatureStatistics:
        assert of.extractor == "dinov2"
        return FeatureStatistics.from_features(self.rows)


def rows(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def distance(made: Tensor, real: Tensor, **options: Any) -> float:
    metric = FdDinov2(FdDinov2.Config(**options), ["all"])
    of = feature("dinov2", "cls", resize=options.get("resize", "torch"))
    assert metric.needs().reference == (of,)
    (value,) = metric.measure(by_hand({of: made}, sample_set([""] * len(made)), reference=Real(real)))
    assert (value.name, value.n) == ("fd_dinov2", len(made))
    return value.value


def test_fd_of_a_shift_and_a_scale() -> None:
    """Of the same features times a, plus b: |b + (a - 1) m|² + (a - 1)² trace C."""
    real = rows(50, 6, 0).double()
    shift = torch.arange(6, dtype=torch.float64)
    made, centre = 1.5 * real + shift, real.mean(0)
    expected = (shift + 0.5 * centre).square().sum() + 0.25 * torch.cov(real.T).trace()
    assert distance(made, real) == pytest.approx(float(expected), rel=1e-10)
    assert distance(real, real, resize="pil") == pytest.approx(0, abs=1e-9)


def test_fd_has_the_interval_and_the_remark_of_fid() -> None:
    made, real, metric = rows(143, 6, 0), rows(200, 6, 1).double(), FdDinov2(FdDinov2.Config(), ["all"])
    seen = by_hand({CLS: made}, sample_set([""] * 143), reference=Real(real), seed=5)
    (value,) = metric.measure(seen)
    assert (value.value, value.interval) == distance_with_interval(Table(made), FeatureStatistics.from_features(real), seed=5)
    assert value.interval is not None and value.interval_over == "jackknife"
    assert value.remark == "biased upwards by fewer than 10000 images: compare equal counts only"
    assert metric.values(seen) == {"fd_dinov2": pytest.approx(value.value, rel=1e-12)}
    (few,) = metric.measure(by_hand({CLS: made[:19]}, sample_set([""] * 19), reference=Real(real)))
    assert few.interval is None and few.interval_over is None


def test_statistics_of_blocks_are_those_of_all() -> None:
    table = Table(rows(53, 5, 0) + 100)
    whole, parts = FeatureStatistics.from_features(table.read()), FeatureStatistics.from_blocks(table.blocks(7))
    assert parts.n == 53
    torch.testing.assert_close(parts.cov, whole.cov, rtol=1e-11, atol=0)
    assert frechet_distance(parts, whole) == pytest.approx(0, abs=1e-9)


def test_fd_needs_a_reference_of_the_same_features() -> None:
    with pytest.raises(Unavailable, match="the reference has 7 features a picture, DINOv2's have 6: it is of another extractor"):
        distance(rows(5, 6, 0), rows(5, 7, 1))
    with pytest.raises(Unavailable, match="two generated and two reference pictures or more, there are 1 and 5"):
        distance(rows(1, 6, 0), rows(5, 6, 1))
    with pytest.raises(Unavailable, match="needs reference pictures or statistics"):
        FdDinov2(FdDinov2.Config(), ["all"]).measure(by_hand({CLS: rows(2, 6, 0)}, sample_set([""] * 2)))


def test_one_network_makes_the_features_of_both() -> None:
    assert FdDinov2(FdDinov2.Config(), ["all"]).needs().generated == DinoDiversity(DinoDiversity.Config(), ["all"]).needs().generated


@pytest.mark.parametrize("size", [2, 3, 5])
def test_diversity_of_pairs(size: int) -> None:
    made, samples = rows(4 * size, 6, 0) + 0.5, sample_set([prompt for prompt in "pqrs" for _ in range(size)], size)
    pairs = [combinations(range(start, start + size), 2) for start in range(0, 4 * size, size)]
    means = torch.tensor(
        [torch.stack([1 - cosine_similarity(made[a].double(), made[b].double(), dim=0) for a, b in group]).mean() for group in pairs]
    )
    metric, seen = DinoDiversity(DinoDiversity.Config(), ["all"]), by_hand({CLS: made}, samples)
    (value,) = metric.measure(seen)
    expected = mean_interval(means)
    assert (value.name, value.n, value.std_over, value.interval_over) == ("dino_diversity", 4 * size, "prompts", "prompts")
    assert value.value == pytest.approx(expected.value, rel=1e-6) and value.std == pytest.approx(expected.std, rel=1e-5)
    assert value.interval == pytest.approx(expected.interval, rel=1e-5)
    assert float(metric.scores(seen)["dino_diversity"].mean()) == pytest.approx(value.value, rel=1e-12)


def test_a_prompt_that_comes_again_has_another_group_and_is_one_draw() -> None:
    """Pairs are those that lie side by side; the interval is over the two prompts."""
    made, samples = rows(8, 6, 0), sample_set(list("ppqqppqq"), 2)
    (value,) = DinoDiversity(DinoDiversity.Config(), ["all"]).measure(by_hand({CLS: made}, samples))
    pairs = 1 - cosine_similarity(made[0::2].double(), made[1::2].double())
    expected = mean_interval(torch.stack([pairs[[0, 2]].mean(), pairs[[1, 3]].mean()]))
    assert (value.value, value.std_over) == (pytest.approx(float(pairs.mean()), rel=1e-6), "prompts")
    assert value.interval == pytest.approx(expected.interval, rel=1e-5)


def test_diversity_of_equal_and_of_opposite_pictures() -> None:
    metric = DinoDiversity(DinoDiversity.Config(), ["all"])
    for other, expected in ((2.0, 0.0), (-1.0, 2.0)):
        one = rows(3, 6, 0)
        (value,) = metric.measure(by_hand({CLS: torch.stack([one, other * one], 1).flatten(0, 1)}, sample_set(list("ppqqrr"), 2)))
        assert value.value == pytest.approx(expected, abs=1e-7)


def test_diversity_needs_several_pictures_of_a_prompt() -> None:
    with pytest.raises(Unavailable, match="per_prompt: 2 or more"):
        DinoDiversity(DinoDiversity.Config(), ["all"]).measure(by_hand({CLS: rows(4, 6, 0)}, sample_set(["p"] * 4)))
