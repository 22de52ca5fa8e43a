"""Students of several experts: plain diffusers changes between them where our sampler does, in every form in which they are exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline, WanPipeline
from pipelines import (
    PROMPTS,
    adapter_tuning,
    assert_shows,
    card_snippet,
    draw,
    edit_json,
    in_a_run,
    run_snippet,
    student_info,
    without_fastgen,
)
from pipelines import same_interpreter as same_interpreter
from pipelines import sd3_folder as sd3_folder
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan import tiny_wan, wan

from fastgen import cli, load_teacher, run
from fastgen.config import Recipe, validate
from fastgen.errors import UserError
from fastgen.export import Expert, export_lora, export_student, verify
from fastgen.families import resolve_source
from fastgen.families.base import Family
from fastgen.families.sd3 import SD3
from fastgen.families.wan import Wan
from fastgen.generator import load_student, noise_from_seeds, read_manifest
from fastgen.plan import plan
from fastgen.roles import LoraTuning, build_roles, student
from fastgen.surgery.second_time import Defaults

SEEDS = [0, 1, 2]
TOKENS = 16
# On the grid 1, .9, .75, .5: the ends of each expert's share, and the expert of each step.
TWO, OF_TWO = [0.75, 0.0], [0, 0, 1, 1]
THREE, OF_THREE = [0.9, 0.5, 0.0], [0, 1, 1, 2]


def make_experts(family: Family, ends: Sequence[float], *, tuning: LoraTuning | None = None, inputs: Any = (), noise: float = 0.03) -> list[Expert]:
    """Experts that all moved away from the teacher, each its own way."""
    names = [f"student_{k}" if k else "student" for k in range(len(ends))]
    defaults = Defaults.on(family.path, family.grid(4), 4.0)
    roles = build_roles(dict.fromkeys(names, student(inputs=inputs)), family, family.load_backbone(), tuning=tuning, defaults=defaults)
    noises = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for role in roles.values():
            for parameter in role.parameters().values():
                parameter.add_((3 * noise if tuning else noise) * torch.randn(parameter.shape, generator=noises))
    return [Expert(roles[name], end) for name, end in zip(names, ends, strict=True)]


@torch.no_grad()
def by_hand(family: Family, experts: Sequence[Expert], which: Sequence[int]) -> Tensor:
    """Latents after Euler steps with expert which[i] at step i, in memory and without our sampler."""
    cond, x = family.encode_prompts(PROMPTS), noise_from_seeds(SEEDS, family.latent.shape)
    for k, (t, after) in zip(which, pairwise([*family.grid(len(which)).tolist(), 0.0]), strict=True):
        x = x + (after - t) * experts[k].role.predictor(x, torch.full((len(x),), t, dtype=torch.float64), cond, "velocity")
    return x.float()


def pictures(family: Family, experts: Sequence[Expert], which: Sequence[int]) -> Tensor:
    return family.decode_latents(by_hand(family, experts, which))


@pytest.fixture(scope="module")
def family(sd3_folder: Path) -> SD3:
    return SD3(sd3_folder, max_sequence_length=TOKENS)


@pytest.fixture(scope="module")
def exported(sd3_folder: Path, family: SD3, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Expert]]:
    """Two experts of full weights."""
    experts = make_experts(family, TWO)
    return export_student(experts, family, student_info(sd3_folder), tmp_path_factory.mktemp("exports") / "student"), experts


@pytest.fixture(scope="module")
def adapters(sd3_folder: Path, family: SD3, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Expert]]:
    """Two experts as adapters of one network."""
    experts = make_experts(family, TWO, tuning=adapter_tuning())
    folder = export_lora(experts, family, student_info(sd3_folder), tmp_path_factory.mktemp("exports") / "adapters")
    return in_a_run(folder, sd3_folder), experts


@pytest.fixture
def copied(exported: tuple[Path, list[Expert]], tmp_path: Path) -> Path:
    """The exported folder, to spoil."""
    return shutil.copytree(exported[0], tmp_path / "student")


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize(("ends", "which"), [(TWO, OF_TWO), (THREE, OF_THREE)], ids=["two", "three"])
@pytest.mark.parametrize("form", ["full", "merged", "lora"])
def test_every_form_draws_what_the_experts_draw_in_turn(
    form: str, ends: list[float], which: list[int], sd3_folder: Path, family: SD3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = make_experts(family, ends, tuning=None if form == "full" else adapter_tuning())
    expected = pictures(family, experts, which)
    for k in range(len(ends)):
        assert (pictures(family, experts, [k] * 4) - expected).abs().max() > 1e-3, "every expert must show"
    export_it = export_lora if form == "lora" else export_student
    folder = in_a_run(export_it(experts, family, student_info(sd3_folder), tmp_path / "student"), sd3_folder)
    assert (load_student(folder)(PROMPTS, SEEDS) - expected).abs().max() <= 1e-5
    result = verify(folder, seeds=SEEDS)
    assert result.passed, result
    assert_shows(run_snippet(monkeypatch, folder), expected[:1])
    if form != "full":
        assert torch.equal(pictures(family, experts, which), expected), "exporting adapters must not touch the roles"


def test_the_folder_is_an_ordinary_pipeline_of_the_first_expert(exported: tuple[Path, list[Expert]], family: SD3) -> None:
    folder, experts = exported
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is StableDiffusion3Pipeline
    drawn = draw(pipeline, PROMPTS, SEEDS, **read_manifest(folder)["call"])
    assert (drawn - pictures(family, experts, [0] * 4)).abs().max() <= 1e-5
    assert "expert_2" not in json.loads((folder / "model_index.json").read_text())
    assert type(SD3Transformer2DModel.from_pretrained(folder, subfolder="expert_2")) is SD3Transformer2DModel
    assert {path.name for path in (folder / "expert_2").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_the_manifest_says_who_serves_what(
    exported: tuple[Path, list[Expert]], adapters: tuple[Path, list[Expert]], sd3_folder: Path, family: SD3, tmp_path: Path
) -> None:
    full, lora = read_manifest(exported[0]), read_manifest(adapters[0])
    assert full["experts"] == [{"end": 0.75, "steps": [0, 1], "where": "transformer"}, {"end": 0.0, "steps": [2, 3], "where": "expert_2"}]
    assert lora["experts"] == [{"end": 0.75, "steps": [0, 1], "where": "expert_1"}, {"end": 0.0, "steps": [2, 3], "where": "expert_2"}]
    assert {"expert_2/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors"} <= full["sha256"].keys()
    assert lora["sha256"].keys() == {*(f"expert_{k}/pytorch_lora_weights.safetensors" for k in (1, 2)), "scheduler/scheduler_config.json"}
    alone, info = make_experts(family, [0.0]), student_info(sd3_folder)
    one = read_manifest(export_student(alone, family, info, tmp_path / "one"))
    role = read_manifest(export_student(alone[0].role, family, info, tmp_path / "role"))
    assert json.dumps(one) == json.dumps(role)
    assert full.keys() - one.keys() == {"experts"}
    assert lora.keys() - one.keys() == {"experts", "base"}


def test_each_adapter_loads_on_the_plain_teacher(adapters: tuple[Path, list[Expert]], sd3_folder: Path, family: SD3) -> None:
    folder, experts = adapters
    assert {path.name for path in folder.iterdir()} == {"README.md", "fastgen.json", "scheduler", "expert_1", "expert_2"}
    for k in (0, 1):
        pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_folder, scheduler=family.export_scheduler())
        pipeline.load_lora_weights(str(folder / f"expert_{k + 1}"))
        drawn = draw(pipeline, PROMPTS, SEEDS, **read_manifest(folder)["call"])
        assert (drawn - pictures(family, experts, [k] * 4)).abs().max() <= 1e-5


def test_other_numbers_of_steps_are_divided_by_time(exported: tuple[Path, list[Expert]], adapters: tuple[Path, list[Expert]], family: SD3) -> None:
    # 3u/(1 + 2u): 1, 6/7, 3/5 in three steps; in six the fourth is 3/4, which belongs to the second.
    assert family.grid(6)[3].item() == pytest.approx(0.75)
    for folder, experts in (exported, adapters):
        found = load_student(folder)
        for which in ([0, 0, 1], [0, 0, 0, 1, 1, 1], [0]):
            assert (found(PROMPTS, SEEDS, len(which)) - pictures(family, experts, which)).abs().max() <= 1e-5


def test_the_teacher_can_take_the_first_step(exported: tuple[Path, list[Expert]], sd3_folder: Path, family: SD3) -> None:
    folder, experts = exported
    teacher = load_teacher(sd3_folder, guidance=1.0, max_sequence_length=TOKENS)
    base = build_roles({"teacher": student()}, family, family.load_backbone())["teacher"]
    expected = by_hand(family, [*experts, Expert(base)], [2, 0, 1, 1])
    drawn = load_student(folder).with_first_step(teacher, 1).latents(PROMPTS, SEEDS)
    assert (drawn - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_second_picture_needs_the_line_that_starts_with_the_first_expert(
    form: str, exported: tuple[Path, list[Expert]], adapters: tuple[Path, list[Expert]], family: SD3, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, experts = exported if form == "full" else adapters
    snippet, names = card_snippet(folder), dict[str, Any]()
    reset = "pipe.transformer = experts[0]" if form == "full" else "pipe.set_adapters(experts[0])"
    call = snippet[snippet.index("image = pipe(") :]
    without_fastgen(monkeypatch, snippet, names)
    first = np.asarray(names["image"])
    without_fastgen(monkeypatch, call, names)
    assert_shows(np.asarray(names["image"]), pictures(family, experts, [1] * 4)[:1])
    without_fastgen(monkeypatch, snippet[snippet.index(reset) :], names)
    np.testing.assert_array_equal(np.asarray(names["image"]), first)


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize("form", ["full", "lora"])
def test_with_guidance_and_an_explicit_grid(form: str, sd3_folder: Path, family: SD3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make_experts(family, [0.3, 0.0], tuning=adapter_tuning() if form == "lora" else None)
    info = student_info(sd3_folder, grid=[0.98, 0.8, 0.3], steps=3, guidance=5.0)
    folder = in_a_run((export_lora if form == "lora" else export_student)(experts, family, info, tmp_path / "student"), sd3_folder)
    assert [expert["steps"] for expert in read_manifest(folder)["experts"]] == [[0, 1], [2]]
    assert verify(folder, seeds=SEEDS).passed
    assert_shows(run_snippet(monkeypatch, folder), load_student(folder)(PROMPTS[:1], [0]))


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize(("name", "dtype", "error"), [("bf16", torch.bfloat16, 0.05), ("fp16", torch.float16, 5e-3)])
def test_half_precision_holds_for_every_expert(
    exported: tuple[Path, list[Expert]],
    sd3_folder: Path,
    family: SD3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dtype: Any,
    error: float,
) -> None:
    experts = make_experts(family, TWO)
    folder = export_student(experts, family, student_info(sd3_folder), tmp_path / "student", dtype=name)
    assert {value.dtype for file in folder.rglob("*.safetensors") for value in load_file(file).values()} == {dtype}
    assert verify(folder).passed
    expected = pictures(family, exported[1], OF_TWO)
    assert (pictures(family, experts, OF_TWO) - expected).abs().max() <= 1e-5, "the roles go on in fp32"
    assert 0 < (load_student(folder)(PROMPTS, SEEDS) - expected).abs().max() < error
    assert_shows(run_snippet(monkeypatch, folder), load_student(folder)(PROMPTS[:1], [0]))


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize("tuning", [None, adapter_tuning()], ids=["full", "merged"])
def test_scalar_inputs_are_folded_in_every_expert(tuning: LoraTuning | None, sd3_folder: Path, family: SD3, tmp_path: Path) -> None:
    experts = make_experts(family, TWO, tuning=tuning, inputs=("second_time",), noise=0.01)
    expected = pictures(family, experts, OF_TWO)
    with pytest.MonkeyPatch.context() as patch:
        for expert in experts:
            patch.setitem(expert.role.denoiser._modules, "inputs", None)
        assert (pictures(family, experts, OF_TWO) - expected).abs().max() > 1e-3
    folder = export_student(experts, family, student_info(sd3_folder), tmp_path / "student")
    assert verify(folder).passed
    assert (load_student(folder)(PROMPTS, SEEDS) - expected).abs().max() <= 1e-4
    with pytest.raises(UserError, match="--steps: 3, but this student was made for 4"):
        load_student(folder)(PROMPTS, SEEDS, 3)


@pytest.mark.usefixtures("same_interpreter")
def test_verify_notices_code_that_changes_elsewhere(copied: Path) -> None:
    experts = read_manifest(copied)["experts"]
    edit_json(copied / "fastgen.json", experts=[experts[0] | {"steps": [0]}, experts[1] | {"steps": [1, 2, 3]}])
    result = verify(copied)
    assert result.grid_error <= 1e-12
    assert result.picture_error > 1e-3


def test_verify_notices_a_changed_expert(copied: Path) -> None:
    path = copied / "expert_2" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["proj_out.weight"][0, 0] += 0.5
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"expert_2/\S+\.safetensors': it is not the file that was exported"):
        verify(copied)


def test_a_missing_expert_is_named(copied: Path, adapters: tuple[Path, list[Expert]], tmp_path: Path) -> None:
    shutil.rmtree(copied / "expert_2")
    with pytest.raises(UserError, match=r"cannot read '.*student/expert_2/config\.json'"):
        load_student(copied)
    folder = shutil.copytree(adapters[0], tmp_path / "adapters")
    shutil.rmtree(folder / "expert_2")
    with pytest.raises(UserError, match=r"cannot read '.*expert_2/pytorch_lora_weights\.safetensors'"):
        load_student(folder)
    experts = read_manifest(copied)["experts"]
    del experts[1]["where"]
    edit_json(copied / "fastgen.json", experts=experts)
    with pytest.raises(UserError, match=r"key experts\.1\.where: missing; export the student again"):
        read_manifest(copied)


@pytest.mark.parametrize("changed", [{"call": {"a=print(1),b": 1, "num_inference_steps": 4, "guidance_scale": 1.0}}, {"where": "transformer; x"}])
def test_verify_runs_no_code_from_a_manifest(changed: dict[str, Any], copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "where" in changed:
        changed = {"experts": [read_manifest(copied)["experts"][0] | changed, read_manifest(copied)["experts"][1]]}
    edit_json(copied / "fastgen.json", **changed)
    monkeypatch.setattr("fastgen.export.subprocess.run", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(UserError, match=r"fastgen\.json names '.*', which no exported student does"):
        verify(copied)


def test_a_failing_expert_leaves_the_old_student(copied: Path, family: SD3, sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {str(path.relative_to(copied)): path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    save = SD3Transformer2DModel.save_pretrained

    def fail(self: Any, folder: Path, **options: Any) -> None:
        if Path(folder).name == "expert_2":
            raise OSError("no space left on device")
        save(self, folder, **options)

    monkeypatch.setattr(SD3Transformer2DModel, "save_pretrained", fail)
    with pytest.raises(UserError, match=r"cannot write .*no space left"):
        export_student(make_experts(family, THREE), family, student_info(sd3_folder), copied)
    assert {str(path.relative_to(copied)): path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    assert [path.name for path in copied.parent.iterdir()] == ["student"]


def test_the_card_says_how_the_experts_divide_the_steps(exported: tuple[Path, list[Expert]], adapters: tuple[Path, list[Expert]]) -> None:
    full, lora = (" ".join((folder / "README.md").read_text().split()) for folder, _ in (exported, adapters))
    assert "It has 2 experts, which divide the steps: `transformer` takes steps 1 to 2, `expert_2` takes steps 3 to 4." in full
    assert "it holds for this number of steps" in full
    assert "`pipe.to` moves the first expert alone: move the others too." in full
    assert "It has 2 experts, which divide the steps: `expert_1` takes steps 1 to 2, `expert_2` takes steps 3 to 4." in lora
    assert "pipe.to" not in lora


def test_a_full_expert_has_no_adapter(sd3_folder: Path, family: SD3, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--lora: .*student\.tune: full has no adapter"):
        export_lora(make_experts(family, TWO), family, student_info(sd3_folder), tmp_path / "student")
    assert list(tmp_path.iterdir()) == []


class Calls:
    """How often each network of a pipeline was called, and at which timesteps."""

    def __init__(self, pipeline: Any) -> None:
        self.of: dict[str, list[float]] = {"transformer": [], "transformer_2": []}
        for name in self.of:
            if getattr(pipeline, name) is not None:
                getattr(pipeline, name).register_forward_pre_hook(self._noting(name), with_kwargs=True)

    def _noting(self, name: str) -> Any:
        return lambda _module, _args, kwargs: self.of[name].append(kwargs["timestep"][0].item())


def wan_latents(pipeline: Any, **call: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], output_type="latent", **call).frames


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tuning", [None, LoraTuning(rank=4, alpha=12.0, targets=Wan.lora_targets)], ids=["full", "merged"])
@pytest.mark.parametrize("two_networks", [False, True], ids=["from one network", "from two"])
def test_a_pipeline_with_two_networks_changes_between_them_itself(two_networks: bool, tuning: LoraTuning | None, dtype: str, tmp_path: Path) -> None:
    family = wan(two_networks=two_networks)
    experts = make_experts(family, TWO, tuning=tuning)
    expected = by_hand(family, experts, OF_TWO)
    folder = export_student(experts, family, student_info("wan"), tmp_path / "student", dtype=dtype)
    manifest = read_manifest(folder)
    assert manifest["boundary_ratio"] == 0.825  # halfway between .9 and .75
    rows = [{"end": 0.825, "steps": [0, 1], "where": "transformer"}, {"end": 0.0, "steps": [2, 3], "where": "transformer_2"}]
    assert manifest["experts"] == rows
    assert {path.name for path in folder.iterdir()} >= {"transformer", "transformer_2"}
    assert not list(folder.glob("expert_*"))

    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is WanPipeline
    assert pipeline.config["boundary_ratio"] == 0.825
    calls = Calls(pipeline)
    drawn = wan_latents(pipeline, **manifest["call"])
    assert calls.of == {"transformer": pytest.approx([1000, 900]), "transformer_2": pytest.approx([750, 500])}
    assert (drawn - expected).abs().max() <= (1e-5 if dtype == "fp32" else 0.1)
    assert (drawn - by_hand(family, experts, [0] * 4)).abs().max() > 1e-2

    found = load_student(folder)
    for steps in (4, 1, 3, 6, 7):  # with other numbers of steps both change at the same time too
        assert (found.latents(PROMPTS, SEEDS, steps) - wan_latents(pipeline, **manifest["call"] | {"num_inference_steps": steps})).abs().max() <= 1e-5
    card = (folder / "README.md").read_text()
    assert "The pipeline itself changes between them, at its `boundary_ratio` 0.825." in card
    assert "callback" not in card


def test_timesteps_that_are_whole_numbers_find_the_same_boundary(tmp_path: Path) -> None:
    from diffusers import UniPCMultistepScheduler

    family = wan()
    pipeline = DiffusionPipeline.from_pretrained(export_student(make_experts(family, TWO), family, student_info("wan"), tmp_path / "student"))
    pipeline.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    calls = Calls(pipeline)
    wan_latents(pipeline, **family.call_arguments(4, 1.0))
    assert calls.of == {"transformer": [999, 900], "transformer_2": [750, 500]}  # 750 would be high noise with the boundary on it


@pytest.mark.parametrize(("ends", "which"), [([0.0], [0] * 4), (THREE, OF_THREE)], ids=["one", "three"])
def test_other_numbers_of_experts_leave_no_second_network(ends: list[float], which: list[int], tmp_path: Path) -> None:
    family = wan(two_networks=True)
    experts = make_experts(family, ends)
    expected = by_hand(family, experts, which)
    folder = export_student(experts, family, student_info("wan"), tmp_path / "student")
    assert "boundary_ratio" not in read_manifest(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert (pipeline.transformer_2, pipeline.config["boundary_ratio"]) == (None, None)
    names: dict[str, Any] = {"pipe": pipeline}
    snippet, more = card_snippet(folder), {}
    if len(ends) > 1:
        exec(snippet[snippet.index("experts = {") : snippet.index("video = pipe(")], names)
        more = {"callback_on_step_end": names["switch"]}
    assert (wan_latents(pipeline, **read_manifest(folder)["call"], **more) - expected).abs().max() <= 1e-5


def test_adapters_for_a_pipeline_with_two_networks(tmp_path: Path) -> None:
    tuning = LoraTuning(rank=4, alpha=12.0, targets=Wan.lora_targets)
    wan21, wan22 = (wan(two_networks=two) for two in (False, True))
    with pytest.raises(UserError, match="--lora: the teacher's WanPipeline divides sampling between two networks"):
        export_lora(make_experts(wan22, TWO, tuning=tuning), wan22, student_info("wan"), tmp_path / "refused")
    experts = make_experts(wan21, TWO, tuning=tuning)
    expected = by_hand(wan21, experts, OF_TWO)
    base = tmp_path / "base"
    tiny_wan().save_pretrained(base)
    folder = in_a_run(export_lora(experts, wan21, student_info(base), tmp_path / "student"), base)
    snippet, names = card_snippet(folder), dict[str, Any]()
    exec(snippet[: snippet.index("video = pipe(")], names)
    drawn = wan_latents(names["pipe"], **read_manifest(folder)["call"], callback_on_step_end=names["switch"])
    assert (drawn - expected).abs().max() <= 1e-5


RECIPE = {
    "teacher": {"pretrained": "fastgen:digits", "guidance": 1.5},
    "student": {"steps": 4},
    "distiller": {"name": "phased_dmd", "critic_updates": 1, "phases": [{"start": 1.0, "end": 0.5}, {"start": 0.5, "end": 0.0}]},
    "data": {"prompts": "fastgen:digits"},
    "optimizer": {"student": {"lr": 0.01}, "fake_score": {"lr": 0.01}},
    "train": {"steps": 2, "batch_size": 4, "ema": 0.0, "checkpoint_every": 0, "sample_every": 0},
    "evaluate": {"protocol": None},
}


@pytest.mark.parametrize("method", ["dmd2", "phased_dmd"])
def test_adapters_on_the_plain_teacher_reproduce_the_trainers_own_sample(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = RECIPE["distiller"] if method == "phased_dmd" else {"name": method, "critic_updates": 1}
    student_block = {"steps": 4, "tune": {"lora": {"rank": 2, "alpha": 3.0}}}
    training = RECIPE["train"] | {"ema": 0.9, "steps": 4}
    planned = plan(validate(Recipe, RECIPE | {"student": student_block, "distiller": distiller, "train": training}))
    trained = run.build(planned, run.Progress())
    prompts = list(trained.info().prompts[:3])
    trained.trainer.run([])
    now = trained.generator("student")(prompts, SEEDS)
    with trained.trainer.ema.applied():
        expected = trained.generator("student")(prompts, SEEDS)
    assert (now - expected).abs().max() > 1e-3, "the average must differ from the last weights"
    folder = export_lora(trained.averaged(), planned.family, trained.info(), tmp_path / "student")
    if method == "dmd2":
        pipeline = StableDiffusion3Pipeline.from_pretrained(resolve_source("fastgen:digits"))
        call = read_manifest(folder)["call"]
        teacher = draw(pipeline, prompts, SEEDS, **call)
        pipeline.load_lora_weights(str(folder))
        assert (draw(pipeline, prompts, SEEDS, **call) - expected).abs().max() <= 1e-5
        assert (teacher - expected).abs().max() > 1e-3
    assert (load_student(folder)(prompts, SEEDS) - expected).abs().max() <= 1e-5
    assert_shows(run_snippet(monkeypatch, folder), expected[:1])


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize("tune", ["full", {"lora": {"rank": 2}}], ids=["full", "lora"])
def test_a_phased_run_from_recipe_to_picture(tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    recipe, run_dir = tmp_path / "phased.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(RECIPE | {"student": {"steps": 4, "tune": tune}}))
    assert cli.main(["train", str(recipe), "--output", str(run_dir)]) == 0  # verifies too
    assert cli.main(["sample", str(run_dir / "student"), "--prompt", "any digit", "--steps", "3", "--output", str(tmp_path / "a.png")]) == 0
    if tune == "full":
        folder = run_dir / "student"
        capfd.readouterr()
        assert cli.main(["export", str(run_dir), "--output", str(tmp_path / "adapters"), "--lora"]) == 2
        assert "--lora: a student trained with student.tune: full has no adapter" in capfd.readouterr().err
    else:
        folder = tmp_path / "adapters"
        assert cli.main(["export", str(run_dir), "--output", str(folder), "--lora"]) == 0
        capfd.readouterr()
        assert cli.main(["verify", str(folder)]) == 0
        assert "warn" not in capfd.readouterr().err.lower()
        both = [load_student(path)(["any digit"], [0]) for path in (folder, run_dir / "student")]
        assert (both[0] - both[1]).abs().max() <= 1e-5
    assert [expert["steps"] for expert in read_manifest(folder)["experts"]] == [[0, 1], [2, 3]]
    assert "unfinished" not in read_manifest(folder)
    files = [path for path in sorted(folder.rglob("*.safetensors")) if path.parent.name in ("transformer", "expert_1", "expert_2")]
    first, second = (load_file(path) for path in files)
    assert any(not torch.equal(first[key], second[key]) for key in first)
    shown = read_manifest(folder)["prompts"][:1]
    assert_shows(run_snippet(monkeypatch, folder), load_student(folder)(shown, [0]))
