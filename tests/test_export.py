"""An exported student is a plain diffusers folder that draws what the trained role drew; `verify` says so, and says when it does not."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from pipelines import (
    NEGATIVE,
    PROMPTS,
    adapter_tuning,
    assert_shows,
    draw,
    edit_json,
    in_a_run,
    record_hashes,
    run_snippet,
    student_info,
    student_role,
    tiny_sd3,
)
from pipelines import same_interpreter as same_interpreter
from pipelines import sd3_folder as sd3_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen import card, export
from fastgen.errors import UserError
from fastgen.export import StudentInfo, export_lora, export_student, verify
from fastgen.families import resolve_source
from fastgen.families.base import Family
from fastgen.families.sd3 import SD3
from fastgen.generator import ImageGenerator, load_student, load_teacher, read_manifest
from fastgen.roles import Role, Roles, build_roles, trainable

TOKENS = 16
SEEDS = [0, 1, 2]


def pictures(role: Role, info: StudentInfo) -> Tensor:
    """What the role draws in memory, before any export."""
    family = role.denoiser.family
    settings = {"steps": info.steps, "guidance": info.guidance, "negative_prompt": info.teacher["negative_prompt"], "grid": info.grid}
    return ImageGenerator(family, role.predictor, **settings)(PROMPTS, SEEDS)


@pytest.fixture(scope="module")
def family(sd3_folder: Path) -> SD3:
    return SD3(sd3_folder, max_sequence_length=TOKENS)


@pytest.fixture(scope="module")
def exported(sd3_folder: Path, family: SD3, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A student's folder, and its pictures before the export."""
    role, info = student_role(family), student_info(sd3_folder)
    expected = pictures(role, info)
    return export_student(role, family, info, tmp_path_factory.mktemp("exports") / "student"), expected


@pytest.fixture
def copied(exported: tuple[Path, Tensor], tmp_path: Path) -> Path:
    """The student's folder, to spoil."""
    return shutil.copytree(exported[0], tmp_path / "student")


def test_plain_diffusers_loads_native_classes_and_draws_the_roles_pictures(exported: tuple[Path, Tensor], sd3_folder: Path) -> None:
    folder, expected = exported
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    libraries = {value[0] for value in index.values() if isinstance(value, list)}
    assert libraries == {"diffusers", "transformers", None}
    for file in folder.rglob("*config.json"):
        assert "fastgen" not in file.read_text(), file
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is StableDiffusion3Pipeline
    assert type(pipeline.transformer) is SD3Transformer2DModel
    assert type(pipeline.scheduler) is FlowMapEulerDiscreteScheduler
    drawn = draw(pipeline, PROMPTS, SEEDS, **read_manifest(folder)["call"])
    assert (drawn - expected).abs().max() <= 1e-5
    teacher = load_teacher(sd3_folder, steps=4, guidance=1.0, max_sequence_length=TOKENS)
    assert (teacher(PROMPTS, SEEDS) - expected).abs().max() > 1e-3, "the perturbed student must differ from its teacher"


