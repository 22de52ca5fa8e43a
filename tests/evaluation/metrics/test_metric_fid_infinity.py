from __future__ import annotations

import numpy as np
import pytest
import torch
from tables_at_hand import built, measure
from torch import Tensor

from fastgen.evaluation.frechet import FeatureStatistics
from fastgen.evaluation.metrics.base import Unavailable
from fastgen.evaluation.metrics.fid_infinity import FidInfinity, intercept, subset_distances, subset_sizes
from fastgen.evaluation.tables import Table


def unit(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_line_in_one_over_n_is_extrapolated_exactly() -> None:
    sizes = [100, 130, 700, 5000]
    assert intercept(sizes, [7.5 + 320 / size for size in sizes]) == pytest.approx(7.5, rel=1e-12)
    noisy = [7.5 + 320 / size + 0.1 * (-1) ** index for index, size in enumerate(sizes)]
    assert intercept(sizes, noisy) == pytest.approx(np.polyfit(1 / np.array(sizes), noisy, 1)[1], rel=1e-10)


def test_sizes_are_the_papers_for_its_number_of_images() -> None:
    assert subset_sizes(50_000, 15, 5000) == np.linspace(5000, 50_000, 15).astype("int32").tolist()
    assert subset_sizes(400, 3, 5000) == [200, 300, 400]


def test_subsets_are_drawn_anew_and_seeded() -> None:
    x, real = unit(60, 3, 0), FeatureStatistics(100, torch.zeros(3).double(), 99 * torch.eye(3).double())
    once = subset_distances(Table(x), real, [30, 30, 60], 4)
    assert once == subset_distances(Table(x), real, [30, 30, 60], 4)
    assert once[0] != once[1]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(4))[:30]
    covariance = torch.cov(x[order].T)
    expected = float(x[order].mean(0).square().sum() + (torch.linalg.eigvalsh(covariance).sqrt() - 1).square().sum())
    assert once[0] == pytest.approx(expected, rel=1e-9)


def test_the_bias_of_few_images_goes() -> None:
    # Of the reference's own distribution, N(0, 1) in 8 dimensions with exact real moments: the truth is 0, and the expected bias of N images
    # (d + d (d + 1) / 4) / N to first order, from the mean and the covariance.
    d, real = 8, {"pool3": exactly_unit(2000, 8)}
    fids, infinities = [], []
    for seed in range(40):
        rows = unit(400, d, seed)
        infinities.append(measure(built(FidInfinity, smallest=100, points=8), {"pool3": rows}, real, seed)["fid_infinity"].value)
        fids.append(subset_distances(Table(rows), exact(d), [400], 0)[0])
    bias = (d + d * (d + 1) / 4) / 400
    assert sum(fids) / 40 == pytest.approx(bias, rel=0.1)
    assert abs(sum(infinities) / 40) < 0.1 * bias


def exact(d: int) -> FeatureStatistics:
    return FeatureStatistics(1000, torch.zeros(d).double(), 999 * torch.eye(d).double())


def exactly_unit(n: int, d: int) -> Tensor:
    x = unit(n, d, 99)
    return torch.linalg.qr(x - x.mean(0)).Q * (n - 1) ** 0.5


def test_too_few_images_for_as_many_sizes() -> None:
    with pytest.raises(Unavailable, match="at least 30 images, got 29 generated ones"):
        measure(built(FidInfinity), {"pool3": unit(29, 2, 0)}, {"pool3": unit(50, 2, 1)})
    assert measure(built(FidInfinity), {"pool3": unit(30, 2, 0)}, {"pool3": unit(50, 2, 1)})["fid_infinity"].n == 30
