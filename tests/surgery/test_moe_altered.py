"""Students whose experts were removed or copied (`student.moe.remove_dead`, `upcycle`): from a run's student to stock diffusers, resumed, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import same_interpreter as same_interpreter
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen import run
from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.export import export_student, verify
from fastgen.outlook import dry_run
from fastgen.plan import plan
from fastgen.run.building import Run
from fastgen.surgery import moe

BASE = ["student.moe={experts: 12, shared: 1.0, routed: 0.25, active: 2, calibration: 1, router_std: 0.5}", "train.steps=2"]
SAME = "student.moe.upcycle={factor: 2, most: 2, noise: 0, utility: weight}"  # with active 4
LAYERS, SPLIT = 7, 7 * 12


def digits(*overrides: str) -> Recipe:
    keys = ["train.batch_size=4", "train.sample_every=0", "train.device=cpu", "evaluate.protocol=null", "train.checkpoint_every=1"]
    return Recipe.load("digits_dmd2_1step", [*keys, *BASE, *overrides])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of experts."""
    return run.train(digits(), tmp_path_factory.mktemp("moe") / "first", only="train")


def built(first: Path, *overrides: str) -> Run:
    return run.build(plan(digits(f"student.init={first}", *overrides), only="train"), run.Progress())


def layers(running: Run) -> list[moe.ExpertLayer]:
    return moe.expert_layers(running.roles["student"].denoiser.backbone)


def exported(running: Run, folder: Path) -> Path:
    output = export_student(running.averaged(), running.plan.family, running.info(), folder)
    assert verify(output, seeds=(0, 1)).passed
    return output


def drawn(student: Path) -> Tensor:
    """By stock diffusers."""
    pipe: Any = DiffusionPipeline.from_pretrained(student, trust_remote_code=True)
    call = json.loads((student / "fastgen.json").read_text(encoding="utf-8"))["call"]
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipe(["a handwritten seven", "an even digit"], **{**call, "output_type": "pt"}, generator=seeds).images


@pytest.fixture(scope="module")
def before(first: Path) -> Path:
    return run.export(first, first.parent / "student")


@pytest.mark.usefixtures("same_interpreter")
def test_copies_of_each_with_as_many_times_more_active_draw_the_same_pictures(first: Path, before: Path, tmp_path: Path) -> None:
    running = built(first, SAME, "student.moe.active=4")
    assert {(layer.num_experts, layer.active, layer.gate_scale) for layer in layers(running)} == {(24, 4.0, 12.0)}
    output = exported(running, tmp_path / "student")
    torch.testing.assert_close(drawn(output), drawn(before), rtol=0, atol=1e-5)
    manifest = json.loads((output / "fastgen.json").read_text(encoding="utf-8"))
    assert {key: manifest["surgery"]["moe"][key] for key in ("all_experts", "split_experts", "removed_experts", "active", "experts")} == {
        "all_experts": 2 * SPLIT,
        "split_experts": SPLIT,
        "removed_experts": 0,
        "active": 4.0,
        "experts": 24,
    }
    fewer = exported(built(first, SAME), tmp_path / "fewer")
    assert (drawn(fewer) - drawn(before)).abs().max() > 1e-4  # with as many active as before it is another network


def with_dead(first: Path, folder: Path, dead: list[int]) -> Path:
    """The run, but that its averaged student's routers never choose some experts: they score as two others do, which come before them."""
    copy = Path(shutil.copytree(first, folder))
    file = copy / "checkpoints/step_000002/ema_student.safetensors"
    state = load_file(file)
    for name, value in state.items():
        if name.endswith(".router.weight"):
            value[[1, *dead]] = value[0].clone()
    save_file(state, file)
    return copy


