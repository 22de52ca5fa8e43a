"""LPIPS between pictures of one prompt, against the package's own call on each pair, with a backbone of random weights."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from fastgen import perceptual
from fastgen.evaluation.extractors import lpips as module
from fastgen.evaluation.extractors.base import Pictures, Resources
from fastgen.evaluation.extractors.lpips import Lpips
from fastgen.evaluation.weights import Unavailable, Weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with AlexNet's convolutions, random, under a name as torchvision's."""
    from torchvision.models import alexnet

    folder, generator = tmp_path_factory.mktemp("weights"), torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {f"features.{name}": each.shape for name, each in alexnet(weights=None).features.state_dict().items()}
    state = {name: torch.randn(shape, generator=generator) / max(1, shape[1:].numel()) ** 0.5 for name, shape in shapes.items()}
    torch.save(state, folder / "file")
    digest = hashlib.sha256((folder / "file").read_bytes()).hexdigest()
    return (folder / "file").rename(folder / f"alexnet-owt-{digest[:8]}.pth")


network_from = functools.cache(perceptual.network_from)


@pytest.fixture
def resources(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Resources:
    monkeypatch.setattr(module, "backbone_url", lambda net: f"https://download.pytorch.org/models/{weights.name}")
    monkeypatch.setattr(module, "network_from", network_from)
    return Resources(Weights(weights.parent))


def pictures(count: int, height: int, width: int, per_prompt: int, seed: int = 0) -> Pictures:
    pixels = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Pictures(pixels, ("a",) * count, per_prompt)


def expected(weights: Path, inputs: Tensor, per_prompt: int) -> Tensor:
    """The package's distance, a pair at a time."""
    network = network_from("alex", weights)
    rows = [[network(inputs[i : i + 1], inputs[j : j + 1]).item() for j in _group(i, per_prompt)] for i in range(len(inputs))]
    return torch.tensor(rows)


def _group(index: int, per_prompt: int) -> range:
    first = index // per_prompt * per_prompt
    return range(first, first + per_prompt)


def pairs(resources: Resources, given: Pictures, **options: Any) -> Tensor:
    return Lpips(Lpips.Config(**options), resources)(given, ["pairs"])["pairs"]


def test_each_pair_is_the_packages_distance(resources: Resources, weights: Path) -> None:
    given = pictures(6, 64, 80, 3)
    found = pairs(resources, given)
    assert (found.shape, found.dtype) == ((6, 3), torch.float32)
    torch.testing.assert_close(found, expected(weights, given.pixels / 127.5 - 1, 3), rtol=1e-4, atol=1e-7)
    assert (found[[0, 1, 2], [0, 1, 2]] == 0).all()
    assert (found[[0, 1, 2, 4], [1, 2, 0, 0]] > 1e-3).all()
    assert torch.equal(found[:3], found[:3].T)


def test_the_range_that_dmd2_feeds(resources: Resources, weights: Path) -> None:
    given = pictures(2, 64, 64, 2)
    unit = pairs(resources, given, range="unit")
    torch.testing.assert_close(unit, expected(weights, given.pixels / 255, 2), rtol=1e-4, atol=1e-7)
    assert (unit - pairs(resources, given)).abs().max() > 1e-4


def test_a_size_is_reached_by_pillows_lanczos_whatever_the_shape(resources: Resources, weights: Path) -> None:
    given = pictures(2, 90, 50, 2)
    small = [np.asarray(Image.fromarray(each.permute(1, 2, 0).numpy()).resize((72, 72), Image.Resampling.LANCZOS)) for each in given.pixels]
    inputs = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(pairs(resources, given, size=72), expected(weights, inputs, 2), rtol=1e-4, atol=1e-7)


def test_small_pictures_are_enlarged(resources: Resources, weights: Path) -> None:
    given = pictures(2, 8, 8, 2)
    inputs = 2 * interpolate(given.pixels / 255, size=(64, 64), mode="bilinear", align_corners=False) - 1
    torch.testing.assert_close(pairs(resources, given), expected(weights, inputs, 2), rtol=1e-4, atol=1e-7)


def test_a_group_does_not_depend_on_the_others(resources: Resources) -> None:
    given = pictures(6, 64, 64, 2)
    alone = [pairs(resources, Pictures(given.pixels[i : i + 2], ("a", "a"), 2)) for i in (0, 2, 4)]
    assert torch.equal(pairs(resources, given), torch.cat(alone))


def test_pictures_without_others_have_no_pairs(resources: Resources) -> None:
    assert torch.equal(pairs(resources, pictures(3, 64, 64, 1)), torch.zeros(3, 1))


def test_its_hash_is_that_of_both_files(resources: Resources, weights: Path) -> None:
    found = Lpips(Lpips.Config(), resources).hash
    assert found == Lpips(Lpips.Config(size=128), resources).hash
    assert found != Lpips(Lpips.Config(net="vgg"), resources).hash  # other heads on what passes here for the same backbone


def test_what_is_missing_is_one_line_before_any_picture_is_drawn(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = r"https://download\.pytorch\.org/models/alexnet-owt-7be5be79\.pth"
    with pytest.raises(Unavailable, match=rf"^needs alexnet-owt-7be5be79\.pth from {url}: put it into a folder .* --weights-dir \(recipe key"):
        Lpips(Lpips.Config(), Resources())
    with pytest.raises(Unavailable, match=r"^needs vgg16-397923af\.pth, which is not in '.*': get it from .*/vgg16-397923af\.pth and put it there$"):
        Lpips(Lpips.Config(net="vgg"), Resources(Weights(tmp_path)))
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(weights.read_bytes())
    with pytest.raises(Unavailable, match=rf"is not the file that is needed: its SHA-256 is [0-9a-f]{{64}}, not 7be5be79; get it from {url}$"):
        Lpips(Lpips.Config(), Resources(Weights(tmp_path)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"^needs the package lpips: pip install lpips$"):
        Lpips(Lpips.Config(), Resources())
