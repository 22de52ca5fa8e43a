"""What would break a training late, a teacher's folder is refused for when it is found, by the recipe key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipelines import tiny_sd3
from tiny_dit import tiny_dit
from tiny_pixart import tiny_pixart
from tiny_qwen import tiny_qwen
from tiny_sdxl import tiny_sdxl
from tiny_wan import tiny_wan

from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.generator import load_teacher
from fastgen.plan import plan

BUILD: dict[str, Callable[[], Any]] = {
    "sd3": tiny_sd3, "sdxl": tiny_sdxl, "pixart": tiny_pixart, "wan": tiny_wan, "qwen": tiny_qwen, "dit": tiny_dit,
}  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def saved(name: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / "bad_teachers" / name
        if not folder.exists():
            BUILD[name]().save_pretrained(folder)
        return folder

    return saved


def edited(folder: Path, file: str, **values: Any) -> str:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return str(folder)


INDEX, VAE, NETWORK = "model_index.json", "vae/config.json", "transformer/config.json"
STATISTICS = r"its vae has latents_{} .*, but {} needs {} numbers{}, one a channel$"


@pytest.mark.parametrize(
    ("name", "file", "values", "said"),
    [
        ("sdxl", INDEX, {"text_encoder": [None, None]}, "names no text_encoder"),
        ("sdxl", INDEX, {"tokenizer_2": [None, None]}, "tokenizer_2"),
        ("pixart", INDEX, {"text_encoder": [None, None]}, "names no text_encoder"),
        ("wan", VAE, {"latents_mean": [0.0] * 3}, STATISTICS.format("mean", "WanPipeline", 6, "")),
        ("wan", VAE, {"latents_std": [1.0] * 5 + [0.0]}, STATISTICS.format("std", "WanPipeline", 6, " but 0")),
        ("qwen", VAE, {"latents_std": [1.0]}, STATISTICS.format("std", "QwenImagePipeline", 5, " but 0")),
        ("sdxl", VAE, {"scaling_factor": 0}, "its vae has scaling_factor 0, but .* needs a number but 0$"),
        ("sdxl", VAE, {"latents_mean": [0.0], "latents_std": [1.0]}, STATISTICS.format("mean", "StableDiffusionXLPipeline", 6, "")),
        ("qwen", NETWORK, {"guidance_embeds": True}, r"takes a guidance scale \(guidance_embeds\)"),
        ("dit", INDEX, {"id2label": {"a": "tench"}}, "id2label .* does not give names to numbers of classes$"),
        ("dit", INDEX, {"id2label": {"1": 3}}, "id2label .* does not give names to numbers of classes$"),
    ],
)
def test_a_folder_that_would_break_later(originals: Any, tmp_path: Path, name: str, file: str, values: dict[str, Any], said: str) -> None:
    source = edited(Path(shutil.copytree(originals(name), tmp_path / name)), file, **values)
    with pytest.raises(UserError, match=rf"^recipe key teacher\.pretrained: .*{said}"):
        find_family(source)
    with pytest.raises(UserError, match=r"^recipe key teacher\.pretrained: "):
        plan(Recipe.load("digits_dmd2_1step", [f"teacher.pretrained={source}", "evaluate.protocol=null"]), dry=True)


def test_a_negative_prompt_where_the_call_takes_none(originals: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("7\n207\n")
    asked = [f"teacher.pretrained={originals('dit')}", f"data.prompts={tmp_path / 'prompts.txt'}", "evaluate.protocol=null"]
    plan(Recipe.load("digits_dmd2_1step", asked), dry=True)
    with pytest.raises(UserError, match=r"^recipe key teacher\.negative_prompt: '7', but the call of DiTPipeline takes none$"):
        plan(Recipe.load("digits_dmd2_1step", [*asked, "teacher.negative_prompt='7'"]), dry=True)


def test_names_of_one_class_are_that_class_and_others_are_none() -> None:
    family: Any = find_family(tiny_dit())
    assert [family.number(prompt) for prompt in ("tench", "tench, Tinca tinca", " 7 ", "goldfish ", "")] == [0, 0, 7, 1, 1000]
    assert [family.number(prompt) for prompt in ("tench, garbage", "7, x", "tench, goldfish", "1001", "-1")] == [None] * 5


def test_guidance_below_one_is_refused(originals: Any) -> None:
    with pytest.raises(UserError, match=r"^guidance: 0\.5; allowed: 1"):
        load_teacher(originals("sd3"), guidance=0.5)
