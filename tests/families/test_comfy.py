"""`fastgen export --comfy`: the student's adapter in keys that other programs read, which diffusers reads back to the same pictures."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import recipe
from pipelines import PROMPTS, adapter_tuning, draw, in_a_run, record_hashes, student_info, tiny_sd3
from pipelines import same_interpreter as same_interpreter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_dit import tiny_dit
from tiny_flux import tiny_flux
from tiny_sd15 import tiny_sd15
from tiny_sdxl import tiny_sdxl
from tuned import factors, saved
from typer.testing import CliRunner

from fastgen import cli, run
from fastgen.config import Recipe, validate
from fastgen.errors import UserError
from fastgen.export import Expert, export_lora, verify
from fastgen.families import find_family
from fastgen.generator import load_student, read_manifest
from fastgen.roles import build_roles, student

torch.set_num_threads(1)
CASES: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "sd": (tiny_sd15, {}, "kohya", "stable-diffusion-v1/lora"),
    "sdxl": (tiny_sdxl, {"size": [16, 24]}, "kohya", "stable-diffusion-xl-v1-base/lora"),
    "sd3": (tiny_sd3, {"max_sequence_length": 16}, "diffusers", "stable-diffusion-3/lora"),
    "flux": (tiny_flux, {"size": [16, 16], "max_sequence_length": 20}, "diffusers", "flux-1/lora"),
}


def trained(name: str, root: Path, *, lora: bool = True) -> Path:
    """A run of two steps on a tiny pipeline."""
    build, options, *_ = CASES[name]
    build().save_pretrained(root / "teacher")
    (root / "data").mkdir()
    data = recipe(root / "teacher", "dmd2", root / "data", lora=lora, **options).dump()
    data["train"] |= {"checkpoint_every": 1, "sample_every": 0}
    data["optimizer"]["student"]["lr"] = 0.1  # so that the adapter shows
    data["evaluate"] = {"protocol": None}
    return run.train(validate(Recipe, data), root / "run", only="train")


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("same_interpreter")
def test_diffusers_reads_it_back_to_the_same_pictures(name: str, tmp_path: Path) -> None:
    build, _, keys, architecture = CASES[name]
    folder = run.export(trained(name, tmp_path), tmp_path / "student", for_comfy=True)  # which verifies
    file, manifest = folder / "comfyui/student.safetensors", read_manifest(folder)
    assert manifest["comfyui"] == {"keys": keys, "files": ["comfyui/student.safetensors"]}
    assert "comfyui/student.safetensors" in manifest["sha256"]
    state = load_file(file)
    start = {"kohya": "lora_unet_", "diffusers": "transformer."}[keys]
    assert all(key.startswith(start) for key in state)
    assert all(("lora_down" in key or "lora_up" in key or key.endswith(".alpha")) == (keys == "kohya") for key in state)
    assert all(value == 2 for key, value in state.items() if key.endswith(".alpha"))  # the rank
    student = load_student(folder, teacher_dir=tmp_path / "teacher")
    pipeline = type(build()).from_pretrained(tmp_path / "teacher")
    pipeline.load_lora_weights(str(file))
    pipeline.scheduler = student.family.sampling_scheduler(student.steps)
    drawn = draw(pipeline, PROMPTS[:2], [0, 1], **manifest["call"])
    tolerance = 1e-6 * student.family.amplification(manifest["grid"][0])
    assert (drawn - student(PROMPTS[:2], [0, 1])).abs().max() <= tolerance
    pipeline.unload_lora_weights()
    assert (drawn - draw(pipeline, PROMPTS[:2], [0, 1], **manifest["call"])).abs().max() > 100 * tolerance, "the adapter must show"
    header = metadata(file)
    assert header["modelspec.sai_model_spec"] == "1.0.1" and header["modelspec.architecture"] == architecture
    assert header["modelspec.implementation"] == "diffusers" and header["modelspec.title"] == "dmd2, 2-step"
    height, width = student.family.picture_shape[-2:]
    assert header["modelspec.resolution"] == f"{width}x{height}"
    assert header["modelspec.usage_hint"] == "2 steps, CFG 1, weight 1"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert header["modelspec.hash_sha256"] == f"0x{hashlib.sha256(content[8 + length :]).hexdigest()}"
    card = (folder / "README.md").read_text()
    assert "belongs into `models/loras`, at strength 1, with 2 steps and CFG 1," in card
    assert "`comfyui/student.safetensors`" in card and "It was not tried in ComfyUI itself." in card


@pytest.mark.usefixtures("same_interpreter")
def test_what_verifies_is_the_file_for_others_too(tmp_path: Path) -> None:
    folder = run.export(trained("sd", tmp_path), tmp_path / "student", for_comfy=True)
    file = folder / "comfyui/student.safetensors"
    state = {key: value * (2 if key.endswith(".alpha") else 1) for key, value in load_file(file).items()}
    save_file(state, file, metadata(file))
    record_hashes(folder)
    assert not verify(folder, teacher_dir=tmp_path / "teacher").passed


@pytest.mark.usefixtures("same_interpreter")
def test_it_goes_on_top_of_the_teachers_own_adapter(tmp_path: Path) -> None:
    file = saved(factors(tiny_sd15()), tmp_path / "style.safetensors")
    tiny_sd15().save_pretrained(tmp_path / "teacher")
    (tmp_path / "data").mkdir()
    data = recipe(tmp_path / "teacher", "dmd2", tmp_path / "data", lora=True).dump()
    data["teacher"]["lora"] = [{"path": str(file), "weight": 0.5}]
    data["train"] |= {"checkpoint_every": 1, "sample_every": 0}
    data["evaluate"] = {"protocol": None}
    tuned = run.export(run.train(validate(Recipe, data), tmp_path / "tuned", only="train"), tmp_path / "student", for_comfy=True)
    assert "Load what lies in `teacher_lora/` with it, at the weights above." in (tuned / "README.md").read_text()


@pytest.mark.usefixtures("same_interpreter")
def test_each_expert_has_its_own_file(tmp_path: Path) -> None:
    tiny_sd3().save_pretrained(tmp_path / "teacher")
    family = find_family(tmp_path / "teacher", max_sequence_length=16)
    roles = build_roles(dict.fromkeys(["student", "student_2"], student()), family, family.load_backbone(), tuning=adapter_tuning())
    noises = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for role in roles.values():
            for parameter in role.parameters().values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noises))
    experts = [Expert(roles["student"], 0.75), Expert(roles["student_2"])]
    folder = export_lora(experts, family, student_info(tmp_path / "teacher"), tmp_path / "student", for_comfy=True)
    assert read_manifest(folder)["comfyui"]["files"] == ["comfyui/expert_1.safetensors", "comfyui/expert_2.safetensors"]
    assert verify(in_a_run(folder, tmp_path / "teacher")).passed
    assert metadata(folder / "comfyui/expert_2.safetensors")["modelspec.title"] == "dmd2, 4-step, expert_2"


def test_full_students_and_pipelines_without_adapters_are_refused(tmp_path: Path) -> None:
    run_dir = trained("sd", tmp_path, lora=False)
    with pytest.raises(UserError, match=r"^--comfy: a student trained with student\.tune: full has no adapter; export it without --comfy"):
        run.export(run_dir, tmp_path / "student", for_comfy=True)
    (tmp_path / "dit").mkdir()
    tiny_dit().save_pretrained(tmp_path / "dit/teacher")
    given = recipe(tmp_path / "dit/teacher", "dmd2", tmp_path / "dit", lora=True, prompts=["207", "7"]).dump()
    given["train"] |= {"checkpoint_every": 1, "sample_every": 0}
    given["evaluate"] = {"protocol": None}
    of_dit = run.train(validate(Recipe, given), tmp_path / "dit/run", only="train")
    with pytest.raises(UserError, match=r"^--comfy: DiTPipeline loads no LoRA files; export it without --comfy"):
        run.export(of_dit, tmp_path / "student", for_comfy=True)
    with pytest.raises(UserError, match=r"^--comfy: .*--full"):
        run.export(run_dir, tmp_path / "student", weights="full", for_comfy=True)
    assert not (tmp_path / "student").exists()


@pytest.mark.usefixtures("same_interpreter")
def test_the_command_takes_the_flag(tmp_path: Path) -> None:
    run_dir = trained("sd", tmp_path)
    done = CliRunner().invoke(cli.app, ["export", str(run_dir), "--output", str(tmp_path / "student"), "--comfy"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "student/comfyui/student.safetensors").is_file()
    assert f"for ComfyUI: {tmp_path}/student/comfyui/student.safetensors" in done.output.replace("\n", "")
