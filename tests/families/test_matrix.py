"""Every family with every method: README's matrix. A family is one line of FAMILIES; one cell of each runs by default, all with `-m slow`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cells import (
    METHODS,
    PROMPTS,
    apart,
    check_cell,
    check_experts,
    check_smaller,
    on_rounded_weights,
    pictures,
    recipe,
    rounding_products,
    texts,
    trained,
)
from pipelines import tiny_sd3
from plain_child import plain_child
from tiny_auraflow import tiny_auraflow
from tiny_chroma import tiny_chroma
from tiny_consistency import tiny_consistency
from tiny_ddpm import tiny_ddpm
from tiny_dit import tiny_dit
from tiny_flux import tiny_flux
from tiny_flux2 import tiny_flux2, tiny_flux2_dev
from tiny_lumina2 import tiny_lumina2
from tiny_parts import from_seed, stirred
from tiny_pixart import tiny_pixart
from tiny_prx import tiny_prx
from tiny_qwen import tiny_qwen
from tiny_sana import tiny_sana, tiny_sprint
from tiny_sd15 import tiny_sd15
from tiny_sdxl import tiny_sdxl
from tiny_wan import tiny_wan
from tiny_zimage import tiny_zimage

from benchmarks import family_lines
from fastgen.config import Recipe, shipped_recipes, validate
from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.plan import plan
from fastgen.run import dry_run
from fastgen.surgery.held import AS_LOADED, Storage


class Row(NamedTuple):
    """A tiny pipeline, what the recipe's teacher block says of it, the cell that runs by default, and methods that are refused, with why.
    recipes: what the names of shipped recipes for such a teacher begin with."""

    build: Callable[[], Any]
    teacher: dict[str, Any]
    default: tuple[str, str]
    prompts: list[str] = PROMPTS
    refused: Mapping[str, str] = {}
    recipes: tuple[str, ...] = ()


FAMILIES = {
    "sd3": Row(tiny_sd3, {"max_sequence_length": 16}, ("lcm", "full"), recipes=("sd35_",)),
    "sana": Row(tiny_sana, {"max_sequence_length": 18}, ("scm", "lora"), recipes=("sana_",)),
    "wan": Row(
        tiny_wan, {"size": [16, 16], "frames": 5, "max_sequence_length": 19}, ("dmd2", "lora"),
        refused={"lcm": r"^recipe key data\.images: the teacher makes videos"}, recipes=("wan21_",),
    ),
    "sd": Row(tiny_sd15, {}, ("tbcm", "lora"), recipes=("sd15_",)),
    "sd2": Row(lambda: tiny_sd15(prediction_type="v_prediction"), {"size": [24, 16]}, ("scm", "full")),
    "sdxl": Row(tiny_sdxl, {"size": [16, 24]}, ("dmd2", "lora"), recipes=("sdxl_",)),
    "pixart": Row(tiny_pixart, {"max_sequence_length": 22}, ("lcm", "lora")),
    "dit": Row(tiny_dit, {}, ("scm", "full"), prompts=["207", "7"]),
    "flux": Row(tiny_flux, {"size": [16, 16], "max_sequence_length": 20, "embedded_guidance": 2.5}, ("dmd2", "lora"), recipes=("flux_",)),
    "qwen_image": Row(tiny_qwen, {"size": [32, 32], "max_sequence_length": 40}, ("tbcm", "full"), recipes=("qwen_image_",)),
    "z_image": Row(tiny_zimage, {"size": [16, 16], "max_sequence_length": 40}, ("scm", "full"), recipes=("z_image_",)),
    "auraflow": Row(tiny_auraflow, {"size": [16, 16], "max_sequence_length": 19}, ("scm", "lora")),
    "chroma": Row(tiny_chroma, {"size": [16, 16], "max_sequence_length": 20}, ("scm", "lora")),
    "lumina2": Row(tiny_lumina2, {"size": [32, 32], "max_sequence_length": 69}, ("lcm", "full")),
    "flux2": Row(tiny_flux2, {"size": [16, 16], "max_sequence_length": 40}, ("tbcm", "lora")),
    "flux2_dev": Row(
        tiny_flux2_dev, {"size": [16, 16], "max_sequence_length": 70, "embedded_guidance": 2.5}, ("dmd2", "lora"), recipes=("flux2_dev_",)
    ),
    "sana_sprint": Row(tiny_sprint, {"size": [32, 32], "max_sequence_length": 18, "embedded_guidance": 2.5}, ("dmd2", "lora")),
    "ddpm": Row(lambda: tiny_ddpm(prediction_type="epsilon"), {}, ("lcm", "full"), recipes=("ddpm_",)),
    "prx_pixel": Row(tiny_prx, {"size": [16, 16]}, ("dmd2", "full")),
    "consistency": Row(tiny_consistency, {}, ("dmd2", "full"), prompts=["3", "0"]),
}  # fmt: skip
CELLS = [
    (family, method, tuning) for family, row in FAMILIES.items() for method in METHODS if method not in row.refused for tuning in ("full", "lora")
]
DEFAULT = [(family, *row.default) for family, row in FAMILIES.items()]
RECIPES = [(family, name) for family, row in FAMILIES.items() for name in shipped_recipes() if name.startswith(row.recipes)]


@pytest.fixture(scope="module")
def child() -> Iterator[Any]:
    with plain_child() as running:
        yield running


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def saved(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / "families" / family
        if not folder.exists():
            FAMILIES[family].build().save_pretrained(folder)
        return folder

    return saved


def run_cell(family: str, method: str, tuning: str, source: Path, tmp_path: Path, *, in_child: bool) -> None:
    row = FAMILIES[family]
    check_cell(source, method, tmp_path, lora=tuning == "lora", prompts=row.prompts, in_child=in_child, **row.teacher)


@pytest.mark.parametrize(("family", "method", "tuning"), DEFAULT)
def test_one_cell_of_a_family(family: str, method: str, tuning: str, folders: Any, tmp_path: Path) -> None:
    run_cell(family, method, tuning, folders(family), tmp_path, in_child=False)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method", "tuning"), [cell for cell in CELLS if cell not in DEFAULT])
def test_every_other_cell(family: str, method: str, tuning: str, folders: Any, tmp_path: Path, child: Any) -> None:
    run_cell(family, method, tuning, folders(family), tmp_path, in_child=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_outline_is_the_network_but_for_weights_that_are_read_in_parts(family: str, folders: Any) -> None:
    found = find_family(folders(family), **FAMILIES[family].teacher)
    made, whole = found.load_outline(), found.load_backbone()
    assert made is not None
    network, files = made
    own, buffers = dict(network.named_parameters()), dict(network.named_buffers())
    assert all(parameter.is_meta for parameter in own.values()) and buffers.keys() == dict(whole.named_buffers()).keys()
    assert all(torch.equal(buffers[name], buffer) and buffer.dtype == buffers[name].dtype for name, buffer in whole.named_buffers())
    assert [(n, p.shape, p.dtype) for n, p in own.items()] == [(n, p.shape, p.dtype) for n, p in whole.named_parameters()]
    half = {name: (len(parameter) + 1) // 2 for name, parameter in own.items()}
    first, rest = (dict(files.read(rows)) for rows in ({n: range(k) for n, k in half.items()}, {n: range(k, len(own[n])) for n, k in half.items()}))
    assert all(torch.equal(torch.cat([first[name], rest[name]]).float(), parameter) for name, parameter in whole.named_parameters())


UNETS = ("sd", "sd2", "sdxl", "ddpm", "consistency")
NO_SMALLER = {
    **dict.fromkeys(UNETS, r"UNet2D(Condition)?Model has no list of alike blocks"),
    "chroma": r"time_text_embed\.mod_proj of ChromaTransformer2DModel has rows for each of its blocks",
}


def deeper(pipeline: Any, blocks: int = 3) -> Any:
    """The pipeline with a new random network of so many blocks in each list."""
    network = pipeline.transformer
    config = {key: value for key, value in network.config.items() if key != "_use_default_values"}
    changes = {
        key: blocks for key in ("num_layers", "num_single_layers", "n_layers", "num_mmdit_layers", "num_single_dit_layers", "depth") if key in config
    }
    with from_seed(1):
        pipeline.register_modules(transformer=type(network).from_config(config | changes))
        return stirred(pipeline)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NO_SMALLER])
def test_a_smaller_student(family: str, tmp_path: Path) -> None:
    row, source = FAMILIES[family], tmp_path / "teacher"
    deeper(row.build()).save_pretrained(source)
    check_smaller(source, tmp_path, prompts=row.prompts, **row.teacher)


@pytest.mark.parametrize("family", NO_SMALLER)
@pytest.mark.parametrize("init", ["pruned", "random"])
def test_no_smaller_student_of_unets_or_where_tables_count_blocks(family: str, init: str, folders: Any, tmp_path: Path) -> None:
    data = recipe(folders(family), "dmd2", tmp_path, prompts=FAMILIES[family].prompts, **FAMILIES[family].teacher).dump()
    data["student"]["shrink"] = {"depth": 0.5, "init": init}
    with pytest.raises(UserError, match=rf"^recipe key student\.shrink: {NO_SMALLER[family]}"):
        plan(validate(Recipe, data))


NO_EXPERTS = {
    "sana": r"transformer_blocks\.0\.ff \(GLUMBConv\) convolves over space.*; student\.moe\.leave: \[transformer_blocks\.0\.ff\] leaves it dense$",
    "sana_sprint": r"transformer_blocks\.0\.ff \(GLUMBConv\) convolves over space.*; student\.moe\.leave: \[transformer_blocks\.0\.ff\] leaves",
    "ddpm": r"UNet2DModel has no feed-forward layer in its blocks that is not left dense",
    "consistency": r"UNet2DModel has no feed-forward layer in its blocks that is not left dense",
}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NO_EXPERTS])
def test_a_student_of_experts(family: str, folders: Any, tmp_path: Path) -> None:
    row, routed = FAMILIES[family], 1.0 if family == "z_image" else 0.25  # of 85 hidden neurons each of five experts takes a fifth
    check_experts(folders(family), tmp_path, {"experts": 4, "routed": routed, "active": 2}, prompts=row.prompts, **row.teacher)


def test_experts_of_double_blocks_beside_dense_single_ones(folders: Any, tmp_path: Path) -> None:
    row = FAMILIES["flux2"]
    experts = {"experts": 4, "routed": 0.25, "active": 2, "leave": ["to_qkv_mlp_proj"]}
    check_experts(folders("flux2"), tmp_path, experts, prompts=row.prompts, **row.teacher)


@pytest.mark.parametrize(("family", "said"), NO_EXPERTS.items())
def test_no_experts_of_layers_that_convolve_or_that_are_not_known(family: str, said: str, folders: Any, tmp_path: Path) -> None:
    data = recipe(folders(family), "dmd2", tmp_path, prompts=FAMILIES[family].prompts, **FAMILIES[family].teacher).dump()
    data["student"]["moe"] = {}
    with pytest.raises(UserError, match=rf"^recipe key student\.moe: {said}"):
        plan(validate(Recipe, data))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_computed_again_change_no_number(family: str, folders: Any, tmp_path: Path) -> None:
    row = FAMILIES[family]
    kept, again = (trained(folders(family), tmp_path / str(how), checkpointing=how, prompts=row.prompts, **row.teacher) for how in (False, True))
    assert kept.keys() == again.keys()
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_in_half_precision_is_near_the_same_weights_in_single(family: str, folders: Any) -> None:
    """In fp32 the same. Under autocast what autocast makes of whole weights, and as near to fp32 as the rounding of products lets be: how near
    that is depends on the network and on the processor (gradients 0.4 to 10 %), so the least is measured here. Autocast rounds what blocks hand
    on, too: measured, at most 2.2 times the least; Sana's attention divides by a sum of ReLUs, 3.9 times."""
    row = FAMILIES[family]

    def on(storage: Storage, autocast: torch.dtype | None) -> dict[str, torch.Tensor]:
        return on_rounded_weights(folders(family), row.prompts, storage=storage, autocast=autocast, **row.teacher)

    wide, mixed = on(AS_LOADED, None), on(AS_LOADED, torch.bfloat16)
    held, held_mixed = on(Storage("bf16"), None), on(Storage("bf16"), torch.bfloat16)
    with rounding_products():
        least = apart(on(AS_LOADED, None), wide)
    assert max(apart(held, wide).values()) < 1e-5
    near, far, factor = apart(held_mixed, mixed), apart(held_mixed, wide), 6 if family == "sana" else 3
    assert all(near[name] < 0.5 * least[name] and 0 < far[name] < factor * least[name] for name in least), (near, far, least)
    assert max(least["prediction"], far["prediction"]) < 0.03


