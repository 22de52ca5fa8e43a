"""`fastgen plan` of FLUX.1-dev, FLUX.2-dev and SDXL from their configurations: what they weigh, and that the shipped recipes fit where they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import real_sizes
from PIL import Image

from fastgen.config import Recipe
from fastgen.families import find_family
from fastgen.memory import held
from fastgen.plan import Plan, plan
from fastgen.roles import build_roles
from fastgen.room import need

GB = 10**9


def planned(name: str, configurations: Callable[[Path], Path], tmp_path: Path, *keys: str) -> Plan:
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo boats at sea", encoding="utf-8")
    source = configurations(tmp_path)
    return plan(Recipe.load(name, [f"teacher.pretrained={source}", f"data.prompts={tmp_path}/prompts.txt", *keys]), dry=True)


@pytest.mark.parametrize(
    ("name", "configurations", "parameters"),
    [("flux_dev_dmd2_4step_lora", real_sizes.flux_dev, 11_901_408_320), ("sdxl_dmd2_4step_lora", real_sizes.sdxl, 2_567_463_684)],
)
def test_a_base_under_adapters_is_its_published_parameters_in_half_precision(
    name: str, configurations: Callable[[Path], Path], parameters: int, tmp_path: Path
) -> None:
    found = planned(name, configurations, tmp_path)
    roles = build_roles(found.roles, found.family, found.family.load_backbone(meta=True), tuning=found.tuning, storage=found.storage)
    assert held(found, roles).frozen == pytest.approx(2 * parameters, rel=2e-3)  # biases and norms are in fp32


def test_flux2_dev_has_the_32_billion_parameters_that_it_is_published_with(tmp_path: Path) -> None:
    family = find_family(real_sizes.flux2_dev(tmp_path), planning=True, size=[512, 512])
    assert sum(value.numel() for value in family.load_backbone(meta=True).parameters()) == 32_223_281_152
    assert family.meta_conditioning(1)["encoder_hidden_states"].shape == (1, 512, 15360)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "configurations", "keys", "limit"),
    [
        ("flux_dev_dmd2_4step_lora", real_sizes.flux_dev, ("teacher.size=[1024, 1024]", "train.micro_batch=1"), 80 * GB),
        ("sdxl_dmd2_4step_lora", real_sizes.sdxl, (), 24 * GB),
        ("flux2_dev_dmd2_4step_lora", real_sizes.flux2_dev, (), 80 * GB),
    ],
)
def test_shipped_recipes_fit_where_they_say(
    name: str, configurations: Callable[[Path], Path], keys: tuple[str, ...], limit: int, tmp_path: Path
) -> None:
    assert need(planned(name, configurations, tmp_path, *keys)).peak < limit


@pytest.mark.parametrize(
    ("keys", "active", "tera"),
    [
        ((), 5_151_616_064, 49.61),  # what every layer costs with 512 text tokens, not the blocks' attention and feed-forward alone
        (
            (
                "student.moe.groups=[{of: transformer_blocks, size: 2, kept: 1}, {of: single_transformer_blocks, size: 3, kept: 2}]",
                "distiller.blocks=0.3",
            ),
            3_142_529_600,
            31.34,
        ),
    ],
)
def test_flux_with_experts_activates_what_its_recipe_says(keys: tuple[str, ...], active: int, tera: float, tmp_path: Path) -> None:
    found = planned("flux_dense2moe", real_sizes.flux_dev, tmp_path, *keys).sparse()
    assert found is not None
    assert (found["dense_parameters"], found["active_parameters"]) == (11_901_408_320, active)
    assert (round(found["dense_flops"] / 1e12, 2), round(found["flops"] / 1e12, 2)) == (74.38, tera)


def linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def sd35_medium_by_hand() -> tuple[int, int]:
    """(parameters, of which in hidden layers of feed-forward layers: weights and hidden biases), from what the model is published to be."""
    d, blocks, dual = 1536, 24, 13
    hidden = (2 * blocks - 1) * (2 * d * 4 * d + 4 * d)  # the last block has none for its text
    feed_forward = hidden + (2 * blocks - 1) * d
    modulation = dual * linear(d, 9 * d) + (blocks - dual) * linear(d, 6 * d) + (blocks - 1) * linear(d, 6 * d) + linear(d, 2 * d)
    attention = blocks * (7 * linear(d, d) + 4 * 64) + (blocks - 1) * linear(d, d) + dual * (4 * linear(d, d) + 2 * 64)
    embeds = linear(256, d) + linear(d, d) + linear(2048, d) + linear(d, d) + linear(4096, d) + linear(16 * 4, d)
    return feed_forward + modulation + attention + embeds + linear(d, 2 * d) + linear(d, 16 * 4), hidden


def test_sd35_medium_with_experts_is_what_its_recipe_says(tmp_path: Path) -> None:
    """The shipped recipe at 512 x 512: 32 x 32 tokens of the picture, and 24 + 256 of text (77 with a real tokenizer)."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (512, 512)).save(tmp_path / "images/a.png")
    (tmp_path / "images/a.txt").write_text("a red cat", encoding="utf-8")
    source = real_sizes.sd35_medium(tmp_path)
    made = plan(Recipe.load("sd35_dense2moe", [f"teacher.pretrained={source}", f"data.images={tmp_path}/images"]), dry=True)
    found, (ours, dense) = made.sparse(), made.accounts()
    all_of_it, hidden = sd35_medium_by_hand()
    routers, d, picture, text = 47 * 12 * 1536, 1536, 32 * 32, 24 + 256
    assert found is not None
    assert all_of_it == 2_243_171_520  # as published
    assert (found["layers"], found["dense_parameters"], found["parameters"]) == (47, all_of_it, all_of_it + routers)
    assert found["active_parameters"] == all_of_it + routers - hidden * 5 // 8
    tokens = 24 * picture + 23 * text
    assert dense["feed-forward"].flops == 2 * tokens * 2 * d * 4 * d
    assert ours["feed-forward"].flops == dense["feed-forward"].flops * 3 / 8
    assert ours["router"].flops == 2 * tokens * 12 * d
    products = 4 * d * (24 * (picture + text) ** 2 + 13 * picture**2)
    assert ours["attention products"].flops == dense["attention products"].flops == products
    projections = 2 * d * d * (24 * (4 * picture + 3 * text) + 23 * text + 13 * 4 * picture)
    assert ours["attention"].flops == dense["attention"].flops == projections
