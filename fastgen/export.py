"""A student as an ordinary diffusers folder (or LoRA folder), and the proof that plain diffusers draws what we draw.

The folder holds native classes only: the teacher's pipeline with the student's network and the scheduler whose grid the student
was trained on. What a stock call must be passed stands in fastgen.json["call"] and in the model card.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fastgen
from fastgen import card
from fastgen.errors import UserError
from fastgen.families import resolve_source
from fastgen.families.base import Family
from fastgen.generator import load_student, read_manifest
from fastgen.roles import Role
from fastgen.surgery import lora

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = 1e-5


@dataclass(frozen=True)
class StudentInfo:
    """What an export records beside the weights."""

    method: str
    steps: int
    grid: Sequence[float] | None  # explicit times; None for the scheduler's own
    guidance: float  # of the student's own sampling; 1 is none
    teacher: dict[str, Any]  # pretrained, guidance, negative_prompt
    prompts: Sequence[str]  # examples, for the card and for verification
    recipe: dict[str, Any]
    own_steps_only: bool = False  # the network is right at the times of its own grid alone; `export_student` finds out


def export_student(role: Role, family: Family, info: StudentInfo, output: Path, *, dtype: str = "fp32") -> Path:
    """Write the student's whole pipeline to `output`, which appears only when complete; LoRA students are merged, and scalar inputs
    folded into the time embedding, for good."""
    if role.denoiser.adapter is not None:
        lora.merge(role.denoiser.backbone, role.denoiser.adapter)
    info = replace(info, own_steps_only="second_time" in role.spec.inputs)
    role.denoiser.fold_inputs(family.grid(info.steps, info.grid))
    scheduler = family.export_scheduler(info.grid)
    pipeline = _converted(family.load_pipeline(role.denoiser.backbone, scheduler), DTYPES[dtype])

    def write(folder: Path) -> None:
        pipeline.save_pretrained(folder, safe_serialization=True)
        _load_encoders_as_fp32(folder)

    return _publish(output, write, info, family, "full", dtype)


def _converted(pipeline: Any, dtype: torch.dtype) -> Any:
    """The pipeline in `dtype`. Modules that change are copies, because the role or a live teacher goes on using them."""
    modules = {name: module for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
    other = {name: module for name, module in modules.items() if any(p.dtype != dtype for p in module.parameters())}
    pipeline.register_modules(**{name: copy.deepcopy(module).to(dtype) for name, module in other.items()})
    return pipeline


def _load_encoders_as_fp32(folder: Path) -> None:
    """Without a dtype argument diffusers loads its own networks in fp32 but transformers' in the dtype of their config.json, and
    the two do not work together. So a plain `from_pretrained` of a half-precision student gets fp32 everywhere."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        if "dtype" in config:
            path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")


def export_lora(role: Role, family: Family, info: StudentInfo, output: Path) -> Path:
    """Write the student's adapter alone, with the scheduler that goes with it; it loads on the plain teacher pipeline."""
    if role.denoiser.adapter is None:
        raise UserError("--lora: this student was trained with student.tune: full, so it has no adapter; export it without --lora")
    if role.spec.inputs:
        what = role.spec.inputs[0].replace("_", " ")
        raise UserError(f"--lora: {info.method} gave this student a {what} input, which an adapter cannot hold; export it without --lora")
    backbone, adapter = role.denoiser.backbone, role.denoiser.adapter
    layers = {key: value.contiguous() for key, value in lora.state_dict(backbone, adapter).items()}
    config = backbone.peft_config[adapter].to_dict()  # type: ignore[index, union-attr]
    pipeline_class = type(family.load_pipeline(backbone, family.export_scheduler(info.grid)))

    def write(folder: Path) -> None:
        pipeline_class.save_lora_weights(
            folder, **{f"{family.component}_lora_layers": layers, f"{family.component}_lora_adapter_metadata": _plain(config)}
        )
        family.export_scheduler(info.grid).save_pretrained(folder / "scheduler")

    return _publish(output, write, info, family, "lora", "fp32")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, list, set, dict, type(None)))


