"""Students of several sizes: each size has its own noise, grid and shift, and plain diffusers draws each as we do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import PROMPTS, recipe
from pipelines import tiny_sd3, verifying_here
from tiny_auraflow import tiny_auraflow
from tiny_chroma import tiny_chroma
from tiny_flux import tiny_flux
from tiny_flux2 import tiny_flux2
from tiny_lumina2 import tiny_lumina2
from tiny_qwen import tiny_qwen
from tiny_sana import tiny_sana
from tiny_sdxl import tiny_sdxl
from tiny_zimage import tiny_zimage

from fastgen import run
from fastgen.config import Recipe, validate
from fastgen.denoiser import Denoiser
from fastgen.export import export_lora, export_student, verify
from fastgen.families import find_family
from fastgen.families.flux import Flux
from fastgen.generator import read_manifest
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
    [
        ("flux", "dmd2", True),
        ("qwen_image", "tbcm", False),
        ("flux2", "dmd2", False),
        ("sd3", "scm", False),
        ("sdxl", "lcm", False),
        ("sana", "dmd2", False),
    ],
)
def test_plain_diffusers_draws_every_size(family: str, method: str, lora: bool, folders: Any, tmp_path: Path) -> None:
    sizes, from_pictures = TINY[family][2], method in ("lcm", "scm")
    read = sized(folders(family), family, method, tmp_path, lora=lora, train__batch_size=4, train__micro_batch=2, train__steps=2)
    if from_pictures:
        by_size(tmp_path / "images", sizes)
    running = run.build(plan(read), run.Progress())
    for _ in range(2):
        running.trainer.train_step()
    output = tmp_path / "student"
    (export_lora if lora else export_student)(running.averaged(), running.plan.family, running.info(), output)
    with verifying_here():
        result = verify(output, seeds=(0, 1), teacher_dir=folders(family) if lora else None)
    assert result.passed, result
    assert result.pictures == 2 * len(sizes)
    recorded = read_manifest(output)["sizes"]
    assert [each["size"] for each in recorded] == sizes == [[each["call"]["height"], each["call"]["width"]] for each in recorded]
    follows = len({tuple(each["grid"]) for each in recorded}) > 1
    assert follows == (family in ("flux", "qwen_image", "flux2"))
    card = (output / "README.md").read_text()
    assert all(f"`height={height}, width={width}`, at times" in card for height, width in sizes)
    assert ("shifts the times by the size" in card) == follows


def test_the_grid_of_a_size_is_its_own_shift() -> None:
    """FLUX.1's mu is linear in the tokens: 16 of them at 16x16 pixels, 24 at 24x16, between .4 at 10 and 1.3 at 90."""
    small, tall = Flux(tiny_flux(), size=[16, 16]).at_sizes([[16, 16], [24, 16]])
    for family, tokens in ((small, 16), (tall, 24)):
        shift = math.exp(0.4 + (tokens - 10) * 0.9 / 80)
        expected = [shift * u / (1 + (shift - 1) * u) for u in (1, 2 / 3, 1 / 3)]
        assert (family.grid(3) - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 1e-7
        assert family.shift == pytest.approx(shift, rel=1e-12)


@pytest.mark.parametrize("build", [tiny_flux2, tiny_zimage, tiny_auraflow, tiny_chroma, tiny_lumina2])
def test_features_are_the_pictures_own_tokens_at_every_size(build: Callable[[], Any]) -> None:
    """On a network that is called at one size after the other through one family, as a judge's is."""
    length = 69 if build is tiny_lumina2 else 19 if build is tiny_auraflow else 40
    family = find_family(build(), size=[32, 32], max_sequence_length=length)
    low = family.at_sizes([[32, 32], [16, 32]])[1]
    network, cond = Denoiser(family.load_backbone(), family), family.encode_prompts(PROMPTS)
    for each in (low, family):
        x = torch.randn(2, *each.latent.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            (feature,) = network(x, torch.full((2,), 0.4), cond, taps=[len(family.blocks(network.backbone)) - 1]).features
        assert feature.shape[:2] == (2, math.prod(each.latent.size) // (1 if build is tiny_flux2 else 4))


def by_size(folder: Path, sizes: list[list[int]]) -> None:
    """Make pictures in a folder of captioned ones be of these sizes, in turn."""
    from PIL import Image

    for place, file in enumerate(sorted(folder.glob("*.png"))):
        height, width = sizes[place % len(sizes)]
        with Image.open(file) as image:
            image.resize((10 * width, 10 * height)).save(file)
