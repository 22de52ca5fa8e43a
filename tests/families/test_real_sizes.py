"""`fastgen plan` of FLUX.1-dev, FLUX.2-dev and SDXL from their configurations: what they weigh, and that the shipped recipes fit where they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import real_sizes

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
