"""What a later stage would refuse, the plan refuses: each mistake here once ended a line that had trained already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pipelines import edit_json, tiny_protocol
from pipelines import same_interpreter as same_interpreter
from pipelines import sd3_folder as sd3_folder

from fastgen import cli, optional, run
from fastgen.config import Recipe, validate
from fastgen.errors import UserError
from fastgen.families.complete import check_complete
from fastgen.generator import load_student
from fastgen.pictures import save_png
from fastgen.plan import plan

Change = dict[str, Any]
WHOLE = ("distiller", "data", "optimizer")  # are replaced as a whole
PROMPTS = "a red cat\ntwo boats at sea\na small house\n"


@pytest.fixture
def recipe(sd3_folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of the tiny pipeline, with blocks whose keys are replaced."""
    (tmp_path / "prompts.txt").write_text(PROMPTS)

    def make(source: Path = sd3_folder, /, **changes: Change) -> Recipe:
        blocks: dict[str, Change] = {
            "teacher": {"pretrained": str(source), "guidance": 2.0, "max_sequence_length": 16},
            "student": {"steps": 2},
            "distiller": {"name": "dmd2", "critic_updates": 1},
            "data": {"prompts": str(tmp_path / "prompts.txt")},
            "optimizer": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
            "train": {"steps": 1, "batch_size": 2, "device": "cpu", "sample_every": 0},
        }
        return validate(Recipe, blocks | {name: keys if name in WHOLE else blocks.get(name, {}) | keys for name, keys in changes.items()})

    return make


LORA: Any = {"tune": {"lora": {"rank": 2}}}


