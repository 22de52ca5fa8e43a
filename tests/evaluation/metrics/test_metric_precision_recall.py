from __future__ import annotations

import pytest
import torch
from tables_at_hand import built, measure
from torch import Tensor

from fastgen.evaluation.metrics.base import Unavailable
from fastgen.evaluation.metrics.precision_recall import PrecisionRecall, share_within, squared_distances, squared_radii
from fastgen.evaluation.tables import Table


def features(n: int, d: int, seed: int, spread: float = 1) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


@pytest.mark.parametrize("k", [1, 3, 5])
def test_is_torch_fidelitys(k: int) -> None:
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    x, y = features(230, 5, 0, 0.8), features(170, 5, 1)
    theirs = prc.prc_features_to_metric(x, y, prc_neighborhood=k, verbose=False)
    values = measure(built(PrecisionRecall, k=k), {"pool3": x}, {"pool3": y})
    assert values["precision"].value == pytest.approx(theirs["precision"], abs=1e-6)  # theirs is rounded to fp32
    assert values["recall"].value == pytest.approx(theirs["recall"], abs=1e-6)
    assert 0.3 < values["recall"].value < values["precision"].value < 1


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_do_not_matter(block: int) -> None:
    x, y = features(50, 4, 2), features(64, 4, 3)
    distances = torch.cdist(y, y).square()
    torch.testing.assert_close(squared_radii(Table(y), 3, block), distances.kthvalue(4, dim=1).values)
    expected = (torch.cdist(x, y).square() <= distances.kthvalue(4, dim=1).values).any(1).double().mean()
    assert share_within(Table(x), Table(y), 3, block) == float(expected)


def test_pictures_lie_among_themselves_and_not_far_away() -> None:
    x = features(100, 300, 4).float() + 50
    x[40:50] = x[40]  # ten equal pictures, whose balls have no radius
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    same = measure(built(PrecisionRecall), {"pool3": x[order]}, {"pool3": x})
    assert (same["precision"].value, same["recall"].value) == (1, 1)
    assert share_within(Table(x[order]), Table(x), 3, 7) == 1
    far = measure(built(PrecisionRecall), {"pool3": x + 100}, {"pool3": x})
    assert (far["precision"].value, far["recall"].value) == (0, 0)


def test_a_collapsed_model_is_precise_and_recalls_little() -> None:
    real = features(300, 2, 5)
    values = measure(built(PrecisionRecall), {"pool3": features(300, 2, 6, 0.05)}, {"pool3": real})
    assert values["precision"].value > 0.95
    assert values["recall"].value < 0.2


def test_equal_rows_have_no_distance() -> None:
    x = (features(9, 2048, 7) + 3).float()
    squares = squared_distances(x, x.flip(0))
    assert int((squares == 0).sum()) == 9
    torch.testing.assert_close(squares, (x.double()[:, None] - x.double().flip(0)).square().sum(-1), rtol=1e-10, atol=0)


def test_neighbours_need_enough_of_both() -> None:
    with pytest.raises(Unavailable, match=r"at least 4 images \(k \+ 1\), got 3 generated and 9 real ones"):
        measure(built(PrecisionRecall), {"pool3": features(3, 2, 0)}, {"pool3": features(9, 2, 1)})
    metric = built(PrecisionRecall, weights="mine.pth", sha256="b" * 64)
    assert list(measure(metric, {"pool3": features(9, 2, 0)}, {"pool3": features(9, 2, 1)})) == [
        f"{each}_inception_bbbbbbbb" for each in ("precision", "recall")
    ]