def test_manifest_records_the_call_the_grid_and_where_it_comes_from(exported: tuple[Path, Tensor], sd3_folder: Path) -> None:
    manifest = read_manifest(exported[0])
    assert manifest["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 16, "height": 16, "width": 16}
    assert manifest["grid"] == pytest.approx([1, 0.9, 0.75, 0.5], abs=1e-12)
    assert (manifest["steps"], manifest["weights"], manifest["dtype"], manifest["method"]) == (4, "full", "fp32", "dmd2")
    assert manifest["pipeline"] == "StableDiffusion3Pipeline"
    assert manifest["teacher"] == {"pretrained": sd3_folder.name, "guidance": 4.0, "negative_prompt": NEGATIVE}
    assert manifest["sha256"] == {
        path.relative_to(exported[0]).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in exported[0].rglob("*")
        if path.is_file() and path.name not in ("README.md", "fastgen.json")
    }
    assert manifest["prompts"] == PROMPTS
    assert manifest["recipe"] == {"train": {"seed": 0}}
    assert manifest["versions"].keys() == {"fastgen", "diffusers", "torch"}
    assert not any(path.name.startswith(".partial") for path in exported[0].parent.iterdir())


def test_an_exported_student_can_be_exported_and_taught_from_again(exported: tuple[Path, Tensor], tmp_path: Path) -> None:
    again = SD3(exported[0])
    assert (again.max_sequence_length, again.shift) == (TOKENS, 3.0)
    info = student_info(exported[0])
    folder = export_student(student_role(again, noise=0.0), again, info, tmp_path / "again")
    assert (load_student(folder)(PROMPTS, SEEDS) - exported[1]).abs().max() <= 1e-6


def test_verify_passes_in_a_fresh_interpreter(exported: tuple[Path, Tensor]) -> None:
    result = verify(exported[0], seeds=(0, 1))
    assert result.passed
    assert result.pictures == 2
    assert result.grid_error <= 1e-12
    assert result.picture_error <= 1e-5


@pytest.mark.parametrize("statement", ["import fastgen", "from fastgen.families import sd3"])
def test_verifys_interpreter_cannot_import_fastgen(exported: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch, statement: str) -> None:
    assert "import numpy, torch" in export._PLAIN_DIFFUSERS
    monkeypatch.setattr(export, "_PLAIN_DIFFUSERS", export._PLAIN_DIFFUSERS.replace("import numpy, torch", statement))
    with pytest.raises(UserError, match=r"does not load and run in plain diffusers: ModuleNotFoundError: .*fastgen"):
        verify(exported[0])


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize(
    ("settings", "resolution"),
    [({"guidance": 5.0}, None), ({"guidance": 5.0, "steps": 1}, 24), ({"grid": [1.0, 0.8, 0.3], "steps": 3}, None), ({"steps": 2}, 24)],
)
def test_verify_passes_with_guidance_other_sizes_and_an_explicit_grid(
    sd3_folder: Path, tmp_path: Path, settings: dict[str, Any], resolution: int | None
) -> None:
    family = SD3(sd3_folder, max_sequence_length=TOKENS, resolution=resolution)
    folder = export_student(student_role(family), family, student_info(sd3_folder, **settings), tmp_path / "student")
    result = verify(folder, seeds=SEEDS)
    assert result.passed, result


@pytest.mark.usefixtures("same_interpreter")
def test_verify_notices_another_shift(copied: Path) -> None:
    edit_json(copied / "scheduler" / "scheduler_config.json", shift=2.0)
    result = verify(copied)
    assert not result.passed
    assert result.grid_error == pytest.approx(1 / 2 - 2 / 5, abs=1e-6)  # at 1/4: 3 t/(1 + 2 t) = 1/2 is now 2 t/(1 + t) = 2/5


@pytest.mark.usefixtures("same_interpreter")
def test_verify_notices_the_scheduler_that_shifts_twice(copied: Path) -> None:
    edit_json(copied / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    edit_json(copied / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    result = verify(copied)
    assert not result.passed
    assert result.grid_error == pytest.approx(0.5 - 0.0089, abs=1e-4)
    assert result.picture_error > 1e-3


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize("call", [{"num_inference_steps": 3}, {"height": 24, "width": 16}])
def test_verify_notices_a_wrong_call(copied: Path, call: dict[str, Any]) -> None:
    edit_json(copied / "fastgen.json", call=read_manifest(copied)["call"] | call)
    with pytest.raises(UserError, match=r"plain diffusers gives pictures \(4, .* on \d steps, ours are"):
        verify(copied)


@pytest.mark.usefixtures("same_interpreter")
def test_verify_says_why_a_broken_folder_does_not_load(copied: Path) -> None:
    (copied / "text_encoder" / "config.json").unlink()
    record_hashes(copied)
    with pytest.raises(UserError, match=r"student' does not load and run in plain diffusers: \w+: .+"):
        verify(copied)


def test_a_weight_changed_after_the_export_shows_against_the_role(copied: Path, exported: tuple[Path, Tensor]) -> None:
    (path,) = (copied / "transformer").glob("*.safetensors")
    weights = load_file(path)
    weights["proj_out.weight"][0, 0] += 0.5
    save_file(weights, path, metadata={"format": "pt"})
    drawn = draw(DiffusionPipeline.from_pretrained(copied), PROMPTS, SEEDS, **read_manifest(copied)["call"])
    assert (drawn - exported[1]).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"transformer/\S+\.safetensors': it is not the file that was exported"):
        verify(copied)


def weight_bytes(folder: Path) -> int:
    return sum(value.nbytes for file in folder.rglob("*.safetensors") for value in load_file(file).values())


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize(("name", "dtype", "error"), [("bf16", torch.bfloat16, 0.05), ("fp16", torch.float16, 5e-3)])
def test_half_precision_export(
    exported: tuple[Path, Tensor], sd3_folder: Path, family: SD3, tmp_path: Path, name: str, dtype: torch.dtype, error: float
) -> None:
    role = student_role(family)
    before = {key: value.clone() for key, value in role.state_dict().items()}
    folder = export_student(role, family, student_info(sd3_folder), tmp_path / "student", dtype=name)
    assert weight_bytes(folder) * 2 == weight_bytes(exported[0])
    assert {value.dtype for file in folder.rglob("*.safetensors") for value in load_file(file).values()} == {dtype}
    assert read_manifest(folder)["dtype"] == name
    assert verify(folder).passed
    drawn = load_student(folder)(PROMPTS, SEEDS)
    assert 0 < (drawn - exported[1]).abs().max() < error
    after = role.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype == torch.float32 for key, value in before.items())


def test_export_leaves_a_live_teacher_as_it_was(tmp_path: Path) -> None:
    live = tiny_sd3()
    before = {name: module.state_dict() for name, module in live.components.items() if isinstance(module, torch.nn.Module)}
    before = {name: {key: value.clone() for key, value in state.items()} for name, state in before.items()}
    family = SD3(live, max_sequence_length=TOKENS)
    export_student(student_role(family), family, student_info("live"), tmp_path / "student", dtype="bf16")
    for name, state in before.items():
        for key, value in getattr(live, name).state_dict().items():
            assert value.dtype == state[key].dtype, (name, key)
            assert torch.equal(value, state[key]), (name, key)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fail(*_: Any, **__: Any) -> None:
    raise OSError("no space left on device")


@pytest.mark.parametrize(
    "where",
    [
        lambda patch: patch.setattr(FlowMapEulerDiscreteScheduler, "save_pretrained", fail),
        lambda patch: patch.setattr(StableDiffusion3Pipeline, "save_pretrained", fail),
        lambda patch: patch.setattr(export.card, "model_card", fail),
        lambda patch: patch.setattr(export, "_manifest", fail),
        lambda patch: patch.setattr(export.os, "replace", fail),
    ],
    ids=["scheduler", "pipeline", "card", "manifest", "rename"],
)
@pytest.mark.parametrize("replacing", [True, False])
def test_a_failing_export_leaves_the_old_student_and_no_half_one(
    copied: Path,
    sd3_folder: Path,
    family: SD3,
    monkeypatch: pytest.MonkeyPatch,
    where: Callable[[pytest.MonkeyPatch], None],
    replacing: bool,
) -> None:
    if not replacing:
        shutil.rmtree(copied)
    old = contents(copied)
    with monkeypatch.context() as patch:
        where(patch)
        with pytest.raises(UserError, match=r"cannot write .*: no space left"):
            export_student(student_role(family, seed=2), family, student_info(sd3_folder), copied)
    assert contents(copied) == old
    assert copied.exists() == replacing
    students = [path for path in copied.parent.iterdir() if (path / "fastgen.json").exists()]
    assert students == ([copied] if replacing else [])


def test_a_new_export_replaces_the_old_one_whole(copied: Path, sd3_folder: Path, family: SD3, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "stale.txt").write_text("from the old student")
    monkeypatch.chdir(copied.parent)
    export_student(student_role(family, seed=2), family, student_info(sd3_folder, steps=2), Path("student"))
    assert not (copied / "stale.txt").exists()
    assert read_manifest(copied)["steps"] == 2
    assert [path.name for path in copied.parent.iterdir()] == ["student"]


def adapter_roles(family: Family) -> Roles:
    """A student and a fake score as adapters of one base, both moved away from it, differently."""
    roles = build_roles({"fake_score": trainable(), "student": trainable()}, family, family.load_backbone(), tuning=adapter_tuning())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for role in roles.values():
            for parameter in role.parameters().values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return roles


@pytest.mark.usefixtures("same_interpreter")
def test_a_lora_export_draws_the_roles_pictures_on_the_plain_teacher(sd3_folder: Path, family: SD3, tmp_path: Path) -> None:
    roles, info = adapter_roles(family), student_info(sd3_folder)
    expected = pictures(roles["student"], info)
    folder = in_a_run(export_lora(roles["student"], family, info, tmp_path / "student"), sd3_folder)
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_folder)
    plain = draw(pipeline, PROMPTS, SEEDS, **read_manifest(folder)["call"])
    pipeline.load_lora_weights(str(folder))
    pipeline.scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    drawn = draw(pipeline, PROMPTS, SEEDS, **read_manifest(folder)["call"])
    assert (drawn - expected).abs().max() <= 1e-5
    assert (plain - expected).abs().max() > 1e-3
    assert (pictures(roles["fake_score"], info) - expected).abs().max() > 1e-3
    assert (load_student(folder)(PROMPTS, SEEDS) - expected).abs().max() <= 1e-5
    assert verify(folder).passed
    assert torch.equal(pictures(roles["student"], info), expected), "exporting an adapter must not touch the role"
    (weights,) = folder.glob("*.safetensors")
    state = load_file(weights)
    assert len(state) == len(roles["student"].parameters())
    assert all(key.startswith("transformer.") and ".lora_" in key for key in state)


