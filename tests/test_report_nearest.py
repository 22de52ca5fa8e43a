"""The nearest training picture to each sample, by values that are known, and a plain line where there is nothing to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from html_pages import decoded
from PIL import Image

from fastgen import report_nearest
from fastgen.data.digits import load_images
from fastgen.pictures import picture_grid, save_png
from fastgen.report_nearest import Nearest, nearest_training

DIGITS = {"images": "fastgen:digits", "prompts": None}


def grid_of(path: Path, images: torch.Tensor, label: str = "student, 1 step") -> Path:
    save_png(picture_grid([("teacher, 25 steps", torch.zeros_like(images)), (label, images)]), path)
    return path


def found(data: dict[str, Any], samples: Path | None) -> Nearest:
    nearest = nearest_training(data, samples)
    assert isinstance(nearest, Nearest), nearest
    return nearest


def test_copies_of_training_pictures_are_found_and_named_close(tmp_path: Path) -> None:
    images = (load_images()[0] + 1) / 2
    nearest = found(DIGITS, grid_of(tmp_path / "a.png", images[[5, 700, 1500]]))
    assert [pair.distance for pair in nearest.pairs] == pytest.approx([0.0] * 3, abs=2e-3) and all(pair.close for pair in nearest.pairs)
    for pair in nearest.pairs:
        np.testing.assert_array_equal(np.asarray(decoded(pair.sample)), np.asarray(decoded(pair.nearest)))
    assert nearest.looked_at == nearest.total == len(images)


def test_distances_and_yardstick_are_those_of_a_plain_search(tmp_path: Path) -> None:
    images = (load_images()[0] + 1) / 2
    samples = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    nearest = found(DIGITS, grid_of(tmp_path / "a.png", samples))
    seen = (samples * 255 + 0.5).byte().float() / 255
    expected = [float(((images - each) ** 2).mean((1, 2, 3)).sqrt().min()) for each in seen]
    assert [pair.distance for pair in nearest.pairs] == pytest.approx(expected, abs=1e-4) and not any(pair.close for pair in nearest.pairs)
    own = []
    for index in torch.linspace(0, len(images) - 1, 500).round().long().tolist():
        distances = ((images - images[index]) ** 2).mean((1, 2, 3)).sqrt()
        distances[index] = torch.inf
        own.append(float(distances.min()))
    assert nearest.own == pytest.approx((float(np.median(own)), float(np.quantile(own, 0.05))), abs=2e-3)


def picture_folder(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir()
    for i, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text("a picture")
    return folder


def test_files_are_cut_reduced_and_thinned_as_training_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_nearest, "MOST", 4)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 96, 64, 3), np.uint8)  # portrait: the square in the middle is trained on
    folder = picture_folder(tmp_path / "images", pixels)
    (folder / "0004.png").write_bytes(b"broken")
    squares = torch.from_numpy(pixels[:, 16:80]).permute(0, 3, 1, 2).float() / 255
    data = {"images": str(folder), "prompts": None, "skip_broken": True}
    nearest = found(data, grid_of(tmp_path / "a.png", squares[[0, 6]]))
    assert (nearest.looked_at, nearest.total) == (4, 7)
    assert nearest.pairs[0].distance < 0.01 and decoded(nearest.pairs[0].nearest).size == (64, 64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompts": "fastgen:digits", "images": None}, "trained without pictures"),
        ({}, "trained without pictures"),
        ({"images": "/nowhere/at/all"}, "cannot be read any more"),
        ({"images": "fastgen:digits", "strange": 1}, "cannot be read any more"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_sentence(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    said = nearest_training(data, grid_of(tmp_path / "a.png", torch.rand(2, 3, 8, 8)))
    assert isinstance(said, str) and message in said and "nowhere" not in said


def test_samples_that_are_no_grid_are_said_to_be_none(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_text("no picture")
    for samples in (None, tmp_path / "plain.png", tmp_path / "broken.png", grid_of(tmp_path / "a.png", torch.rand(1, 3, 8, 8), "other")):
        assert "nothing can be compared" in str(nearest_training(DIGITS, samples))
