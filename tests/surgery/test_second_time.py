"""Scalar inputs: a student starts as its teacher, trains them, keeps them through copies and checkpoints, and folds them away exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import PROMPTS, adapter_tuning
from pipelines import same_interpreter as same_interpreter
from pipelines import sd3_folder as sd3_folder
from torch import Tensor, nn
from torch.autograd import forward_ad
from toy_runs import toy_method, toy_setting, toy_trainer, weights

from fastgen import checkpoint
from fastgen.config import Recipe
from fastgen.distillers.mean_flow import MeanFlow
from fastgen.errors import UserError
from fastgen.export import StudentInfo, export_lora, export_student, verify
from fastgen.families.sd3 import SD3
from fastgen.families.toy import Toy
from fastgen.generator import ImageGenerator, load_student
from fastgen.outlook import dry_run
from fastgen.path import Flow, TrigFlow, VarianceExploding, VariancePreserving
from fastgen.path import Path as NoisingPath
from fastgen.plan import plan
from fastgen.roles import LoraTuning, Role, Roles, build_roles, frozen, trainable
from fastgen.surgery.second_time import Defaults, Input, ScalarInputs, fold, given, noise_fraction, smooth_features, split

INPUTS: tuple[Input, ...] = ("second_time", "guidance")
SPECS = {"student": trainable(inputs=INPUTS), "fake_score": trainable(), "teacher": frozen()}
TIMES = [0.9, 0.65, 0.3]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def defaults(times: list[float] = TIMES, guidance: float = 4.0) -> Defaults:
    return Defaults(torch.tensor(times, dtype=torch.float64), guidance)


def disturb(role: Role, seed: int = 3) -> None:
    """Move the inputs' last layers off zero, so that they matter."""
    assert role.denoiser.inputs is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for network in role.denoiser.inputs.networks.values():
            last: Any = network[-1]  # type: ignore[index]
            last.weight.normal_(std=0.1, generator=generator)
            last.bias.normal_(std=0.1, generator=generator)