def _publish(output: Path, write: Any, info: StudentInfo, family: Family, weights: str, dtype: str) -> Path:
    """Write into a sibling folder and rename it to `output`; a failure leaves what was there, and no half student."""
    target = Path(os.path.abspath(output))
    partial, old = (target.with_name(f".{state}_{target.name}") for state in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        manifest = _manifest(partial, info, family, weights, dtype)
        (partial / "README.md").write_text(card.model_card(manifest))
        (partial / "fastgen.json").write_text(json.dumps(manifest, indent=1) + "\n")
        _swap(partial, target, old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return output


def _swap(partial: Path, target: Path, old: Path) -> None:
    """Rename `partial` to `target`, whose former content moves to `old`, or back when the second rename fails."""
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(partial, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise


def _manifest(folder: Path, info: StudentInfo, family: Family, weights: str, dtype: str) -> dict[str, Any]:
    return {
        "format": 1,
        "weights": weights,
        "dtype": dtype,
        "method": info.method,
        "steps": info.steps,
        "grid": family.grid(info.steps, info.grid).tolist(),
        "own_steps_only": info.own_steps_only,
        "call": family.call_arguments(info.steps, info.guidance, info.grid) | _negative_prompt(info),
        "pipeline": family.pipeline_classes[0],
        "teacher": info.teacher,
        **({"base": _base(info.teacher["pretrained"])} if weights == "lora" else {}),
        "prompts": list(info.prompts)[:8],
        "versions": {"fastgen": fastgen.__version__, **{name: metadata.version(name) for name in ("diffusers", "torch")}},
        "sha256": _hashes(folder),
        "recipe": info.recipe,
    }


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of every weights file below `folder`, by relative name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): _sha256(file) for file in files}


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _check_hashes(folder: Path, recorded: dict[str, str]) -> None:
    found = _hashes(folder)
    changed = sorted(name for name in found.keys() | recorded.keys() if found.get(name) != recorded.get(name))
    if changed:
        raise UserError(f"{str(folder)!r}: {changed[0]} is not the file that was exported")


def _negative_prompt(info: StudentInfo) -> dict[str, str]:
    text = info.teacher["negative_prompt"]
    return {"negative_prompt": text} if text and info.guidance > 1 else {}


def _base(pretrained: str) -> str:
    """What plain diffusers loads the teacher from: a hub id as it is, else its folder on this machine."""
    is_hub_id = pretrained.count("/") == 1 and not Path(pretrained).is_dir()
    return pretrained if is_hub_id else str(resolve_source(pretrained).resolve())


@dataclass(frozen=True)
class Verification:
    """Largest absolute differences between plain diffusers and our sampler."""

    grid_error: float
    picture_error: float
    pictures: int

    @property
    def passed(self) -> bool:
        return self.grid_error <= TOLERANCE and self.picture_error <= TOLERANCE


# Runs in its own interpreter, in which importing fastgen fails: what users of plain diffusers get.
_PLAIN_DIFFUSERS = """
import json, sys
sys.modules["fastgen"] = None
import numpy, torch
job = json.load(sys.stdin)
import diffusers
diffusers.utils.logging.set_verbosity_error()
if job["base"]:
    pipe = diffusers.DiffusionPipeline.from_pretrained(job["base"], torch_dtype=torch.float32)
    pipe.load_lora_weights(job["folder"])
    name = json.load(open(job["folder"] + "/scheduler/scheduler_config.json"))["_class_name"]
    pipe.scheduler = getattr(diffusers, name).from_pretrained(job["folder"], subfolder="scheduler")
else:
    pipe = diffusers.DiffusionPipeline.from_pretrained(job["folder"])
pipe.set_progress_bar_config(disable=True)
generators = [torch.Generator().manual_seed(seed) for seed in job["seeds"]]
images = pipe(job["prompts"], generator=generators, output_type="np", **job["call"]).images
numpy.savez(job["output"], images=images, sigmas=pipe.scheduler.sigmas.double().numpy())
"""


def verify(folder: Path, *, seeds: Sequence[int] = (0, 1, 2, 3)) -> Verification:
    """Reload `folder` with plain diffusers, where importing fastgen fails, and compare its grid and pictures with ours in fp32."""
    manifest = read_manifest(folder)
    _check_hashes(folder, manifest.get("sha256", {}))
    prompts = [manifest["prompts"][i % len(manifest["prompts"])] for i in range(len(seeds))]
    images, sigmas = _plain_diffusers(folder, manifest, prompts, seeds)
    student = load_student(folder)
    ours = student(prompts, seeds).permute(0, 2, 3, 1).numpy()
    if images.shape != ours.shape or sigmas.shape != (manifest["steps"] + 1,):
        raise UserError(
            f"{str(folder)!r}: plain diffusers gives pictures {images.shape} on {len(sigmas) - 1} steps, ours are {ours.shape} on {manifest['steps']}"
        )
    grid = np.array([*manifest["grid"], 0.0])
    grid_error = max(np.abs(sigmas - grid).max(), np.abs(student.times().numpy() - grid[:-1]).max())
    return Verification(float(grid_error), float(np.abs(images - ours).max()), len(ours))


def _plain_diffusers(folder: Path, manifest: dict[str, Any], prompts: list[str], seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    is_lora = manifest["weights"] == "lora"
    with tempfile.TemporaryDirectory() as scratch:
        job = {
            "folder": str(folder.resolve()),
            "base": manifest["base"] if is_lora else None,
            "prompts": prompts,
            "seeds": list(seeds),
            "call": manifest["call"],
            "output": f"{scratch}/plain.npz",
        }
        # `-P` keeps the current folder off the path; the child needs nothing of ours.
        done = subprocess.run([sys.executable, "-P", "-c", _PLAIN_DIFFUSERS], input=json.dumps(job), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{str(folder)!r} does not load and run in plain diffusers: {reason}")
        with np.load(job["output"]) as arrays:
            return arrays["images"], arrays["sigmas"]
