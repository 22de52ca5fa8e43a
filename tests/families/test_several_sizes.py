"""Students of several sizes: each size has its own noise, grid and shift, and plain diffusers draws each as we do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import PROMPTS, recipe
from pipelines import tiny_sd3, verifying_here
from tiny_flux import tiny_flux
from tiny_flux2 import tiny_flux2
from tiny_qwen import tiny_qwen
from tiny_sana import tiny_sana
from tiny_sdxl import tiny_sdxl

from fastgen import run
from fastgen.config import Recipe, validate
from fastgen.export import export_lora, export_student, verify
from fastgen.generator import load_student, read_manifest
from fastgen.plan import plan

TINY: dict[str, tuple[Callable[[], Any], dict[str, Any], list[list[int]]]] = {
    "flux": (tiny_flux, {"max_sequence_length": 20, "embedded_guidance": 2.5}, [[16, 16], [24, 16], [16, 32]]),
    "qwen_image": (tiny_qwen, {"max_sequence_length": 40}, [[32, 32], [32, 64]]),
    "flux2": (tiny_flux2, {"max_sequence_length": 40}, [[16, 16], [16, 32]]),
    "sd3": (tiny_sd3, {"max_sequence_length": 16}, [[16, 16], [12, 20]]),
    "sdxl": (tiny_sdxl, {}, [[16, 24], [24, 16]]),
    "sana": (tiny_sana, {"max_sequence_length": 18}, [[32, 32], [32, 64]]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def saved(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / "families" / family
        if not folder.exists():
            TINY[family][0]().save_pretrained(folder)
        return folder

    return saved


def sized(source: Path, family: str, method: str, folder: Path, *, lora: bool = False, **changes: Any) -> Recipe:
    """`cells.recipe` at the family's sizes; changes: by dotted key."""
    _, teacher, sizes = TINY[family]
    data = recipe(source, method, folder, lora=lora, prompts=PROMPTS, size=sizes[0], **teacher).dump()
    data["teacher"]["size"], data["student"]["sizes"] = None, sizes
    for key, value in changes.items():
        block, _, name = key.partition("__")
        data[block][name] = value
    return validate(Recipe, data)


@pytest.mark.parametrize(
    ("family", "method", "lora"),
    [("flux", "dmd2", True), ("qwen_image", "tbcm", False), ("flux2", "dmd2", False), ("sd3", "scm", False), ("sdxl", "lcm", False), ("sana", "dmd2", False)],
)
def test_plain_diffusers_draws_every_size(family: str, method: str, lora: bool, folders: Any, tmp_path: Path) -> None:
    from_pictures = method in ("lcm", "scm")
    read = sized(folders(family), family, method, tmp_path, lora=lora, train__batch_size=4, train__micro_batch=2, train__steps=6)
    if from_pictures:
        by_size(tmp_path / "images", TINY[family][2])
    running = run.build(plan(read), run.Progress())
    seen = set()
    for _ in range(6):
        running.trainer.train_step()
    output = tmp_path / "student"
    (export_lora if lora else export_student)(running.averaged(), running.plan.family, running.info(), output)
    with verifying_here():
        result = verify(output, seeds=(0, 1), teacher_dir=folders(family) if lora else None)
    print(family, result)
    assert result.passed and result.pictures == 2 * len(TINY[family][2])
    print(read_manifest(output)["sizes"])
    print((output / "README.md").read_text()[-900:])


def by_size(folder: Path, sizes: list[list[int]]) -> None:
    """Make pictures in a folder of captioned ones be of these sizes, in turn."""
    from PIL import Image

    for place, file in enumerate(sorted(folder.glob("*.png"))):
        height, width = sizes[place % len(sizes)]
        with Image.open(file) as image:
            image.resize((10 * width, 10 * height)).save(file)