def test_an_adapters_code_loads_the_scheduler_that_its_family_exports(sd3_folder: Path, tmp_path: Path) -> None:
    class Other(SD3):
        def export_scheduler(self, grid: Any = None) -> Any:
            return FlowMatchEulerDiscreteScheduler(shift=1.5)

    family = Other(sd3_folder, max_sequence_length=TOKENS)
    folder = export_lora(adapter_roles(family)["student"], family, student_info(sd3_folder), tmp_path / "student")
    assert read_manifest(folder)["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    names: dict[str, Any] = {}
    exec(card.loading(read_manifest(folder), str(folder), str(sd3_folder)), names)
    assert type(names["pipe"].scheduler) is FlowMatchEulerDiscreteScheduler
    assert names["pipe"].scheduler.config["shift"] == 1.5


@pytest.mark.usefixtures("same_interpreter")
def test_verify_notices_another_scheduler_beside_an_adapter(sd3_folder: Path, family: SD3, tmp_path: Path) -> None:
    folder = in_a_run(export_lora(adapter_roles(family)["student"], family, student_info(sd3_folder), tmp_path / "student"), sd3_folder)
    edit_json(folder / "scheduler" / "scheduler_config.json", shift=1.0)
    assert verify(folder).grid_error == pytest.approx(0.25, abs=1e-6)


@pytest.mark.usefixtures("same_interpreter")
def test_a_merged_export_draws_the_adapters_pictures(sd3_folder: Path, family: SD3, tmp_path: Path) -> None:
    roles, info = adapter_roles(family), student_info(sd3_folder)
    expected = pictures(roles["student"], info)
    folder = export_student(roles["student"], family, info, tmp_path / "student")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    names = [name for name, _ in pipeline.transformer.named_parameters()]
    assert names == [name for name, _ in family.load_backbone(meta=True).named_parameters()]
    assert (draw(pipeline, PROMPTS, SEEDS, **read_manifest(folder)["call"]) - expected).abs().max() <= 1e-5
    assert (pictures(roles["student"], info) - expected).abs().max() <= 1e-5
    assert verify(folder).passed


def test_export_lora_of_a_full_student_is_refused(sd3_folder: Path, family: SD3, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--lora: .*student\.tune: full has no adapter"):
        export_lora(student_role(family), family, student_info(sd3_folder), tmp_path / "student")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_cards_snippet_draws_our_picture_without_fastgen(
    sd3_folder: Path, family: SD3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guidance: float, dtype: str
) -> None:
    folder = export_student(student_role(family), family, student_info(sd3_folder, guidance=guidance), tmp_path / "student", dtype=dtype)
    assert_shows(run_snippet(monkeypatch, folder), load_student(folder)(PROMPTS[:1], [0]))


def test_the_snippet_of_an_explicit_grid_and_of_an_adapter(sd3_folder: Path, family: SD3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gridded = export_student(student_role(family), family, student_info(sd3_folder, grid=[1.0, 0.8, 0.3], steps=3), tmp_path / "gridded")
    adapter = in_a_run(export_lora(adapter_roles(family)["student"], family, student_info(sd3_folder), tmp_path / "adapter"), sd3_folder)
    for folder in (gridded, adapter):
        assert_shows(run_snippet(monkeypatch, folder), load_student(folder)(PROMPTS[:1], [0]))


@pytest.mark.usefixtures("same_interpreter")
def test_an_adapter_for_the_bundled_teacher_verifies_and_its_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = SD3("fastgen:digits")
    info = student_info("fastgen:digits", prompts=["the digit seven"], guidance=1.5)
    folder = export_lora(adapter_roles(family)["student"], family, info, tmp_path / "student")
    assert verify(folder).passed
    assert_shows(run_snippet(monkeypatch, folder), load_student(folder)(["the digit seven"], [0]))


@pytest.mark.usefixtures("same_interpreter")
def test_the_bundled_teacher_verifies() -> None:
    assert verify(resolve_source("fastgen:digits")).passed


@pytest.mark.parametrize(("pretrained", "base"), [("owner/teacher", "owner/teacher"), ("fastgen:digits", None), ("/models/teacher", None)])
def test_model_card_header(sd3_folder: Path, family: SD3, tmp_path: Path, pretrained: str, base: str | None) -> None:
    teacher = {"pretrained": pretrained, "guidance": 4.0, "negative_prompt": ""}
    folder = export_student(student_role(family), family, student_info(sd3_folder, teacher=teacher), tmp_path / "student")
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(header)
    assert (card["library_name"], card["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert card.get("base_model") == base
    assert card.get("base_model_relation") == (None if base is None else "finetune")
    assert "fastgen" in card["tags"]
    assert "in 4 network evaluations, without classifier-free guidance, at times [1.0, 0.9, 0.75, 0.5]" in body


def test_a_card_shows_any_name_and_prompt_as_it_is(sd3_folder: Path, family: SD3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the code still runs."""
    name, prompt = "my `teacher` [x](y) <b>\x1b", 'a ```cat``` """ \\ <b> \u202e ü\n```\nend'
    (tmp_path / name).symlink_to(sd3_folder)
    info = student_info(tmp_path / name, prompts=[prompt])
    full = export_student(student_role(family), family, info, tmp_path / "student")
    adapter = in_a_run(export_lora(adapter_roles(family)["student"], family, info, tmp_path / "adapter"), tmp_path / name)
    for folder in (full, adapter):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert "from `` my `teacher` [x](y) <b>\\x1b `` (guidance" in text
        assert "\x1b" not in text and "\u202e" not in text
        assert len(re.findall("(?m)^ {0,3}```", text)) == 2  # no fence but the code's own
        assert_shows(run_snippet(monkeypatch, folder), load_student(folder)([prompt], [0]))


def test_a_hub_id_in_the_cards_header_is_a_string(sd3_folder: Path, family: SD3, tmp_path: Path) -> None:
    teacher = {"pretrained": "owner/a: [b] # c", "guidance": 4.0, "negative_prompt": ""}
    folder = export_student(student_role(family), family, student_info(sd3_folder, teacher=teacher), tmp_path / "student")
    assert yaml.safe_load((folder / "README.md").read_text().split("---\n", 2)[1])["base_model"] == "owner/a: [b] # c"