@pytest.mark.usefixtures("same_interpreter")
def test_the_line_exports_an_adapter_where_the_recipe_says_so(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    folder, prompts = tmp_path / "run", ["a red cat"]
    run.train(recipe(student=LORA, export={"weights": "lora"}), folder)
    adapter = folder / "student"
    assert {path.name for path in adapter.iterdir()} == {"README.md", "fastgen.json", "pytorch_lora_weights.safetensors", "scheduler"}
    assert (folder / "report.html").is_file()
    assert cli.main(["sample", str(adapter), "--prompt", prompts[0], "--output", str(tmp_path / "one.png")]) == 0
    assert cli.main(["export", str(folder), "--output", str(tmp_path / "again")]) == 0
    assert cli.main(["export", str(folder), "--output", str(tmp_path / "whole"), "--full"]) == 0
    assert json.loads((tmp_path / "again" / "fastgen.json").read_text())["weights"] == "lora"
    assert json.loads((tmp_path / "whole" / "fastgen.json").read_text())["weights"] == "full"
    difference = load_student(adapter)(prompts, [0]) - load_student(tmp_path / "whole")(prompts, [0])
    assert difference.abs().max() <= 1e-5


@pytest.mark.usefixtures("same_interpreter")
def test_an_adapter_in_the_line_is_measured_and_reported(tmp_path: Path) -> None:
    keys = ["student.tune.lora.rank=2", "export.weights=lora", "train.steps=1", "train.batch_size=4", "train.sample_every=0", "train.device=cpu"]
    assert cli.main(["train", "digits_dmd2_1step", *keys, "--output", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {row["model"] for row in results["metrics"]} == {"student", "teacher", "real"}
    assert (tmp_path / "run" / "report.html").is_file()


MEAN_FLOW: Any = {"distiller": {"name": "mean_flow"}, "data": {"images": "images"}, "optimizer": {"student": {"lr": 1e-3}}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, r"student\.tune: full has no adapter; `export\.weights: full` exports it whole"),
        ({"student": LORA, **MEAN_FLOW}, r"mean_flow gives the student a second time input, which an adapter cannot hold"),
    ],
)
def test_a_form_that_the_export_would_refuse(
    changes: Change, reason: str, recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_png(Image.new("RGB", (16, 16)), Path("images/a.png"))
    Path("images/a.txt").write_text("a red cat")
    with pytest.raises(UserError, match=rf"recipe key export\.weights: .*{reason}"):
        plan(recipe(export={"weights": "lora"}, **changes))


def test_an_adapter_has_no_other_precision(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"recipe key export\.dtype: bf16 is of a whole pipeline; `export\.weights: lora` writes fp32"):
        plan(recipe(student=LORA, export={"weights": "lora", "dtype": "bf16"}))


@pytest.fixture
def teacher(sd3_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline, to be damaged."""
    return shutil.copytree(sd3_folder, tmp_path / "teacher")


def renamed(name: str, new: str) -> Callable[[Path], object]:
    return lambda teacher: (teacher / name).rename(teacher / new)


def removed(name: str) -> Callable[[Path], object]:
    return lambda teacher: shutil.rmtree(teacher / name) if (teacher / name).is_dir() else (teacher / name).unlink()


def indexed(**entries: Any) -> Callable[[Path], object]:
    return lambda teacher: edit_json(teacher / "model_index.json", **entries)


def one_shard_gone(teacher: Path) -> None:
    folder = teacher / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
    shards = {"a": "diffusion_pytorch_model-00001-of-00002.safetensors", "b": "diffusion_pytorch_model-00002-of-00002.safetensors"}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def two_variants(teacher: Path) -> None:
    renamed(f"{NETWORK}.safetensors", f"{NETWORK}.bf16.safetensors")(teacher)
    renamed(f"{ENCODER}.safetensors", f"{ENCODER}.fp16.safetensors")(teacher)


NETWORK, ENCODER = "transformer/diffusion_pytorch_model", "text_encoder_3/model"
INCOMPLETE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no T5": (removed("text_encoder_3"), r"names a text_encoder_3 \(T5EncoderModel\), but there is nothing in '.*/text_encoder_3'"),
    "no weights of T5": (removed(f"{ENCODER}.safetensors"), r"'.*/text_encoder_3' has no weights: no model\.safetensors"),
    "no VAE": (removed("vae"), r"names a vae \(AutoencoderKL\), but there is nothing in"),
    "no tokenizer": (removed("tokenizer_2"), r"names a tokenizer_2 \(\w+\), but there is nothing in"),
    "no configuration": (removed("text_encoder/config.json"), r"there is no '.*text_encoder/config\.json'"),
    "two variants": (two_variants, "has weights as the variants bf16 and fp16 alone, and diffusers loads one"),
    "a variant in shards": (renamed(f"{ENCODER}.safetensors", f"{ENCODER}.fp16-00001-of-00001.safetensors"), "a part of its weights .* no index"),
    "a pickle": (renamed(f"{ENCODER}.safetensors", "text_encoder_3/pytorch_model.bin"), r"as a pickle alone \(pytorch_model\.bin\)"),
    "a shard": (one_shard_gone, r"names the weights '.*00002-of-00002\.safetensors', which are not there"),
    "null for CLIP": (indexed(text_encoder_2=[None, None]), "names no text_encoder_2, without which diffusers does not load a StableDiffusion3"),
    "null for a tokenizer": (indexed(tokenizer_3=[None, None]), "its text_encoder_3 has no tokenizer_3 in"),
    "a class of its own": (indexed(text_encoder_3=["own", "Own"]), r"its text_encoder_3 is a own\.Own, which is none of diffusers and transformers"),
    "a pipeline of its own": (indexed(_class_name=["own", "StableDiffusion3Pipeline"]), r"is code of its own, and fastgen runs none"),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_a_teacher_that_is_not_whole(name: str, recipe: Callable[..., Recipe], teacher: Path) -> None:
    damage, reason = INCOMPLETE[name]
    damage(teacher)
    marker = teacher.parent / "ran"
    for folder in (teacher, teacher / "text_encoder_3"):
        if folder.is_dir():
            (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nfrom transformers import T5EncoderModel as Own\n")
    with pytest.raises(UserError, match=rf"^recipe key teacher\.pretrained: .*{reason}"):
        plan(recipe(teacher))
    assert not marker.exists()


def test_what_diffusers_can_load_a_pipeline_without_may_be_missing(teacher: Path) -> None:
    index = json.loads((teacher / "model_index.json").read_text())
    assert index["image_encoder"] == index["feature_extractor"] == [None, None]
    check_complete(teacher)
    edit_json(teacher / "model_index.json", scheduler=["own", "Own"])
    check_complete(teacher)


PICTURES: Any = {"distiller": {"name": "flow_matching"}, "data": {"images": "fastgen:digits"}, "optimizer": {"student": {"lr": 1e-3}}}
REFUSED: dict[str, tuple[Change, str]] = {
    "a protocol of other pictures": ({"evaluate": {"protocol": "digits"}}, r"evaluate\.protocol: protocol digits .* the model makes \(3, 16, 16\)"),
    "data of other pictures": (
        MEAN_FLOW | {"data": {"images": "fastgen:digits"}},
        r"data\.images: these images are 8 pixels wide, the teacher needs 16",
    ),
    "a device that is not here": ({"train": {"device": "cuda:63"}}, r"train\.device: 'cuda:63' is not available here"),
    "a reward of other pictures": (
        {"distiller": {"name": "dmd2", "reward": {"name": "fastgen:digits"}}},
        r"distiller\.reward\.name: fastgen:digits judges pictures \(3, 8, 8\), the teacher's are \(3, 16, 16\)",
    ),
    "a long text": ({"teacher": {"max_sequence_length": 600}}, r"teacher\.max_sequence_length: 600, but the pipeline takes at most 512"),
    "two times that are one": ({"student": {"grid": [0.9, 0.9 - 1e-9]}}, r"student\.grid: .* has two times that are the same in fp32 \(0\.[89]"),
    "a time that is zero": ({"student": {"grid": [0.5, 1e-50]}}, r"student\.grid: .* has two times that are the same in fp32 \(0\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_later_stage_would_refuse(name: str, recipe: Callable[..., Recipe]) -> None:
    changes, reason = REFUSED[name]
    with pytest.raises(UserError, match=rf"^recipe key {reason}"):
        plan(recipe(**changes))


def test_the_protocol_counts_only_where_it_measures(recipe: Callable[..., Recipe]) -> None:
    plan(recipe(evaluate={"protocol": "digits"}), only="train")
    with pytest.raises(UserError, match=r"evaluate\.protocol: protocol digits measures images of shape"):
        plan(recipe(evaluate={"protocol": "digits", "every": 1}), only="train")


def test_a_size_of_its_own_that_the_pipeline_refuses(recipe: Callable[..., Recipe], teacher: Path) -> None:
    edit_json(teacher / "transformer" / "config.json", sample_size=9)
    with pytest.raises(UserError, match=r"recipe key teacher\.size: the pipeline's own, 18, is not a multiple of 4"):
        plan(recipe(teacher))
    assert plan(recipe(teacher, teacher={"resolution": 16})).family.picture_shape == (3, 16, 16)


def test_lpips_compares_no_vectors(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    (tmp_path / "prompts.txt").write_text("0\n1\n")
    distiller = {"name": "dmd", "regression": {"metric": "lpips"}}
    data = {"prompts": str(tmp_path / "prompts.txt"), "pairs": 8}
    given = recipe(teacher={"pretrained": "toy:mixture", "max_sequence_length": None}, student={"steps": 1}, distiller=distiller, data=data)
    with pytest.raises(UserError, match=r"regression\.metric: lpips compares pictures \(3, H, W\), the teacher's samples are \(2,\)"):
        plan(given, only="train")


def test_prompts_of_the_protocol_that_the_pipeline_cannot_read(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    given = recipe(evaluate={"protocol": tiny_protocol(tmp_path)})
    plan(given)
    tiny_protocol(tmp_path, ["a red cat", "日本"])
    with pytest.raises(UserError, match=r"^recipe key evaluate\.protocol: "):
        plan(given)


@pytest.mark.parametrize(("key", "value"), [("dtype", "bf16"), ("dtype", "fp32"), ("quantise", "int8")])
def test_what_is_said_of_frozen_weights_needs_some(key: str, value: str, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (16, 16)).save(images / "a.png")
    (images / "a.txt").write_text("a red cat", encoding="utf-8")
    pixels = {"distiller": {"name": "flow_matching"}, "data": {"images": str(images)}, "optimizer": {"student": {"lr": 1e-3}}}
    with pytest.raises(UserError, match=rf"^recipe key teacher\.{key}: flow_matching with student\.tune: full keeps no frozen network"):
        plan(recipe(teacher={key: value}, **pixels), only="train")
    plan(recipe(teacher={key: value}, student=LORA, **pixels), only="train")


def test_a_dry_run_names_the_package_that_a_format_needs(recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^recipe key teacher\.quantise: nf4 needs the package bitsandbytes"):
        run.dry_run(recipe(teacher={"quantise": "nf4"}, student=LORA), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kept", "said"), [({}, "frozen"), ({"dtype": "bf16"}, "frozen, bf16"), ({"dtype": "bf16", "quantise": "int8"}, "frozen, int8")]
)
def test_a_dry_run_says_how_frozen_weights_are_kept(kept: Change, said: str, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    outcome = run.dry_run(recipe(teacher=kept, student=LORA), tmp_path / "run")
    assert outcome["roles"]["teacher"]["tuning"] == said