def toy_roles(*, adapters: bool) -> Roles:
    family = Toy("toy:mixture", width=16)
    backbone: Any = family.load_backbone()
    nn.init.normal_(backbone.out.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    tuning = LoraTuning(rank=3, alpha=6.0, targets=family.lora_targets) if adapters else None
    return build_roles(SPECS, family, backbone, tuning=tuning, defaults=defaults())


def call(role: Role, **values: float) -> Tensor:
    x, t = normal(4, 2), torch.tensor([0.2, 0.4, 0.6, 0.9])
    return role.module(x, t, given({}, **{name: torch.full((4,), value) for name, value in values.items()})).prediction


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_student_with_inputs_starts_as_the_teacher_whatever_their_values(adapters: bool) -> None:
    roles = toy_roles(adapters=adapters)
    for values in ({}, {"second_time": 0.1}, {"guidance": 7.0, "second_time": 0.05}):
        torch.testing.assert_close(call(roles["student"], **values), call(roles["teacher"]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_inputs_belong_to_one_role_and_are_trained_with_it(adapters: bool) -> None:
    roles = toy_roles(adapters=adapters)
    before = {name: call(role) for name, role in roles.items()}
    disturb(roles["student"])
    assert (call(roles["student"]) - before["student"]).abs().max() > 1e-3
    for other in ("fake_score", "teacher"):
        assert torch.equal(call(roles[other]), before[other])
        assert not [name for name in roles[other].parameters() if name.startswith("inputs.")]
    own = {name for name in roles["student"].parameters() if name.startswith("inputs.")}
    assert {name.split(".")[2] for name in own} == set(INPUTS)
    with roles.training(["student"]):
        call(roles["student"], second_time=0.1).sum().backward()
    for name, parameter in roles["student"].parameters().items():
        if name in own:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for other in ("fake_score", "teacher") for p in roles[other].parameters().values())


def test_the_gradient_reaches_a_zero_last_layer() -> None:
    role = toy_roles(adapters=False)["student"]
    call(role, second_time=0.1).square().sum().backward()
    assert role.denoiser.inputs is not None
    last: Any = role.denoiser.inputs.networks["second_time"][-1]  # type: ignore[index]
    assert last.weight.grad.abs().max() > 1e-4 and last.bias.grad.abs().max() > 1e-4


def test_defaults_are_the_next_time_of_the_grid_and_the_teachers_guidance() -> None:
    role = toy_roles(adapters=False)["student"]
    disturb(role)
    x = normal(6, 2)
    t = torch.tensor([0.9, 0.65, 0.3, 0.95, 0.5, 0.1])
    r = torch.tensor([0.65, 0.3, 0.0, 0.9, 0.3, 0.0])
    expected = role.module(x, t, given({}, second_time=r, guidance=torch.full((6,), 4.0))).prediction
    torch.testing.assert_close(role.module(x, t, {}).prediction, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(role.module(x, t.double(), {}).prediction, expected, rtol=1e-5, atol=1e-5)
    other = role.module(x, t, given({}, second_time=r + 0.02, guidance=torch.full((6,), 4.0))).prediction
    assert (other - expected).abs().max() > 1e-4


@pytest.mark.parametrize("path", [Flow(), TrigFlow(), VariancePreserving(), VarianceExploding()], ids=lambda path: type(path).__name__)
def test_the_second_time_is_a_noise_fraction_on_every_path(path: NoisingPath) -> None:
    """The same sample asked for the same interval: the prediction cannot depend on the path that the call is made on."""
    family = Toy("toy:gaussian", path=path)
    grid = path.time(Flow().ratio(torch.tensor(TIMES, dtype=torch.float64)))
    torch.testing.assert_close(noise_fraction(path, grid), torch.tensor(TIMES, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    role = build_roles({"student": SPECS["student"]}, family, family.load_backbone().double(), defaults=Defaults.on(path, grid, 4.0))["student"]
    disturb(role)
    nn.init.normal_(role.denoiser.backbone.out.weight, std=0.2, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr, arg-type]
    x, t = normal(3, 2).double(), torch.tensor(TIMES, dtype=torch.float64)
    on_flow = role.predictor(x, t, {}, "x0", Flow())
    x_own, t_own = Flow().retime(x, t, path)
    torch.testing.assert_close(role.predictor(x_own, t_own, {}), on_flow, rtol=1e-8, atol=1e-8)
    named = given({}, second_time=torch.tensor([0.65, 0.3, 0.0]))
    torch.testing.assert_close(role.predictor(x_own, t_own, named), on_flow, rtol=1e-6, atol=1e-6)


def test_features_are_smooth() -> None:
    value = torch.linspace(0, 1, 50, dtype=torch.float64)
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(smooth_features(forward_ad.make_dual(value, torch.ones_like(value)))).tangent
    assert slope is not None
    assert slope.abs().max() <= 4 * torch.pi
    torch.testing.assert_close(smooth_features(value)[:, 1], (torch.pi * value).sin())


def test_values_stay_out_of_casts_and_autocast() -> None:
    family = Toy("toy:gaussian")
    roles = build_roles(SPECS, family, family.load_backbone(), autocast=torch.bfloat16, defaults=defaults())
    seen: list[Tensor] = []
    inputs: Any = roles["student"].denoiser.inputs
    inputs.networks["second_time"].register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    call(roles["student"], second_time=0.123456789)
    assert [value.dtype for value in seen] == [torch.float32] * 2
    assert {p.dtype for p in inputs.parameters()} == {torch.float32}
    assert seen[0][0, 9].item() == pytest.approx(0.2 - 0.123456789, abs=1e-7)


def test_what_a_network_cannot_take_is_refused() -> None:
    roles = toy_roles(adapters=False)
    with pytest.raises(ValueError, match="no scalar inputs, but second_time was given"):
        call(roles["teacher"], second_time=0.1)
    with pytest.raises(ValueError, match="no scalar input 'third_time'; it has second_time, guidance"):
        call(roles["student"], third_time=0.1)
    assert split({"input.guidance": normal(1), "component": normal(2)})[0].keys() == {"component"}
    alone = ScalarInputs(("guidance",), 8, seed=0, dtype=torch.float32)
    with pytest.raises(ValueError, match="guidance have no defaults here and must be given"):
        alone(torch.tensor([0.5]), {})


def test_copies_and_checkpoints_keep_the_inputs(tmp_path: Path) -> None:
    family = Toy("toy:gaussian")
    method = toy_method(MeanFlow, toy_setting(family))
    latents = normal(32, 2)
    trainer = toy_trainer(method, family, latents=latents)
    trainer.train_step()
    copied = copy.deepcopy(trainer.roles["student"].denoiser)
    expected = call(trainer.roles["student"])
    torch.testing.assert_close(copied(normal(4, 2), torch.tensor([0.2, 0.4, 0.6, 0.9]), {}).prediction, expected)
    saved = checkpoint.save(tmp_path, trainer, {}, keep=1)
    other = toy_trainer(toy_method(MeanFlow, toy_setting(family)), family, latents=latents)
    checkpoint.load(saved, other)
    for run in (trainer, other):
        run.train_step()
    got, want = weights(other), weights(trainer)
    assert got.keys() == want.keys()
    assert {key for key in want if "inputs.networks.second_time" in key and key.startswith("ema/")}
    for key, value in want.items():
        assert torch.equal(got[key], value), key


# Folding


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_folding_is_exact_on_the_grid(count: int) -> None:
    layer = nn.Linear(24, 12).double()
    before = copy.deepcopy(layer)
    hidden, added = normal(count, 24, seed=count).double(), normal(count, 12, seed=9).double()
    fold(layer, hidden, added)
    assert (layer(hidden) - before(hidden) - added).abs().max() <= 1e-12
    # Least norm: the change of the weight lies in the span of the hidden vectors.
    change = (layer.weight - before.weight).T
    outside = change - hidden.T @ torch.linalg.lstsq(hidden.T, change).solution
    assert outside.abs().max() <= 1e-12


def test_folding_a_constant_changes_the_bias_alone() -> None:
    layer = nn.Linear(24, 12).double()
    before = copy.deepcopy(layer)
    fold(layer, normal(4, 24).double(), normal(12).double().expand(4, 12))
    torch.testing.assert_close(layer.weight, before.weight, rtol=0, atol=1e-14)
    torch.testing.assert_close(layer.bias, before.bias + normal(12).double())


def test_a_layer_without_a_bias_is_folded_into_its_weight() -> None:
    layer = torch.nn.Linear(24, 12, bias=False).double()
    hidden, added = normal(4, 24).double(), normal(4, 12, seed=1).double()
    before = layer(hidden)
    with torch.no_grad():
        fold(layer, hidden, added)
    torch.testing.assert_close(layer(hidden), before + added, rtol=0, atol=1e-9)


def test_times_too_close_to_fold_are_refused() -> None:
    layer, hidden = nn.Linear(24, 12), normal(1, 24).repeat(2, 1)
    hidden[1] += 1e-9
    with pytest.raises(UserError, match=r"recipe key student\.steps: 2 times lie too close"):
        fold(layer, hidden, normal(2, 12))


@pytest.fixture(scope="module")
def family(sd3_folder: Path) -> SD3:
    return SD3(sd3_folder, max_sequence_length=16)


def sd3_student(family: SD3, *, steps: int, inputs: tuple[Input, ...] = INPUTS, tuning: LoraTuning | None = None) -> Role:
    default = Defaults.on(family.path, family.grid(steps), 4.0)
    role = build_roles({"student": trainable(inputs=inputs)}, family, family.load_backbone(), tuning=tuning, defaults=default)["student"]
    disturb(role)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in role.parameters().items():
            if not name.startswith("inputs."):
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return role


def info(source: Path, steps: int) -> StudentInfo:
    teacher = {"pretrained": str(source), "guidance": 4.0, "negative_prompt": ""}
    return StudentInfo("mean_flow", steps, None, 1.0, teacher, PROMPTS, {})


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize("tuning", [None, adapter_tuning()], ids=["full", "lora"])
def test_an_sd3_student_folds_into_the_plain_architecture(family: SD3, sd3_folder: Path, tuning: LoraTuning | None, tmp_path: Path) -> None:
    role, steps = sd3_student(family, steps=3, tuning=tuning), 3
    expected = ImageGenerator(family, role.predictor, steps=steps)(PROMPTS, [0, 1, 2])
    without = copy.deepcopy(role)
    assert without.denoiser.inputs is not None
    without.denoiser.inputs = None
    assert (ImageGenerator(family, without.predictor, steps=steps)(PROMPTS, [0, 1, 2]) - expected).abs().max() > 1e-3, "the inputs must matter"
    folder = export_student(role, family, info(sd3_folder, steps), tmp_path / "student")
    student = load_student(folder)
    assert (student(PROMPTS, [0, 1, 2]) - expected).abs().max() <= 1e-5
    assert role.denoiser.backbone.state_dict().keys() == family.load_backbone(meta=True).state_dict().keys()
    if tuning is None:
        assert verify(folder, seeds=(0, 1)).passed
    with pytest.raises(UserError, match="--steps: 2, but this student was made for 3"):
        student(PROMPTS, [0, 1, 2], 2)
    assert "other numbers of steps give no sensible picture" in (folder / "README.md").read_text()


def test_a_student_with_guidance_alone_serves_every_number_of_steps(family: SD3, sd3_folder: Path, tmp_path: Path) -> None:
    role = sd3_student(family, steps=3, inputs=("guidance",))
    expected = ImageGenerator(family, role.predictor, steps=5)(PROMPTS, [0, 1, 2])
    student = load_student(export_student(role, family, info(sd3_folder, 3), tmp_path / "student"))
    assert (student(PROMPTS, [0, 1, 2], 5) - expected).abs().max() <= 1e-5
    assert "sensible" not in (tmp_path / "student" / "README.md").read_text()


def test_an_adapter_alone_cannot_hold_the_inputs(family: SD3, sd3_folder: Path, tmp_path: Path) -> None:
    role = sd3_student(family, steps=2, tuning=adapter_tuning())
    with pytest.raises(UserError, match="--lora: mean_flow gives the student a second time input, which an adapter cannot hold"):
        export_lora(role, family, info(sd3_folder, 2), tmp_path / "lora")
    assert not any(tmp_path.iterdir())


# Plans


def recipe(*overrides: str) -> Recipe:
    return Recipe.load("digits_meanflow_2step", overrides)


def test_a_family_without_a_place_for_the_input_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SD3, "time_projection", None)
    monkeypatch.setattr(SD3, "load_backbone", lambda *_, **__: pytest.fail("nothing is loaded"))
    with pytest.raises(UserError, match=r"recipe key distiller\.name: mean_flow gives the student a second time input, for which family SD3 has no"):
        plan(recipe())


@pytest.mark.parametrize("tune", ["full", "{lora: {rank: 4}}"])
def test_a_dry_run_counts_the_inputs(tune: str) -> None:
    counted = dry_run(recipe(f"student.tune={tune}"))
    width, hidden = 64, 128
    inputs = 18 * hidden + hidden + hidden * hidden + hidden + hidden * width + width
    backbone = sum(p.numel() for p in SD3("fastgen:digits").load_backbone(meta=True).parameters())
    trained = counted["roles"]["student"]["trains"]
    if tune == "full":
        assert trained == backbone + inputs
        assert counted["parameters"] == 2 * backbone + inputs
    else:
        assert counted["parameters"] == backbone + trained
        assert trained > inputs
