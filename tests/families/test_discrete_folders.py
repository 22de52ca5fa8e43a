"""Saved pipelines of the families on a discrete schedule: found, fitting, and refused in one line that names the key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from pipelines import edit_json, student_info, student_role
from pipelines import same_interpreter as same_interpreter
from tiny_dit import tiny_dit
from tiny_pixart import tiny_pixart
from tiny_sd15 import tiny_sd15
from tiny_sdxl import tiny_sdxl
from transformers import CLIPConfig, CLIPImageProcessor

from fastgen.config import Recipe, validate
from fastgen.errors import UserError
from fastgen.export import export_student, verify
from fastgen.families import find_family
from fastgen.families.dit import DiT
from fastgen.families.pixart import PixArtSigma
from fastgen.families.sd import StableDiffusion
from fastgen.families.sdxl import SDXL
from fastgen.plan import plan

BUILD: dict[str, Callable[[], Any]] = {"sd": tiny_sd15, "sdxl": tiny_sdxl, "pixart": tiny_pixart, "dit": tiny_dit}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp("pipelines") / name for name in BUILD}
    for name, build in BUILD.items():
        build().save_pretrained(folders[name])
    return folders


@pytest.fixture
def copied(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(originals[name], tmp_path / name))


@pytest.mark.parametrize(
    ("name", "cls", "kind", "shape", "size"),
    [
        ("sd", StableDiffusion, "eps", (5, 8, 8), (16, 16)),
        ("sdxl", SDXL, "eps", (6, 8, 8), (32, 32)),
        ("pixart", PixArtSigma, "eps", (6, 8, 8), (16, 16)),
        ("dit", DiT, "eps", (5, 8, 8), (16, 16)),
    ],
)
def test_a_folder_is_found_and_its_parts_fit(originals: dict[str, Path], name: str, cls: type, kind: str, shape: Any, size: Any) -> None:
    family: Any = find_family(originals[name])
    assert type(family) is cls and (family.kind, family.latent.shape, family.size, family.shift) == (kind, shape, size, 1.0)
    assert sum(p.numel() for p in family.load_backbone(meta=True).parameters()) == sum(p.numel() for p in family.load_backbone().parameters())
    assert find_family(originals[name], **family.options).options == family.options


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_the_class_that_older_folders_name_is_the_same_network(originals: dict[str, Path], copied: Callable[[str], Path], name: str) -> None:
    folder = copied(name)
    edit_json(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit_json(folder / "transformer" / "config.json", _class_name="Transformer2DModel", norm_num_groups=32)
    older: Any = find_family(folder)
    family: Any = find_family(originals[name])
    weights = family.load_backbone().state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in older.load_backbone().state_dict().items())
    exported = older.load_pipeline(older.load_backbone(), older.export_scheduler())
    assert type(exported.transformer).__name__ == family.network


def test_names_of_classes_survive_an_export(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("dit")
    edit_json(folder / "model_index.json", id2label={"0": "tench, Tinca tinca", "207": "golden retriever"})
    family = find_family(folder)
    family.load_pipeline(None, family.export_scheduler()).save_pretrained(tmp_path / "student")
    student = find_family(tmp_path / "student")
    for prompt, label in (("Tinca tinca", 0), ("golden retriever", 207)):
        assert student.call_inputs([prompt]) == family.call_inputs([prompt]) == {"class_labels": [label]}


def checked(folder: Path) -> Any:
    """SD with a safety checker that dislikes all pictures, also saved."""
    pipeline: Any = tiny_sd15()
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**tower, "image_size": 16, "patch_size": 8}, text_config=tower, projection_dim=8)
    checker: Any = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2)
    pipeline.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor(size=16, crop_size=16))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.mark.usefixtures("same_interpreter")
def test_a_safety_checker_is_no_part_of_verification(tmp_path: Path) -> None:
    pipeline = checked(tmp_path / "teacher")
    assert pipeline(["a red cat"], num_inference_steps=1, output_type="np").images.max() == 0
    family = find_family(tmp_path / "teacher")
    info = student_info(tmp_path / "teacher", steps=2, prompts=["a red cat"])
    folder = export_student(student_role(family), family, info, tmp_path / "student")
    assert (folder / "safety_checker").is_dir()
    assert verify(folder, seeds=(0, 1)).passed


def test_a_safety_checker_is_not_loaded_for_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = find_family(checked(tmp_path))
    family = find_family(tmp_path)
    exported = family.load_pipeline(None, family.export_scheduler())
    assert isinstance(exported, StableDiffusionPipeline) and isinstance(exported.safety_checker, StableDiffusionSafetyChecker)
    monkeypatch.setattr(StableDiffusionSafetyChecker, "__init__", lambda *_args: pytest.fail("it was loaded"))
    for key, value in plain.encode_prompts(["a red cat"]).items():
        torch.testing.assert_close(family.encode_prompts(["a red cat"])[key], value)


def config_of(folder: Path, part: str, **changes: Any) -> None:
    edit_json(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **changes)


def without(folder: Path, component: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    del index[component]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "damage", "options", "message"),
    [
        ("sd", lambda f: without(f, "unet"), {}, r"pretrained: .*names no unet"),
        ("sdxl", lambda f: shutil.rmtree(f / "text_encoder_2"), {}, r"pretrained: .*names a text_encoder_2"),
        ("sd", lambda f: config_of(f, "scheduler", thresholding=True, _class_name="DDIMScheduler"), {}, r"pretrained: its scheduler"),
        ("sdxl", lambda f: config_of(f, "scheduler", prediction_type="flow"), {}, r"pretrained: its scheduler .*prediction_type"),
        ("sd", lambda f: config_of(f, "unet", time_cond_proj_dim=16), {}, r"pretrained: its unet takes a guidance scale"),
        ("sd", lambda f: config_of(f, "unet", in_channels=9), {}, r"pretrained: .*conv_in\.weight"),
        ("pixart", lambda f: config_of(f, "transformer", use_additional_conditions=True), {}, r"pretrained: its transformer takes resolution"),
        ("sd", lambda _f: None, {"size": [16, 20]}, r"size: 20 is not a multiple of 8"),
        ("sdxl", lambda _f: None, {"resolution": 36}, r"resolution: 36 is not a multiple of 8"),
        ("pixart", lambda _f: None, {"size": [12, 16]}, r"size: 12 is not a multiple of 8"),
        ("dit", lambda _f: None, {"size": [16, 16]}, r"size: does not apply to DiTPipeline"),
        ("sd", lambda _f: None, {"shift": 3.0}, r"shift: does not apply to StableDiffusionPipeline"),
        ("sdxl", lambda _f: None, {"max_sequence_length": 20}, r"max_sequence_length: does not apply to StableDiffusionXLPipeline"),
    ],
)
def test_what_does_not_fit_is_refused(copied: Callable[[str], Path], name: str, damage: Any, options: Any, message: str) -> None:
    folder = copied(name)
    damage(folder)
    with pytest.raises(UserError, match=rf"^recipe key teacher\.{message}") as caught:
        find_family(folder, **options).load_backbone(meta=True)
    assert "\n" not in str(caught.value)


def recipe_of(folder: Path, tmp_path: Path, **blocks: Any) -> Recipe:
    (tmp_path / "prompts.txt").write_text("207\n7\n")
    block: dict[str, Any] = {
        "teacher": {"pretrained": str(folder), "guidance": 2.0},
        "student": {"steps": 2},
        "distiller": {"name": "dmd2"},
        "data": {"prompts": str(tmp_path / "prompts.txt")},
        "optimizer": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
        "train": {"steps": 2, "batch_size": 2},
    }
    of_teacher = {**block["teacher"], **blocks.pop("teacher", {})}
    return validate(Recipe, {**block, **blocks, "teacher": of_teacher})


ADAPTERS: Any = {"export": {"weights": "lora"}, "student": {"steps": 2, "tune": {"lora": {"rank": 2}}}}


@pytest.mark.parametrize(
    ("name", "blocks", "message"),
    [
        ("dit", {"student": {"steps": 2, "grid": [1.0, 0.5]}}, r"student\.grid: the call of DiTPipeline takes no explicit times"),
        ("sd", {"student": {"steps": 2, "grid": [1.0, 0.4567]}}, r"student\.grid: 0\.4567 is the time of none of the teacher's 900 training steps"),
        (
            "dit",
            {"export": {"weights": "lora"}, "student": {"steps": 2, "tune": {"lora": {"rank": 2}}}},
            r"export\.weights: DiTPipeline loads no LoRA files",
        ),
        (
            "pixart",
            {"export": {"weights": "lora"}, "student": {"steps": 2, "tune": {"lora": {"rank": 2}}}},
            r"export\.weights: PixArtSigmaPipeline loads no",
        ),
        ("dit", {"teacher": {"negative_prompt": "blurry"}}, r"teacher\.negative_prompt: 'blurry', but the call of DiTPipeline takes none$"),
    ],
)
def test_the_plan_refuses_what_the_pipeline_takes_not(originals: dict[str, Path], tmp_path: Path, name: str, blocks: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^recipe key {message}"):
        plan(recipe_of(originals[name], tmp_path, **blocks))
