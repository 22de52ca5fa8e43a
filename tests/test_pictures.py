"""Grids hold each image's own pixels in the right place, at the right size, with legible captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.data.digits import load_images
from fastgen.errors import UserError
from fastgen.pictures import GAP, MARGIN, cells, picture_grid, picture_row, save_png, save_video


def pixels_of(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] as the 8-bit (H, W, 3) that is shown."""
    return (image * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).numpy()


def _blocks(grid: Image.Image, num_rows: int, num_columns: int, width: int, height: int) -> np.ndarray:
    """Pixels (rows, columns, height, width, 3), counted from the lower right corner."""
    pixels = np.asarray(grid)
    left = grid.width - MARGIN - num_columns * (width + GAP) + GAP
    top = grid.height - MARGIN - num_rows * (height + GAP) + GAP
    corner = pixels[top:, left:]
    ys, xs = range(0, num_rows * (height + GAP), height + GAP), range(0, num_columns * (width + GAP), width + GAP)
    return np.stack([np.stack([corner[y : y + height, x : x + width] for x in xs]) for y in ys])


def test_small_images_are_enlarged_by_a_whole_factor_and_stand_in_their_places() -> None:
    images = (load_images()[0][:6] + 1) / 2
    grid = picture_grid([("teacher, 25 steps", images[:3]), ("student", images[3:])], ["a handwritten seven", "an even digit", "any digit"])
    expected = (images * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).repeat_interleave(6, 1).repeat_interleave(6, 2)
    np.testing.assert_array_equal(_blocks(grid, 2, 3, 48, 48).reshape(6, 48, 48, 3), expected.numpy())


@pytest.mark.parametrize(
    ("given", "cell", "shown"),
    [
        ((5, 7), None, (35, 49)),
        ((48, 30), None, (48, 30)),
        ((200, 256), None, (200, 256)),
        ((512, 1024), None, (128, 256)),
        ((512, 1024), 512, (256, 512)),
        ((8, 8), 100, (104, 104)),
        ((2000, 1), None, (256, 1)),
    ],
)
def test_sizes(given: tuple[int, int], cell: int | None, shown: tuple[int, int]) -> None:
    grid = picture_grid([("", torch.full((2, 3, *given), 0.2))], cell=cell)
    assert (_blocks(grid, 1, 2, shown[1], shown[0]) == 51).all()
    assert grid.height == shown[0] + 2 * MARGIN
    left = grid.width - MARGIN - 2 * shown[1] - GAP
    assert (np.asarray(grid)[:, left - 1] == 255).all()


def test_large_images_are_reduced_with_antialiasing() -> None:
    stripes = (torch.arange(1024) % 2).float().expand(1, 3, 1024, 1024)
    block = _blocks(picture_grid([("", stripes)]), 1, 1, 256, 256)[..., 4:-4, :].astype(int)
    assert abs(block - 127).max() <= 1


def test_rows_of_different_length_and_values_outside_the_range() -> None:
    grid = picture_grid([("a", torch.full((3, 3, 48, 48), 2.0) * -1), ("b", torch.full((1, 3, 48, 48), 1.5))])
    blocks = _blocks(grid, 2, 3, 48, 48)
    assert (blocks[0] == 0).all() and (blocks[1] == 255).all()


def test_text_is_drawn_beside_and_above_and_long_captions_run_upwards() -> None:
    images = torch.zeros(2, 3, 48, 48)
    plain, short, long = (picture_grid([("student", images)], columns) for columns in (None, ["a", "b"], ["a drawing of the number three", "b"]))
    assert plain.height == 48 + 2 * MARGIN and plain.height < short.height < long.height - 100
    assert plain.width == short.width == long.width
    label, head = np.asarray(long)[-48 - MARGIN :, : -98 - MARGIN], np.asarray(long)[: -48 - MARGIN]
    assert label.min() < 100 and head.min() < 100


