"""Pictures that a run leaves out: said by the dry run and by the run, without their captions, and the same when it is resumed."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import sd3_folder as sd3_folder

from fastgen import inputs, run
from fastgen.config import Recipe, validate
from fastgen.data.encoded import Keeping
from fastgen.data.images import load_images
from fastgen.data.training import prepare
from fastgen.errors import UserError
from fastgen.families.sd3 import SD3
from fastgen.outlook import dry_run
from fastgen.plan import plan
from fastgen.progress import Progress
from fastgen.report import write_report


class Heard(Progress):
    """What a run warns of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """0 and 2 are whole, 1 ends early, 3 is not there."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:2000])
    rows = [{"file_name": f"{i}.png", "caption": f"{i}"} for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipe(teacher: Path, pictures: Path, **data: Any) -> Recipe:
    content = {
        "teacher": {"pretrained": str(teacher)},
        "student": {"steps": 1},
        "distiller": {"name": "flow_matching"},
        "data": {"images": str(pictures), "caption_key": "caption", "skip_broken": True, **data},
        "optimizer": {"student": {"lr": 1e-3}},
        "train": {"steps": 2, "batch_size": 2, "checkpoint_every": 1, "sample_every": 0, "device": "cpu"},
    }
    return validate(Recipe, content)


def test_latents_and_captions_are_those_of_the_pictures_that_are_left(sd3_folder: Path, pictures: Path) -> None:
    family, warned = SD3(sd3_folder, max_sequence_length=16, resolution=24), []
    keep = Keeping(torch.device("cpu"))
    data = prepare(family, None, load_images(str(pictures), caption_key="caption", skip_broken=True), keep, warn=warned.append)
    (warning,) = warned
    assert warning.startswith(f"recipe key data.images: 1 of 3 pictures are left out, such as: '{pictures}/1.png' is not an image")
    (pictures / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "0"}\n{"file_name": "2.png", "text": "2"}')
    whole = prepare(family, None, load_images(str(pictures)), keep)
    assert data.latents is not None and whole.latents is not None
    two = torch.arange(2)
    torch.testing.assert_close(data.latents.select(two), whole.latents.select(two), rtol=0, atol=1e-6)
    assert data.captions is not None
    assert [[data.prompts[row] for row in rows] for rows, _ in data.captions] == [["0"], ["2"]]


def test_a_run_says_what_it_leaves_out_and_goes_on_with_the_same(sd3_folder: Path, pictures: Path, tmp_path: Path) -> None:
    given = recipe(sd3_folder, pictures)
    listed = f"recipe key data.images: 1 of 4 pictures are left out, such as: '{pictures}/metadata.jsonl' line 4: no file '{pictures}/3.png'"
    assert dry_run(given)["warnings"] == [listed]
    heard = Heard()
    run_dir = run.train(given, tmp_path / "run", only="train", progress=heard)
    assert heard.warnings[0] == f"warning: {listed}"
    assert heard.warnings[1].startswith(f"warning: recipe key data.images: 1 of 3 pictures are left out, such as: '{pictures}/1.png' ")
    page = html.unescape(write_report(run_dir).read_text(encoding="utf-8"))
    assert "Warning: recipe key data.images: 1 of 4 pictures are left out, such as: 'metadata.jsonl' line 4: no file '3.png'" in page
    assert "Warning: recipe key data.images: 1 of 3 pictures are left out, such as: '1.png' is not an image" in page
    inputs.check_same(run_dir, plan(given, only="train"), None)
    Image.new("RGB", (4, 4)).save(pictures / "1.png")
    with pytest.raises(UserError, match=rf"data\.images: '{pictures}' has changed since the run began"):
        inputs.check_same(run_dir, plan(given, only="train"), None)


def test_a_run_that_is_not_to_skip_them_ends_before_training(sd3_folder: Path, pictures: Path, tmp_path: Path) -> None:
    given = recipe(sd3_folder, pictures, skip_broken=False)
    with pytest.raises(UserError, match=rf"line 4: no file '{pictures}/3\.png'; data\.skip_broken: true"):
        dry_run(given)
    (pictures / "3.png").write_bytes((pictures / "2.png").read_bytes())
    with pytest.raises(UserError, match=rf"'{pictures}/1\.png' is not an image that can be read \(.*\); data\.skip_broken: true"):
        run.train(given, tmp_path / "run", only="train")
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_keys_that_change_no_picture_may_change_between_a_run_and_its_continuation(sd3_folder: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "metadata.jsonl").write_text('{"file_name": "0.png", "caption": "0", "text": "0"}')
    run_dir = run.train(recipe(sd3_folder, pictures), tmp_path / "run", only="train")
    inputs.check_same(run_dir, plan(recipe(sd3_folder, pictures, caption_key="text", skip_broken=False), only="train"), None)
