from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from tables_at_hand import built, measure
from torch import Tensor

from fastgen.config import validate
from fastgen.errors import UserError
from fastgen.evaluation.frechet import FeatureStatistics, distance_from, distance_with_interval, frechet_distance, merged, table_statistics
from fastgen.evaluation.metrics.base import Unavailable
from fastgen.evaluation.metrics.fid import Fid
from fastgen.evaluation.metrics.patch_fid import PatchFid
from fastgen.evaluation.metrics.sfid import Sfid
from fastgen.evaluation.tables import Table


def samples(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + torch.randn(d, generator=generator) / 3


def with_moments(n: int, mean: Tensor, cov: Tensor, seed: int) -> Tensor:
    """(n, D) rows that have exactly this mean and unbiased covariance."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    white = torch.linalg.qr(x - x.mean(0)).Q * (n - 1) ** 0.5
    return white @ torch.linalg.cholesky(cov).T + mean


def test_is_torch_fidelitys() -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = samples(300, 24, 0), samples(250, 24, 1)
    theirs = fid.fid_statistics_to_metric(fid.fid_features_to_statistics(x), fid.fid_features_to_statistics(y), verbose=False)
    value = measure(built(Fid), {"pool3": x}, {"pool3": y})["fid"]
    assert value.value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    assert (value.n, value.interval_over) == (300, "jackknife")
    assert value.remark is not None and "fewer than 10000" in value.remark


def test_gaussians_have_the_closed_form_whatever_the_blocks() -> None:
    # Commuting covariances: |m1 - m2|² + sum (sqrt v1 - sqrt v2)². 9000 rows of 300 make two blocks of 16 MiB.
    q = torch.linalg.qr(torch.randn(300, 300, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    v1, v2 = torch.linspace(0.1, 2, 300).double(), torch.linspace(1, 0.5, 300).double()
    m1, m2 = torch.zeros(300).double(), torch.full((300,), 0.1).double()
    x, y = with_moments(9000, m1, q @ v1.diag() @ q.T, 3), with_moments(400, m2, q @ v2.diag() @ q.T, 4)
    assert len(list(Table(x).blocks())) == 2
    expected = float((m1 - m2).square().sum() + (v1.sqrt() - v2.sqrt()).square().sum())
    assert frechet_distance(table_statistics(Table(y)), table_statistics(Table(x))) == pytest.approx(expected, rel=1e-10)
    assert measure(built(Fid), {"pool3": x[:5000]}, {"pool3": x})["fid"].value > 0


def test_fewer_images_than_features() -> None:
    # tr (S1 S2)^1/2 is the nuclear norm of the product of the centred factors.
    x, y = samples(30, 100, 5), samples(40, 100, 6)
    a, b = (x - x.mean(0)) / 29**0.5, (y - y.mean(0)) / 39**0.5
    shift = (x.mean(0) - y.mean(0)).square().sum()
    expected = float(shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())
    value = measure(built(Fid), {"pool3": x}, {"pool3": y})["fid"]
    assert value.value == pytest.approx(expected, rel=1e-10)


def direct_distance(x: np.ndarray, y: np.ndarray) -> float:
    root = np.real(np.asarray(scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root))


def test_interval_is_the_jackknifes() -> None:
    x, y = samples(143, 6, 7), samples(200, 6, 8)
    value, interval = distance_with_interval(Table(x), table_statistics(Table(y)), seed=5)
    order = torch.randperm(143, generator=torch.Generator().manual_seed(5))
    kept = [x[torch.cat([order[start::10] for start in range(10) if start != group])].numpy() for group in range(10)]
    left_out = np.array([direct_distance(each, y.numpy()) for each in kept])
    half = scipy.stats.t.ppf(0.975, 9) * (0.9 * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5
    assert value == pytest.approx(direct_distance(x.numpy(), y.numpy()), rel=1e-9)
    assert interval == pytest.approx((value - half, value + half), rel=1e-6)
    assert distance_with_interval(Table(x), table_statistics(Table(y)), seed=5) == (value, interval)


def test_interval_covers_what_such_draws_average_to() -> None:
    real = FeatureStatistics(1000, torch.zeros(3).double(), torch.eye(3).double() * 999)
    draws = [distance_with_interval(Table(samples_of_unit(200, seed) * 1.2 + 0.3), real, seed) for seed in range(100)]
    mean = sum(value for value, _ in draws) / len(draws)
    covered = [interval[0] <= mean <= interval[1] for _, interval in draws if interval is not None]
    assert len(covered) == 100
    assert 0.9 <= sum(covered) / 100 <= 0.99


def samples_of_unit(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_few_images_have_no_interval_and_one_has_no_distance() -> None:
    x = samples(50, 4, 9)
    few = measure(built(Fid), {"pool3": x[:19]}, {"pool3": x})["fid"]
    assert few.interval is None and few.interval_over is None
    assert measure(built(Fid), {"pool3": x[:20]}, {"pool3": x})["fid"].interval is not None
    with pytest.raises(Unavailable, match="at least 2 images, got 1 generated and 50 real ones"):
        measure(built(Fid), {"pool3": x[:1]}, {"pool3": x})
    with pytest.raises(Unavailable, match="needs reference pictures"):
        measure(built(Fid), {"pool3": x})
    with pytest.raises(Unavailable, match="of 4 numbers a picture, the generated pictures' of 5"):
        measure(built(Fid), {"pool3": samples(50, 5, 9)}, {"pool3": x})


def test_only_fids_own_network_makes_a_fid() -> None:
    x, sha256 = samples(30, 4, 10), "0123456789abcdef" * 4
    metric = built(Fid, weights="mine.pth", sha256=sha256)
    assert list(measure(metric, {"pool3": x}, {"pool3": x})) == ["fd_inception_01234567"]
    (one,) = metric.needs().reference
    assert dict(one.options) == {"dtype": "fp32", "resize": "tf1", "sha256": sha256, "weights": "mine.pth"}
    for options in ({"weights": "mine.pth"}, {"sha256": sha256}, {"weights": "mine.pth", "sha256": "0123"}):
        with pytest.raises(UserError, match="sha256"):
            validate(Fid.Config, options, "metrics.fid", of="protocol")


def test_sfid_is_fid_of_the_spatial_layer() -> None:
    x, y = samples(60, 7, 11), samples(70, 7, 12)
    metric = built(Sfid, resize="pytorch_fid")
    value = measure(metric, {"spatial": x}, {"spatial": y})["sfid"]
    assert value.value == measure(built(Fid), {"pool3": x}, {"pool3": y})["fid"].value
    assert dict(metric.needs().reference[0].options) == {"dtype": "fp32", "resize": "pytorch_fid"}
    assert "unchecked" in metric.shows["sfid"].text


def test_patch_fid_needs_patches_of_the_generated_pictures() -> None:
    x, y = samples(60, 7, 13), samples(70, 7, 14)
    metric, patches = built(PatchFid), torch.ones(60, 1, dtype=torch.uint8)
    assert dict(metric.needs().reference[0].options) == {"crop": 299, "dtype": "fp32", "resize": "clean"}
    value = measure(metric, {"pool3": x, "cropped": patches}, {"pool3": y})["patch_fid"]
    assert value.value == measure(built(Fid), {"pool3": x}, {"pool3": y})["fid"].value
    patches[[3, 8]] = 0
    with pytest.raises(Unavailable, match="299x299 pixels or more, 2 of 60 are smaller"):
        measure(metric, {"pool3": x, "cropped": patches}, {"pool3": y})


def test_one_decomposition_serves_all_distances() -> None:
    a, b, c = (table_statistics(Table(samples(40, 5, seed))) for seed in (15, 16, 17))
    distance = distance_from(a)
    assert [distance(b), distance(c)] == [frechet_distance(a, b), frechet_distance(a, c)]
    with pytest.raises(ValueError, match="dimensions differ"):
        distance(table_statistics(Table(samples(9, 6, 18))))
    together = merged([a, b, c])
    assert together.n == 120