@pytest.mark.usefixtures("same_interpreter")
def test_experts_that_nobody_uses_are_removed_and_pictures_stay(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.checkpoint.check_files", lambda *_: None)  # the weights were changed on purpose
    source = with_dead(first, tmp_path / "source", [3, 7])
    as_was = exported(built(source), tmp_path / "as_was")
    running = built(source, "student.moe.remove_dead=0.0001", "student.moe.calibration=16")
    sizes = running.plan.expert_sizes["student"]
    assert all(size[0] + size[1] == 12 and size[1] >= 2 for size in sizes.values())
    output = exported(running, tmp_path / "student")
    torch.testing.assert_close(drawn(output), drawn(as_was), rtol=0, atol=1e-5)
    manifest = json.loads((output / "fastgen.json").read_text(encoding="utf-8"))
    assert (
        manifest["surgery"]["moe"]["removed_experts"] == sum(size[1] for size in sizes.values()) == SPLIT - manifest["surgery"]["moe"]["all_experts"]
    )
    assert (
        manifest["surgery"]["moe"]["parameters"] < json.loads((as_was / "fastgen.json").read_text(encoding="utf-8"))["surgery"]["moe"]["parameters"]
    )


def test_removed_then_copied_trained_resumed_exported_and_gone_on_from(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"student.init={first}", "student.moe.remove_dead=0.9", "student.moe.upcycle={factor: 2}", "student.moe.active=3"]
    whole = run.train(digits(*keys), tmp_path / "whole") / "student"  # verified in another process
    counts = {layer["experts"] for layer in json.loads((whole / "transformer/config.json").read_text(encoding="utf-8"))["experts"]["layers"]}
    assert len(counts) > 1 and all(4 <= count <= 24 and count % 2 == 0 for count in counts)
    resumed = Path(shutil.copytree(tmp_path / "whole", tmp_path / "resumed"))
    shutil.rmtree(resumed / "student")
    shutil.rmtree(resumed / "checkpoints/step_000002")
    with monkeypatch.context() as patched:
        patched.setattr("fastgen.run.building.with_altered_experts", lambda plan, *_: plan)  # what was altered is not altered again
        run.train(digits(*keys), resumed, resume=True, only="train")
    for name in ("ema_student", "role_student", "optimizer_student"):
        got, want = (load_file(folder / f"checkpoints/step_000002/{name}.safetensors") for folder in (resumed, tmp_path / "whole"))
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    assert any("selection_bias" in name and value.any() for name, value in want.items() if value.ndim) or any(
        "selection_bias" in name for name in load_file(resumed / "checkpoints/step_000002/ema_student.safetensors")
    )
    more = [f"student.init={tmp_path / 'whole'}", "student.moe.active=4"]
    going_on = run.build(plan(digits(*more), only="train"), run.Progress())
    state = load_file(tmp_path / "whole/checkpoints/step_000002/ema_student.safetensors")
    own = going_on.roles["student"].parameters()
    assert own.keys() == state.keys() - {"updates"} and all(torch.equal(own[name], state[name]) for name in own)
    again = run.build(plan(digits(*more, "student.moe.upcycle={}"), only="train"), run.Progress())
    assert [layer.num_experts for layer in layers(again)] == [2 * layer.num_experts for layer in layers(going_on)]
    with pytest.raises(UserError, match=r"^recipe key student\.moe\.active: 25 of \d+ experts \(transformer_blocks"):
        plan(digits(*more, "student.moe.active=25"), only="train")


def test_gradients_say_which_are_useful_and_the_teacher_stays(first: Path) -> None:
    running = built(first, "student.moe.upcycle={factor: 2, most: 3, noise: 0}")
    other = built(first, "student.moe.upcycle={factor: 2, most: 3, noise: 0, utility: weight}")
    pairs = zip(layers(running), layers(other), strict=True)
    assert any(not torch.equal(one.w1, two.w1) for one, two in pairs)  # other experts were copied
    assert all(torch.equal(one.w1[:12], two.w1[:12]) for one, two in zip(layers(running), layers(other), strict=True))
    assert all(parameter.grad is None for parameter in running.roles["student"].parameters().values())
    assert not moe.expert_layers(running.roles["teacher"].denoiser.backbone)
    assert running.trainer.train_step()["experts/student/balance"] > 0


def test_loads_of_what_was_measured_move_no_bias(tmp_path: Path) -> None:
    rate = "student.moe.bias_rate=0.01"
    source = run.train(digits(rate, "train.steps=1"), tmp_path / "source", only="train")
    running = built(source, rate, "student.moe.upcycle={noise: 0}")
    before = [layer.selection_bias.clone() for layer in layers(running)]
    assert all(isinstance(layer.selection_bias, torch.nn.Parameter) for layer in layers(running))
    running.trainer.train_step()
    for layer, bias in zip(layers(running), before, strict=True):
        assert ((layer.selection_bias - bias).abs() < 0.0101).all() and not torch.equal(layer.selection_bias, bias)


def test_a_dry_run_says_what_there_will_be(first: Path) -> None:
    found = dry_run(digits(f"student.init={first}", SAME, "student.moe.active=4"))["experts"]
    assert (found["experts"], found["all_experts"], found["active"]) == (24, 2 * SPLIT, 4.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["student.moe.upcycle={factor: 2}"], ": upcycle: which experts are useful shows in a trained student; name its run as student.init"),
        (["student.moe.remove_dead=0.05"], ": remove_dead: which experts are useful shows in a trained student; name its run as student.init"),
        (["student.moe.upcycle={factor: 4}"], ".upcycle: most: at most 3 of each do not make 4 times as many experts"),
        (["student.moe.upcycle={factor: 1}"], ".upcycle.factor: Input should be greater than or equal to 2"),
        (["student.moe.remove_dead=2"], ".remove_dead: Input should be less than or equal to 1"),
        (
            ["student.init=runs/one", "student.moe.remove_dead=0.05", "student.moe.importance=random", "student.moe.calibration=0"],
            ": calibration: remove_dead is measured on 1 batch or more",
        ),
    ],
)
def test_what_cannot_be_altered_is_refused_by_its_key(keys: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        digits(*keys)
    assert str(caught.value).startswith(f"recipe key student.moe{message}")