@pytest.mark.parametrize(("family", "method"), [(family, method) for family, row in FAMILIES.items() for method in row.refused])
def test_cells_that_are_refused_say_why(family: str, method: str, folders: Any, tmp_path: Path) -> None:
    row = FAMILIES[family]
    with pytest.raises(UserError, match=row.refused[method]):
        plan(recipe(folders(family), method, tmp_path, prompts=row.prompts, **row.teacher))


UNTIMED = ("wan", "dit", "ddpm", "consistency")


@pytest.mark.parametrize("family", UNTIMED)
@pytest.mark.parametrize("grid", [[1.0, 0.5], [0.9, 0.3]])
def test_explicit_times_are_refused_where_the_call_takes_none(family: str, grid: list[float], folders: Any, tmp_path: Path) -> None:
    row = FAMILIES[family]
    data = recipe(folders(family), "dmd2", tmp_path, prompts=row.prompts, **row.teacher).dump()
    data["student"]["grid"] = grid
    said = r"^recipe key student\.grid: the call of \w+Pipeline takes no explicit times; remove it, or use auto$"
    for refuse in (lambda asked: plan(asked), lambda asked: dry_run(asked, tmp_path / "run")):
        with pytest.raises(UserError, match=said):
            refuse(validate(Recipe, data))


