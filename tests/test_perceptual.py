"""LPIPS through the authors' package, on a random backbone (its weights are not here): the call's conventions, small pictures, gradients."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lpips
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision import models

from fastgen import perceptual
from fastgen.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:(The parameter 'pretrained'|Arguments other than a weight enum):UserWarning")


@pytest.fixture(scope="module")
def network() -> Any:
    """SqueezeNet's trunk, the smallest, random; the linear weights are the package's own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    perceptual.load_lpips.cache_clear()
    yield
    perceptual.load_lpips.cache_clear()


def pictures(*size: int, seed: int = 0, count: int = 2) -> Tensor:
    return torch.rand((count, 3, *size), generator=torch.Generator().manual_seed(seed))


def test_it_is_the_packages_own_call_on_pixels_from_minus_one_to_one(network: Any) -> None:
    a, b = pictures(64, 80), pictures(64, 80, seed=1)
    expected = network(2 * a - 1, 2 * b - 1)
    distance = perceptual.distance(network, a, b)
    assert distance.shape == (2,)
    assert torch.equal(distance, expected[:, 0, 0, 0])
    assert (distance > 1e-3).all()
    assert distance[0] != distance[1]
    assert (distance - network(a, b).flatten()).abs().min() > 1e-4, "the range must matter for this test to mean anything"


def test_a_picture_is_at_no_distance_from_itself_and_the_distance_is_symmetric(network: Any) -> None:
    a, b = pictures(64, 64), pictures(64, 64, seed=1)
    assert perceptual.distance(network, a, a).abs().max() <= 1e-9  # squares of rounding
    torch.testing.assert_close(perceptual.distance(network, a, b), perceptual.distance(network, b, a))
    near = (a + 0.02 * (b - a)).clamp(0, 1)
    assert (perceptual.distance(network, a, near) < perceptual.distance(network, a, b)).all()


@pytest.mark.parametrize(("size", "enlarged"), [((8, 8), (64, 64)), ((32, 48), (64, 96)), ((100, 16), (400, 64)), ((63, 63), (64, 64))])
def test_small_pictures_are_enlarged_to_64_pixels(network: Any, size: tuple[int, int], enlarged: tuple[int, int]) -> None:
    a, b = pictures(*size), pictures(*size, seed=1)
    large = [2 * interpolate(x, size=enlarged, mode="bilinear", align_corners=False) - 1 for x in (a, b)]
    assert torch.equal(perceptual.distance(network, a, b), network(*large).flatten())


def test_eight_pixels_are_too_few_for_vgg_itself_but_not_for_us() -> None:
    vgg = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    a, b = pictures(8, 8, count=1), pictures(8, 8, seed=1, count=1)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        vgg(a, b)
    assert perceptual.distance(vgg, a, b).item() > 0


def test_gradients_reach_both_pictures_and_no_weight(network: Any) -> None:
    a, b = pictures(8, 8).requires_grad_(), pictures(8, 8, seed=1).requires_grad_()
    perceptual.distance(network, a, b).sum().backward()
    for x in (a, b):
        assert x.grad is not None
        assert (x.grad != 0).double().mean() > 0.9
    assert all(parameter.grad is None for parameter in network.parameters())
    x, y = (pixels.detach().requires_grad_() for pixels in (a, b))
    enlarged = [2 * interpolate(pixels, size=(64, 64), mode="bilinear", align_corners=False) - 1 for pixels in (x, y)]
    for mine, theirs in zip((a.grad, b.grad), torch.autograd.grad(network(*enlarged).sum(), (x, y)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("net", "layers"), [("squeeze", 13), ("vgg", 30)])
def test_a_backbone_comes_from_torchvisions_file(net: str, layers: int, tmp_path: Path) -> None:
    """Its last features are those of torchvision's own layers, and the heads are the package's."""
    made = {"squeeze": models.squeezenet1_1, "vgg": models.vgg16}[net]
    with torch.device("meta"):
        features = made(weights=None).features[:layers]
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(each.shape, generator=generator) / each[0].numel() ** 0.5 for name, each in features.state_dict().items()}
    features.load_state_dict(state, assign=True)
    torch.save({"classifier.1.weight": torch.zeros(1), **{f"features.{name}": each for name, each in state.items()}}, tmp_path / "file.pth")
    before = torch.random.get_rng_state()
    loaded: Any = perceptual.network_from(net, tmp_path / "file.pth")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    x = pictures(64, 64, count=1)
    torch.testing.assert_close(loaded.net(x)[-1], features(x), rtol=1e-5, atol=1e-6)
    heads = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth", "cpu", weights_only=True)
    assert all(torch.equal(loaded.state_dict()[name], each) for name, each in heads.items())


