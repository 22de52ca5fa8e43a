"""The network against torch-fidelity's own with the same seeded random weights; resizing against Pillow and plain arithmetic."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from inception_weights import random_weights
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop

from fastgen.evaluation.extractors import inception
from fastgen.evaluation.extractors.base import Pictures, Resources
from fastgen.evaluation.extractors.inception import Inception, network_input, patch
from fastgen.evaluation.weights import Unavailable, Weights

pytest.importorskip("torch_fidelity")
CPU = torch.device("cpu")
LAYERS = ("pool3", "logits_unbiased", "spatial")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def sha256(folder: Path) -> str:
    return random_weights(folder / "random.pth")


def extractor(folder: Path | None, **options: object) -> Inception:
    return Inception(Inception.Config.model_validate(options), Resources(Weights(folder)))


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth ones with some noise, (N, 3, H, W) uint8, from black to white."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(rough, size=(height, width), mode="bicubic")
    return ((smooth + 0.1 * torch.randn(count, 3, height, width, generator=generator)) * 300 - 20).clamp(0, 255).to(torch.uint8)


def batch(pixels: Tensor, raw: list[Tensor] | None = None) -> Pictures:
    return Pictures(pixels, ("",) * len(pixels), raw=raw)


def test_layers_are_torch_fidelitys(folder: Path, sha256: str) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    names = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("theirs", names, feature_extractor_weights_path=str(folder / "random.pth")).double()
    theirs.feature_extractor_internal_dtype = torch.float64  # which torch-fidelity 0.4.0 has no working option for
    seen: list[Tensor] = []
    theirs.Mixed_6d.register_forward_hook(lambda _part, _inputs, output: seen.append(output))  # pyright: ignore[reportArgumentType]
    pixels = pictures(2, 37, 50)
    pool3, logits = theirs(pixels)
    ours = extractor(folder, weights="random.pth", sha256=sha256, dtype="fp64")(batch(pixels), LAYERS)
    assert {name: (each.shape, each.dtype) for name, each in ours.items()} == {
        "pool3": ((2, 2048), torch.float32),
        "logits_unbiased": ((2, 1008), torch.float32),
        "spatial": ((2, 2023), torch.float32),
    }
    torch.testing.assert_close(ours["pool3"], pool3, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours["logits_unbiased"], logits, rtol=1e-7, atol=1e-8)
    # Of the block's output the 1x1 branch is the first part; TensorFlow's channels come last.
    spatial = ours["spatial"].unflatten(1, (17, 17, 7)).permute(0, 3, 1, 2)
    torch.testing.assert_close(spatial, seen[0][:, :7].float(), rtol=1e-6, atol=1e-8)
    assert float(ours["pool3"].std(0).mean()) > 1e-3  # it sees the difference between two pictures


def test_formats_and_neighbours_do_not_matter(folder: Path, sha256: str) -> None:
    pixels = pictures(3, 31, 33)
    together = extractor(folder, weights="random.pth", sha256=sha256)(batch(pixels), LAYERS)
    safe = extractor(folder, weights="same.safetensors", sha256=random_weights(folder / "same.safetensors"))
    alone = safe(batch(pixels[1:2]), ("spatial", "pool3"))
    assert list(alone) == ["spatial", "pool3"]
    for name, rows in alone.items():
        torch.testing.assert_close(rows, together[name][1:2], rtol=1e-4, atol=1e-5)
    assert safe.hash != sha256


def test_a_cpu_sees_a_few_pictures_at_once(folder: Path, sha256: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By size, and of several sizes: rows are those of each few alone."""
    own = extractor(folder, weights="random.pth", sha256=sha256, crop=299)
    pixels, raw = pictures(3, 8, 8), [*pictures(2, 40, 30, seed=1), *pictures(1, 20, 50, seed=2)]
    parts = [own(batch(pixels[rows], raw[rows]), LAYERS) for rows in (slice(0, 2), slice(2, 3))]
    monkeypatch.setattr(inception, "_AT_ONCE", 2)
    found = own(batch(pixels, raw), LAYERS)
    for name in LAYERS:
        assert torch.equal(found[name], torch.cat([part[name] for part in parts]))


def test_tf1_is_bilinear_without_half_pixels() -> None:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    pixels = pictures(2, 40, 700)
    made = network_input(pixels, "tf1", CPU, torch.float64)
    theirs = interpolate_bilinear_2d_like_tensorflow1x(pixels.double(), size=(299, 299), align_corners=False)
    assert torch.equal(made, (theirs - 128) / 128)
    rows, columns = np.arange(299) * np.float32(40 / 299), np.arange(299) * np.float32(700 / 299)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = (rows - top)[:, None], columns - left
    x = pixels[1, 2].numpy().astype(float)
    below, beside = np.minimum(top + 1, 39), np.minimum(left + 1, 699)
    upper = x[top][:, left] * (1 - right) + x[top][:, beside] * right
    lower = x[below][:, left] * (1 - right) + x[below][:, beside] * right
    np.testing.assert_allclose(made[1, 2].numpy() * 128 + 128, upper * (1 - down) + lower * down, atol=1e-3)


