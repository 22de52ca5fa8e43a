"""DINOv2 features against transformers' tiny model, with position embeddings interpolated as the original code does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clips import pictures, resources, with_code
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import normalize
from transformers import Dinov2Config, Dinov2Model

from fastgen.errors import UserError
from fastgen.evaluation.extractors.base import Pictures
from fastgen.evaluation.extractors.dinov2 import Dinov2, interpolated
from fastgen.evaluation.weights import Unavailable

FOLDER, SIDE = "dinov2-large", 5  # patches a side that the model was trained with
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 5e-6}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, with features of the order of 1 that every position matters to."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=14 * SIDE, patch_size=14))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder / FOLDER)
    return folder


def build(folder: Path | None, **options: Any) -> Dinov2:
    return Dinov2(Dinov2.Config(**options), resources(folder))


def features(extractor: Dinov2, pixels: Tensor) -> Tensor:
    return extractor(Pictures(pixels, ("",) * len(pixels)), ["cls"])["cls"]


def as_edm2(pixels: Tensor, size: int) -> Tensor:
    return interpolate(pixels.float(), size=(size, size), mode="bicubic", antialias=True)


def as_dgm_eval(pixels: Tensor, size: int) -> Tensor:
    resized = [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in pixels.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float()


@torch.no_grad()
def direct(folder: Path, resized: Tensor) -> Tensor:
    """The class token of pictures (B, 3, S, S) in [0, 255] by transformers' model with the interpolation of dinov2's `interpolate_pos_encoding`:
    by a scale factor that an offset of 0.1 is added to."""
    model = Dinov2Model.from_pretrained(folder / FOLDER).eval()
    known = model.embeddings.position_embeddings

    def interpolate_pos_encoding(embeddings: Tensor, height: int, width: int) -> Tensor:
        w0, h0 = width // 14, height // 14
        if (w0, h0) == (SIDE, SIDE):
            return known
        factors = ((h0 + 0.1) / SIDE, (w0 + 0.1) / SIDE)
        grid = interpolate(known[:, 1:].reshape(1, SIDE, SIDE, -1).permute(0, 3, 1, 2), scale_factor=factors, mode="bicubic", antialias=False)
        assert grid.shape[-2:] == (h0, w0)
        return torch.cat((known[:, :1], grid.permute(0, 2, 3, 1).reshape(1, h0 * w0, -1)), dim=1)

    model.embeddings.interpolate_pos_encoding = interpolate_pos_encoding  # type: ignore[method-assign]
    values = normalize(resized / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return model(values).last_hidden_state[:, 0]


@pytest.mark.parametrize("resize", ["torch", "pil"])
@pytest.mark.parametrize("size", [14 * SIDE, 42, 112, 224])
def test_class_tokens(weights: Path, size: int, resize: str) -> None:
    pixels = pictures(3, 90, 61)
    found = features(build(weights, size=size, resize=resize), pixels)
    resized = {"torch": as_edm2, "pil": as_dgm_eval}[resize](pixels, size)
    torch.testing.assert_close(found, direct(weights, resized), **CLOSE)


def test_the_default_is_edm2s(weights: Path) -> None:
    pixels = pictures(2, 64, 64)
    found = features(build(weights), pixels)
    torch.testing.assert_close(found, direct(weights, as_edm2(pixels, 224)), **CLOSE)
    assert (found - features(build(weights, resize="pil"), pixels)).abs().max() > 1e-4


def test_interpolation_is_not_that_of_transformers(weights: Path) -> None:
    model = Dinov2Model.from_pretrained(weights / FOLDER)
    known = model.embeddings.position_embeddings.detach()
    by_size = model.embeddings.interpolate_pos_encoding(torch.empty(1, 1 + 64, 32), 112, 112).detach()
    found = interpolated(known, 8)
    assert found.shape == by_size.shape and torch.equal(found[:, 0], known[:, 0])
    assert (found - by_size).abs().max() > 1e-3
    assert interpolated(known, SIDE) is known


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_rows_do_not_depend_on_the_other_pictures(weights: Path, batch: int) -> None:
    extractor, pixels = build(weights, size=42), pictures(5)
    parts = torch.cat([features(extractor, pixels[start : start + batch]) for start in range(0, 5, batch)])
    torch.testing.assert_close(parts, features(extractor, pixels), **CLOSE)


def test_what_is_missing_is_one_line(weights: Path, tmp_path: Path) -> None:
    address = "https://huggingface.co/facebook/dinov2-large"
    with pytest.raises(Unavailable) as folder:
        build(tmp_path)
    assert str(folder.value) == f"needs the folder dinov2-large, which is not in {str(tmp_path)!r}: get it from {address} and put it there"
    shutil.copytree(weights / FOLDER, tmp_path / FOLDER)
    (tmp_path / FOLDER / "model.safetensors").unlink()
    with pytest.raises(Unavailable) as file:
        build(tmp_path)
    assert str(file.value) == f"needs dinov2-large/model.safetensors, which is not in {str(tmp_path)!r}: get it from {address} and put it there"
    with pytest.raises(Unavailable, match=rf"^needs dinov2-large from {address}: put it into a folder .* --weights-dir \(recipe key"):
        build(None)


def test_weights_that_are_not_all_there_are_refused(weights: Path, tmp_path: Path) -> None:
    """transformers would draw them at random."""
    shutil.copytree(weights / FOLDER, tmp_path / FOLDER)
    path = tmp_path / FOLDER / "model.safetensors"
    tensors = load_file(path)
    del tensors["layernorm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    extractor = build(tmp_path)
    assert extractor.hash != build(weights).hash
    with pytest.raises(UserError, match=r"^cannot read '.*model.safetensors': 1 of the model's weights are not in it, such as layernorm.weight$"):
        features(extractor, pictures(1))


def test_no_code_of_the_folder_runs_and_nobody_is_asked(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(weights / FOLDER, tmp_path / FOLDER)
    seen = with_code(tmp_path / FOLDER, monkeypatch)
    assert torch.equal(features(build(tmp_path), pictures(2)), features(build(weights), pictures(2)))
    assert seen == []
