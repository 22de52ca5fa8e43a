"""Pictures in, numbers out, by torch-fidelity's own entry point and by ours, with the same random weights in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from inception_weights import random_weights
from tables_at_hand import built, measure
from torch import Tensor
from torch.utils.data import Dataset

from fastgen.evaluation.extractors.base import Pictures, Resources
from fastgen.evaluation.extractors.inception import Inception
from fastgen.evaluation.frechet import frechet_distance, table_statistics
from fastgen.evaluation.metrics.base import Metric, Value
from fastgen.evaluation.metrics.fid import Fid
from fastgen.evaluation.metrics.inception_score import InceptionScore
from fastgen.evaluation.metrics.kid import Kid
from fastgen.evaluation.metrics.precision_recall import PrecisionRecall
from fastgen.evaluation.tables import Table
from fastgen.evaluation.weights import Weights

pytestmark = pytest.mark.slow
fidelity = pytest.importorskip("torch_fidelity")
SEED, COUNT = 11, 24


class Images(Dataset):
    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]


def pictures(seed: int, contrast: float) -> Tensor:
    """(COUNT, 3, 48, 64) uint8: coarse colours, as unlike each other as random weights need to tell them apart."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(COUNT, 3, 5, 5, generator=generator) * contrast * torch.rand(COUNT, 1, 1, 1, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(48, 64), mode="bilinear")
    return (smooth * 60 + 128 + 40 * torch.randn(COUNT, 3, 1, 1, generator=generator)).clamp(0, 255).to(torch.uint8)


def theirs(generated: Tensor, real: Tensor, weights: Path) -> Mapping[str, float]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Float64(FeatureExtractorInceptionV3):
        """What their option "float64" says, which 0.4.0 takes for fp32; features come out in fp64, so that their arithmetic is."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.double()
            self.feature_extractor_internal_dtype = torch.float64

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(each.double() for each in super().forward(x))

    fidelity.register_feature_extractor("inception-float64", Float64)
    return fidelity.calculate_metrics(
        input1=Images(generated),
        input2=Images(real),
        feature_extractor="inception-float64",
        feature_extractor_weights_path=str(weights),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subsets=9,
        kid_subset_size=15,
        isc_splits=4,
        rng_seed=SEED,
        batch_size=8,
        cuda=False,
        cache=False,
        verbose=False,
    )


def test_the_same_pictures_give_the_same_numbers(tmp_path: Path) -> None:
    sha256 = random_weights(tmp_path / "random.pth")
    generated, real = pictures(10, 1.0), pictures(40, 4.0)
    options = {"weights": "random.pth", "sha256": sha256, "dtype": "fp64"}
    extractor = Inception(Inception.Config.model_validate(options), Resources(Weights(tmp_path)))
    layers = [extractor(Pictures(pixels, ("",) * COUNT), ("pool3", "logits_unbiased")) for pixels in (generated, real)]

    def ours(kind: type[Metric], **more: Any) -> list[Value]:
        return list(measure(built(kind, **options, **more), *layers, seed=SEED).values())

    expected = theirs(generated, real, tmp_path / "random.pth")
    (fid,), (kid,), (score,) = ours(Fid), ours(Kid, subsets=9, subset_size=15), ours(InceptionScore, splits=4)
    precision, recall = ours(PrecisionRecall)
    assert fid.name == f"fd_inception_{sha256[:8]}"
    assert fid.value == pytest.approx(nuclear_distance(*(each["pool3"] for each in layers)), rel=1e-9)
    # Theirs adds the roots of 2000 eigenvalues that are 0 but for rounding.
    assert fid.value == pytest.approx(expected["frechet_inception_distance"], rel=3e-5)
    assert kid.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert kid.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6)
    assert score.value == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert score.std == pytest.approx(expected["inception_score_std"], rel=1e-6)
    assert precision.value == pytest.approx(expected["precision"], abs=1e-6)
    assert recall.value == pytest.approx(expected["recall"], abs=1e-6)
    assert 0 < recall.value < 1 and 0 < precision.value <= 1


def nuclear_distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of fewer samples than features from their factors: tr (S1 S2)^1/2 is the nuclear norm of the factors' product."""
    a, b = ((each - each.mean(0)) / (len(each) - 1) ** 0.5 for each in (x.double(), y.double()))
    shift = (x.double().mean(0) - y.double().mean(0)).square().sum()
    return float(shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())


def test_fid_of_full_rank_is_torch_fidelitys() -> None:
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(3000, 2048, generator=generator).add(shift).relu() for shift in (-0.5, -0.3))
    statistics = [metric_fid.fid_features_to_statistics(each.double()) for each in (x, y)]
    expected = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    ours = frechet_distance(table_statistics(Table(y)), table_statistics(Table(x)))
    assert ours == pytest.approx(expected, rel=1e-6)