def test_a_caption_of_any_length_keeps_the_grid_in_bounds() -> None:
    for side in (48, 256):
        grid = picture_grid([("a very long label " * 20, torch.zeros(1, 3, side, side))], ["word " * 300])
        assert grid.width < side + 300 and grid.height < side + 350
        assert (_blocks(grid, 1, 1, side, side) == 0).all()


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], None, "0 rows"),
        ([("a", torch.zeros(0, 3, 8, 8))], None, "0 columns"),
        ([("a", torch.zeros(2, 3, 8, 8))], ["one"], "2 columns and 1 captions"),
        ([("a", torch.zeros(2, 1, 8, 8))], None, r"\(2, 1, 8, 8\)"),
        ([("a", torch.full((1, 3, 8, 8), float("nan")))], None, "NaN"),
    ],
)
def test_mistakes_are_refused(rows: list[tuple[str, torch.Tensor]], columns: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        picture_grid(rows, columns)


def test_the_images_of_a_saved_grid_are_found_again(tmp_path: Path) -> None:
    small, large = torch.rand(3, 3, 5, 7), torch.rand(2, 3, 300, 600)
    grid = picture_grid([("a", small), ("b", large), ("films", torch.rand(1, 3, 2, 8, 8))], ["x", "y", "z"])
    save_png(grid, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as read:
        found = cells(read)
    assert list(found) == ["a", "b"] and [image.size for image in found["b"]] == [(256, 128)] * 2
    expected = (small * 255 + 0.5).byte().permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in found["a"]]), expected)


@pytest.mark.parametrize(
    "text", ["{", "[]", "[1]", '[{"label": "a", "size": [8, 8], "boxes": [[0, 0, 99, 9]]}]', '[{"label": "a", "size": [], "boxes": []}]']
)
def test_a_grid_that_says_nothing_or_nonsense_has_no_cells(text: str) -> None:
    image = Image.new("RGB", (8, 8))
    assert cells(image) == {}
    image.info["fastgen:cells"] = text
    assert cells(image) == {}


def test_save_png_makes_the_folder_and_leaves_nothing_else_behind(tmp_path: Path) -> None:
    image = picture_grid([("a", torch.rand(1, 3, 8, 8))])
    path = tmp_path / "samples" / "step_000050.png"
    save_png(image, path)
    save_png(image, path)
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(image))


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    image = Image.new("RGB", (4, 4))
    save_png(image, path)
    before = path.read_bytes()

    def fail(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("fastgen.files.os.replace", fail)
    with pytest.raises(UserError, match="disk full"):
        save_png(image, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_any_text_is_a_label() -> None:
    """What cannot be seen is drawn as its escape."""
    images = torch.zeros(2, 3, 8, 8)
    given, escaped = ["a\x1b[31m $\\frac [b]\n\ud800", "\u202e猫"], ["a\\x1b[31m $\\frac [b] \\ud800", "\\u202e猫"]
    assert picture_grid([(given[0], images)], given).tobytes() == picture_grid([(escaped[0], images)], escaped).tobytes()


def test_a_video_is_a_film_strip_in_a_grid_and_in_a_row() -> None:
    videos = torch.rand((2, 3, 9, 4, 6), generator=torch.Generator().manual_seed(0))
    chosen = [0, 3, 5, 8]
    frames = [[pixels_of(videos[i, :, t]) for t in chosen] for i in range(2)]
    row = np.asarray(picture_row(videos))
    assert row.shape == (8, 24, 3)
    assert np.array_equal(row, np.concatenate([np.concatenate(line, 1) for line in frames]))
    strip = picture_row(videos[:1, :, chosen[:2]])
    assert np.array_equal(np.asarray(strip), np.concatenate(frames[0][:2], 1))
    grid = np.asarray(picture_grid([("teacher", videos)], cell=4))
    assert np.array_equal(grid[MARGIN : MARGIN + 4, -MARGIN - 24 : -MARGIN], np.concatenate(frames[1], 1))
    with pytest.raises(ValueError, match="NaN"):
        picture_row(torch.full((1, 3, 2, 4, 4), torch.nan))


def test_a_video_file_holds_every_frame_exactly(tmp_path: Path) -> None:
    videos = torch.rand((2, 3, 5, 16, 8), generator=torch.Generator().manual_seed(0))
    save_video(videos, tmp_path / "a.webp", 16)
    with Image.open(tmp_path / "a.webp") as file:
        moving: Any = file
        assert (moving.n_frames, moving.size) == (5, (16, 16))
        for t in range(5):
            moving.seek(t)
            expected = np.concatenate([pixels_of(videos[i, :, t]) for i in range(2)], 1)
            assert np.array_equal(np.asarray(moving.convert("RGB")), expected)
        assert moving.info["duration"] == 62
