from __future__ import annotations

import pytest
import torch
from tables_at_hand import built, measure
from torch import Tensor

from fastgen.evaluation.metrics.base import Unavailable
from fastgen.evaluation.metrics.inception_score import InceptionScore, score, split_scores
from fastgen.evaluation.tables import Table


def logits(n: int, classes: int, seed: int) -> Tensor:
    return torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(("n", "splits", "seed"), [(200, 10, 0), (97, 10, 2020), (97, 3, 5)])
def test_is_torch_fidelitys_in_the_same_order(n: int, splits: int, seed: int) -> None:
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    x = logits(n, 40, seed)
    theirs = isc.isc_features_to_metric(x, splits, True, seed)
    value = measure(built(InceptionScore, splits=splits), {"logits_unbiased": x}, seed=seed)["inception_score"]
    assert value.value == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert value.std == pytest.approx(theirs["inception_score_std"], rel=1e-8)
    assert (value.n, value.std_over) == (n, "splits")


def test_counts_the_classes_that_are_drawn_for_sure() -> None:
    sure = torch.eye(12)[:5].repeat(30, 1) * 1e3
    assert float(score(iter([sure]))) == pytest.approx(5, rel=1e-12)
    assert float(score(iter([torch.zeros(20, 12)]))) == pytest.approx(1, rel=1e-12)
    assert float(score(iter(sure.split(7)))) == pytest.approx(5, rel=1e-12)


def test_every_picture_is_in_one_split() -> None:
    x = logits(23, 6, 1)
    means = [float(each) for each in split_scores(Table(x), 23, 3)]
    assert means == pytest.approx([1] * 23, rel=1e-12)  # a picture alone is its own class
    halves = split_scores(Table(x), 2, 3)
    assert not torch.allclose(halves, split_scores(Table(x), 2, 4))


def test_splits_need_a_picture_each() -> None:
    with pytest.raises(Unavailable, match=r"at least 10 images \(one a split\), got 9 generated ones"):
        measure(built(InceptionScore), {"logits_unbiased": logits(9, 4, 0)})
    metric = built(InceptionScore, weights="mine.pth", sha256="c" * 64)
    assert list(measure(metric, {"logits_unbiased": logits(20, 4, 0)})) == ["score_inception_cccccccc"]