def test_a_file_of_something_else_is_one_clear_line(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"cannot read '.*file\.pth': KeyError: 'features\.0\.weight'"):
        perceptual.network_from("squeeze", tmp_path / "file.pth")
    (tmp_path / "file.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"cannot read '.*file\.pth'"):
        perceptual.network_from("squeeze", tmp_path / "file.pth")


def test_all_pairs_at_once_are_each_pairs_distance(network: Any) -> None:
    x = 2 * pictures(64, 72, count=4) - 1
    found = perceptual.pairwise(network, x)
    wanted = torch.tensor([[network(x[i : i + 1], x[j : j + 1]).item() for j in range(4)] for i in range(4)], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    assert torch.equal(found, found.T)
    assert (found.diagonal() == 0).all()


def test_half_precision_pictures_are_compared_in_fp32(network: Any) -> None:
    a, b = pictures(64, 64).bfloat16(), pictures(64, 64, seed=1).bfloat16()
    assert torch.equal(perceptual.distance(network, a, b), perceptual.distance(network, a.float(), b.float()))


@pytest.mark.parametrize("shapes", [((2, 2), (2, 2)), ((2, 1, 8, 8), (2, 1, 8, 8)), ((2, 3, 8, 8), (1, 3, 8, 8)), ((2, 3, 4, 8, 8), (2, 3, 4, 8, 8))])
def test_what_is_no_pair_of_pictures_is_refused(network: Any, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(UserError, match=r"recipe key distiller\.regression\.metric: lpips compares pictures \(B, 3, H, W\), not .*another metric"):
        perceptual.distance(network, torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_loading_freezes_and_happens_once(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Module] = []

    def offline(**options: Any) -> nn.Module:
        assert options == {"net": "squeeze", "verbose": False}
        made.append(lpips_class(net="squeeze", pnet_rand=True, verbose=False).train().requires_grad_(True))
        return made[-1]

    lpips_class = lpips.LPIPS
    monkeypatch.setattr(lpips, "LPIPS", offline)
    loaded = perceptual.load_lpips("squeeze")
    assert perceptual.load_lpips("squeeze") is loaded
    assert len(made) == 1
    assert not made[0].training
    assert not any(parameter.requires_grad for parameter in made[0].parameters())
    a, b = pictures(64, 64), pictures(64, 64, seed=1)
    assert torch.equal(loaded(a, b), perceptual.distance(made[0], a, b))


@pytest.mark.parametrize("failure", [OSError("no route to host"), RuntimeError("invalid hash value")])
def test_weights_that_cannot_be_had_are_one_clear_line(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        print("Downloading: https://…")
        sys.stderr.write("Downloading: https://…")
        raise failure

    monkeypatch.setattr("torchvision.models.vgg.load_state_dict_from_url", fail, raising=False)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(
        UserError, match=rf"recipe key distiller\.regression\.metric: cannot get the vgg weights of lpips .*\({failure}\); other metrics"
    ):
        perceptual.load_lpips()
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "lpips":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UserError, match=r"recipe key distiller\.regression\.metric: lpips needs the package .*pip install lpips.*other metrics do not"
    ):
        perceptual.load_lpips()
