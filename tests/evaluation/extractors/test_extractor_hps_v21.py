"""HPS v2.1's reader on a tiny CLIP in a checkpoint of the same form, against a direct computation."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from tiny_clips import MEAN, SIZE, STD, call, measured, pictures, resources, sample_set, text_embeddings, tiny_clip
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

from fastgen.errors import UserError
from fastgen.evaluation.extractors.base import Pictures
from fastgen.evaluation.extractors.hps_v21 import FILE, MODEL, HpsV21, padded
from fastgen.evaluation.metrics.hps_v21 import HpsV21 as Metric
from fastgen.evaluation.weights import Unavailable

PROMPTS = ("a red cat", "two boats at sea", "a red cat", "a small house")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.save({"state_dict": tiny_clip(seed=4).state_dict()}, folder / FILE)
    return folder


@torch.no_grad()
def direct(pixels: Tensor, antialias: bool = True) -> Tensor:
    """Cosines (B,) of pictures that are 32 wide after resizing and lower than that."""
    module, height = tiny_clip(seed=4), round(pixels.shape[2] * SIZE / pixels.shape[3])
    scaled = interpolate(pixels.float() / 255, size=(height, SIZE), mode="bicubic", antialias=antialias)
    black = pad(scaled, (0, 0, (SIZE - height) // 2, SIZE - height - (SIZE - height) // 2))
    images = module.encode_image((black - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    return (normalize(images, dim=1) * text_embeddings(module, PROMPTS)).sum(1)


@pytest.mark.parametrize("antialias", [True, False])
def test_scores(folder: Path, monkeypatch: pytest.MonkeyPatch, antialias: bool) -> None:
    call(monkeypatch, MODEL)
    pixels = pictures(4, 41, 96)
    extractor = HpsV21(HpsV21.Config(antialias=antialias), resources(folder))
    found = extractor(Pictures(pixels, PROMPTS), ["score"])["score"]
    assert found.shape == (4, 1)
    torch.testing.assert_close(found[:, 0], direct(pixels, antialias), rtol=0, atol=2e-6)
    assert (found[:, 0] - direct(pixels, not antialias)).abs().max() > 1e-4
    assert extractor.hash == hashlib.sha256((folder / FILE).read_bytes()).hexdigest()


@pytest.mark.parametrize(("scale", "decimals"), [(1.0, 1e-6), (100.0, 1e-4)])
def test_the_metric_is_their_mean(folder: Path, monkeypatch: pytest.MonkeyPatch, scale: float, decimals: float) -> None:
    call(monkeypatch, MODEL)
    metric, pixels = Metric(Metric.Config(scale=scale), ["all"], resources(folder)), pictures(4, 41, 96)
    (value,) = metric.measure(measured(metric, pixels, sample_set(PROMPTS)))
    assert (value.name, value.n, value.interval_over) == ("hps_v21", 4, "prompts")  # one of them twice
    assert value.value == pytest.approx(scale * float(direct(pixels).mean()), abs=decimals)


def test_high_wide_and_fitting_pictures() -> None:
    """The longer side fits, margins of an odd number have more below and to the right, and what fits is not resized."""
    white = torch.full((1, 3, 64, 38), 255, dtype=torch.uint8)
    found = padded(white, 32, antialias=True)[0, 0]
    inside = (slice(None), slice(6, 25))
    torch.testing.assert_close(found[inside], torch.ones(32, 19))
    found[inside] = 0
    assert not found.any()
    exact = pictures(1, 20, 32)
    assert torch.equal(padded(exact, 32, antialias=True)[..., 6:26, :], exact / 255)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as missing:
        HpsV21(HpsV21.Config(), resources(tmp_path))
    assert str(missing.value) == f"needs {FILE}, which is not in {str(tmp_path)!r}: get it from https://huggingface.co/xswu/HPSv2 and put it there"


class Anything:
    """What only unpickling makes."""


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, MODEL)
    torch.save({"state_dict": tiny_clip().state_dict(), "more": Anything()}, tmp_path / FILE)
    extractor = HpsV21(HpsV21.Config(), resources(tmp_path))
    with pytest.raises(UserError, match=r"^cannot read '.*': it holds more than tensors, which is not unpickled$"):
        extractor(Pictures(pictures(1), ("",)), ["score"])