def test_clean_is_pillows_bicubic_in_floats() -> None:
    pixels = pictures(2, 600, 450)
    pixels[0, :, ::7] = 255
    made = network_input(pixels, "clean", CPU, torch.float32) * 128 + 128
    for picture, own in zip(pixels, made, strict=True):
        for channel, result in zip(picture, own, strict=True):
            resized = Image.fromarray(channel.numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
            np.testing.assert_allclose(result.numpy(), np.asarray(resized).clip(0, 255), atol=1e-4)
    eight_bit = np.asarray(Image.fromarray(pixels[1].permute(1, 2, 0).numpy()).resize((299, 299), Image.Resampling.BICUBIC))
    difference = np.abs(made[1].permute(1, 2, 0).numpy() - eight_bit)
    assert 0.2 < difference.mean() < 0.3  # of rounding, a quarter; both passes of the 8-bit path round
    assert float((made - made.round()).abs().max()) > 0.4


def test_pytorch_fid_is_bilinear_with_half_pixels() -> None:
    pixels = pictures(1, 600, 450)
    made = network_input(pixels, "pytorch_fid", CPU, torch.float64)
    x = pixels[0, 1].numpy() / 255
    for row, column in ((0, 0), (17, 203), (298, 298)):
        y, z = max((row + 0.5) * 600 / 299 - 0.5, 0), max((column + 0.5) * 450 / 299 - 0.5, 0)
        top, left = int(y), int(z)
        below, beside, down, right = min(top + 1, 599), min(left + 1, 449), y - top, z - left
        upper, lower = (x[line, left] * (1 - right) + x[line, beside] * right for line in (top, below))
        assert float(made[0, 1, row, column]) == pytest.approx(2 * (upper * (1 - down) + lower * down) - 1, abs=1e-9)


def test_pictures_of_the_networks_size_are_not_resized() -> None:
    pixels = pictures(2, 299, 299)
    plain = (pixels.double() - 128) / 128
    assert torch.equal(network_input(pixels, "tf1", CPU, torch.float64), plain)
    assert torch.equal(network_input(pixels, "clean", CPU, torch.float64), plain)
    torch.testing.assert_close(network_input(pixels, "pytorch_fid", CPU, torch.float64), pixels / 127.5 - 1, rtol=0, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize(("height", "width"), [(299, 299), (512, 512), (1024, 1023), (300, 301), (302, 640)])
def test_patches_are_where_torchvision_crops(height: int, width: int) -> None:
    pixels = pictures(1, height, width)[0]
    assert torch.equal(patch(pixels), center_crop(pixels, [299, 299]))


def test_patches_are_of_pictures_as_they_were_drawn(folder: Path, sha256: str) -> None:
    large, wide, prepared = pictures(1, 320, 310)[0], pictures(1, 200, 400, 1)[0], pictures(2, 32, 32)
    options = {"weights": "random.pth", "sha256": sha256}
    cropping = extractor(folder, crop=299, resize="clean", **options)
    found = cropping(batch(prepared, [large, wide]), ("pool3", "cropped"))
    assert found["cropped"].tolist() == [[1], [0]]
    whole = extractor(folder, resize="clean", **options)
    parts = [whole(batch(each[None]), ("pool3",))["pool3"] for each in (patch(large), wide)]
    torch.testing.assert_close(found["pool3"], torch.cat(parts), rtol=1e-4, atol=1e-5)
    assert cropping(batch(prepared), ("cropped",))["cropped"].tolist() == [[0], [0]]


def test_missing_and_other_weights_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match=r"needs weights-inception-2015-12-05-6726825d\.pth .*--weights-dir"):
        extractor(None)
    with pytest.raises(Unavailable, match=r"get it from https://github\.com/toshas/torch-fidelity"):
        extractor(tmp_path)
    (tmp_path / inception.ALIAS).write_bytes(b"other")
    with pytest.raises(Unavailable, match=r"pt_inception.* is not the file that is needed: its SHA-256 is"):
        extractor(tmp_path)
    with pytest.raises(Unavailable, match=r"needs mine\.pth"):
        extractor(tmp_path, weights="mine.pth", sha256="0" * 64)
    monkeypatch.setattr(inception, "find_spec", lambda _name: None)
    with pytest.raises(Unavailable, match="pip install torch-fidelity"):
        extractor(tmp_path)


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("unpickled",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", ["trap", "trap as torch saves it", "text", "another network", "a list", "empty", "broken.safetensors"])
def test_files_that_hold_something_else_are_refused_and_not_run(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / (content if "." in content else "mine.pth")
    saved = {"another network": {"weight": torch.zeros(3)}, "a list": [torch.zeros(3)], "trap as torch saves it": {"a": Trap()}}
    if content in saved:
        torch.save(saved[content], path)
    else:
        path.write_bytes(pickle.dumps(Trap()) if content == "trap" else b"no weights at all" * (content != "empty"))
    with pytest.raises(Unavailable, match="does not hold the weights of FID's Inception network") as caught:
        extractor(tmp_path, weights=path.name, sha256=None)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert "unpickled" not in capsys.readouterr().out


def test_fids_own_weights_are_known_by_either_name(tmp_path: Path, sha256: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "SHA256", sha256)
    for name in (inception.ALIAS, inception.FILE):
        (tmp_path / name).symlink_to(folder / "random.pth")
        assert extractor(tmp_path).hash == sha256