def test_those_are_all_whose_row_says_so() -> None:
    rows = [line.split(" | ") for line in family_lines.table().splitlines()[2:]]
    assert {row[1].strip("`").removesuffix(".py") for row in rows if row[8] == "–"} == set(UNTIMED)


@pytest.mark.parametrize(("family", "name"), RECIPES)
def test_a_shipped_recipe_is_planned_from_its_teachers_configurations(
    family: str, name: str, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgen.perceptual.load_lpips", lambda *_, **__: None)  # weights of torchvision's server
    row = FAMILIES[family]
    source = shutil.copytree(folders(family), tmp_path / "configurations", ignore=shutil.ignore_patterns("*.safetensors"))
    shipped = Recipe.load(name)
    here = {key: value for key, value in shipped.teacher.options.items() if key in ("shift", "embedded_guidance")} | row.teacher
    if shipped.student.sizes is not None:  # which say it, here near the tiny teacher's own
        height, width = here.pop("size")
    teacher = {"pretrained": str(source), "guidance": shipped.teacher.guidance, "negative_prompt": shipped.teacher.negative_prompt, **here}
    data: dict[str, Any] = {key: value if value is None else str(made(tmp_path, row.prompts)) for key, value, made in given(shipped)}
    if (pairs := shipped.data.pairs_asked) is not None:  # drawn by the tiny teacher, for those of the recipe's own are not here
        data |= {"pairs": pairs.model_dump(by_alias=True) | {"from": "teacher", "count": 8}}
    asked = shipped.dump() | {"teacher": teacher, "data": data}
    if (modulation := (asked["student"].get("moe") or {}).get("modulation")) is not None:
        modulation["rank"] = 4  # which the tiny network's layers have too
    if shipped.student.sizes is not None:
        asked["student"]["sizes"] = [[height, width], [height, 2 * width]]
    recipe = validate(Recipe, asked)
    outcome = dry_run(recipe, tmp_path / "run")
    assert len(outcome["grid"]) == shipped.student.steps
    assert outcome["roles"]["student"]["trains"] > 0
    assert any("holds configurations and no weights" in warning for warning in outcome["warnings"])
    with pytest.raises(UserError, match=r"^recipe key teacher\.pretrained: .* has no weights"):
        plan(recipe)


def given(shipped: Recipe) -> list[tuple[str, str | None, Callable[[Path, list[str]], Path]]]:
    """Each kind of data, whether a recipe names it, and what makes such data."""
    return [("prompts", shipped.data.prompts, texts), ("images", shipped.data.images, pictures)]


def test_every_recipe_is_planned_somewhere() -> None:
    elsewhere = {name for name in shipped_recipes() if name.startswith(("digits_", "scenes_"))}  # test_config.py
    assert {name for _, name in RECIPES} | elsewhere == set(shipped_recipes())


def test_readme_says_the_same() -> None:
    """Its table is written by benchmarks/family_lines.py, which a test holds to it."""
    files = {"sd2": "sd"}
    assert {(files.get(family, family), method) for family, row in FAMILIES.items() for method in row.refused} == set(family_lines.REFUSED)
    assert {files.get(family, family) for family in FAMILIES} == set(family_lines.family_files())
    assert tuple(METHODS) == family_lines.METHODS
