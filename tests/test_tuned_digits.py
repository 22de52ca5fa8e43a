"""The style of a LoRA on the bundled teacher goes into a student with one recipe key: thick strokes, as the share of ink in a picture.

The adapter is trained here by fastgen itself, flow matching on digits whose strokes are one pixel wider, and exported with `weights: lora`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pipelines import same_interpreter as same_interpreter
from torch import Tensor
from torch.nn.functional import max_pool2d

from fastgen import load_student, load_teacher, run
from fastgen.config import Recipe
from fastgen.data import digits
from fastgen.generator import read_manifest

torch.set_num_threads(1)
TEXTS = [text for label in range(10) for text in (digits.NAMED[0].format(digits.WORDS[label]), digits.GENERIC[label % 3])]


def thick(images: Tensor) -> Tensor:
    """Each pixel (N, 3, 8, 8) the brightest of itself and those above, left and above left of it: strokes one pixel wider."""
    return max_pool2d(images, 2, stride=1, padding=1)[..., :8, :8]


def ink(pictures: Tensor) -> float:
    """The mean of pictures (N, 3, 8, 8) in [0, 1]: black is 0, so the share of the picture that is stroke."""
    return pictures.mean().item()


def drawn_ink(generator: Any) -> float:
    return ink(generator(TEXTS * 2, list(range(2 * len(TEXTS)))))


def thick_folder(folder: Path) -> Path:
    """All bundled digits with thick strokes, captioned as the teacher's were."""
    folder.mkdir()
    images, labels = digits.load_images()
    rows = []
    for i, (image, label) in enumerate(zip(thick(images), labels.tolist(), strict=True)):
        Image.fromarray(((image[0] + 1) * 127.5).round().byte().numpy()).convert("RGB").save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": list(digits.captions(label))}))
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def style(root: Path, steps: int, *, lr: float = 2e-3, batch: int = 64) -> Path:
    """A run's folder of the adapter alone, which `teacher.lora` takes as it is."""
    block = {"name": "adamw", "lr": lr, "betas": [0.9, 0.99], "schedule": "cosine"}
    recipe = {
        "teacher": {"pretrained": "fastgen:digits", "guidance": 1.5},
        "student": {"steps": 25, "tune": {"lora": {"rank": 8}}},
        "distiller": {"name": "flow_matching", "drop": 0.1},
        "data": {"images": str(thick_folder(root / "thick"))},
        "optimizer": {"student": block},
        "train": {"steps": steps, "batch_size": batch, "ema": 0.9, "checkpoint_every": 0, "sample_every": 0, "device": "cpu"},
        "evaluate": {"protocol": None},
        "export": {"weights": "lora"},
    }
    (root / "style.yaml").write_text(json.dumps(recipe))
    return run.train(Recipe.load(root / "style.yaml"), root / "style") / "student"


def distilled(root: Path, lora: Path, overrides: Sequence[str]) -> Path:
    """`fastgen train digits_dmd2_1step teacher.lora=[…]`."""
    keys = [f"teacher.lora=[{{path: {lora}, weight: 1.0}}]", "evaluate.protocol=null", "train.device=cpu", "train.sample_every=0", *overrides]
    return run.train(Recipe.load("digits_dmd2_1step", keys), root / "run") / "student"


def shares(root: Path, lora: Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Ink of the teacher, of the tuned teacher and of its one-step student, which the run verifies."""
    folder = distilled(root, lora, overrides)
    assert [each["name"] for each in read_manifest(folder)["teacher"]["lora"]] == ["student"]
    tuned: dict[str, Any] = {"lora": [{"path": str(lora), "weight": 1.0}]}
    return {
        "teacher": drawn_ink(load_teacher("fastgen:digits", guidance=1.5)),
        "tuned": drawn_ink(load_teacher("fastgen:digits", guidance=1.5, **tuned)),
        "student": drawn_ink(load_student(folder)),
    }


def test_thick_digits_have_more_ink() -> None:
    images, _ = digits.load_images()
    plain, wide = (ink((each + 1) / 2) for each in (images, thick(images)))
    assert abs(plain - 0.3053) < 1e-3 and abs(wide - 0.5140) < 1e-3
    assert (thick(images) >= images).all()


@pytest.mark.usefixtures("same_interpreter")
def test_a_few_steps_begin_where_the_tuned_teacher_is(tmp_path: Path) -> None:
    found = shares(tmp_path, style(tmp_path, 40, lr=1e-2, batch=32), ["train.steps=4", "train.batch_size=16"])
    assert found["tuned"] > found["teacher"] + 0.1, found
    assert found["student"] > found["teacher"] + 0.6 * (found["tuned"] - found["teacher"]), found


@pytest.mark.slow
def test_a_student_carries_the_style_of_its_teachers_adapter(tmp_path: Path) -> None:
    found = shares(tmp_path, style(tmp_path, 400))
    assert found["tuned"] > found["teacher"] + 0.12, found
    assert abs(found["student"] - found["tuned"]) < 0.3 * (found["tuned"] - found["teacher"]), found
