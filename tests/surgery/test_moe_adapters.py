"""Adapters on a student of experts: what roles share, what trains, checkpoints that link what does not, and exports."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import same_interpreter as same_interpreter
from safetensors.torch import load_file
from torch import Tensor

from fastgen import cli, run
from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.export import verify
from fastgen.families import find_family
from fastgen.jvp import tangent
from fastgen.memory import held
from fastgen.plan import plan
from fastgen.roles import LoraTuning, Roles, build_roles, frozen, student, trainable
from fastgen.run.building import Run
from fastgen.surgery import moe

TUNED = ["student.tune.lora.rank=4", "student.moe={active: 2, calibration: 1, router_std: 0.5}"]
SPECS = {"student": student(), "fake_score": trainable(), "teacher": frozen()}


def digits(*overrides: str, recipe: str = "digits_dmd2_1step") -> Recipe:
    keys = ["train.batch_size=4", "train.sample_every=0", "train.checkpoint_every=2", "train.steps=4", "train.device=cpu", "evaluate.protocol=null"]
    return Recipe.load(recipe, [*keys, *TUNED, *overrides])


def built(*overrides: str, recipe: str = "digits_dmd2_1step") -> Run:
    return run.build(plan(digits(*overrides, recipe=recipe), only="train"), run.Progress())


def made(conversion: moe.Conversion) -> Roles:
    """In float64."""
    family = find_family("fastgen:digits")
    tuning = LoraTuning(4, 8.0, (*family.lora_targets, "shared.up", "shared.down"))
    return build_roles(SPECS, family, family.load_backbone().double(), tuning=tuning, experts=conversion)


def network(role: Any) -> Any:
    return role.denoiser.backbone


def drawn(roles: Roles, size: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    family = roles["student"].denoiser.family
    cond = family.encode_prompts(["a handwritten seven", "an even digit", "any digit"][:size])
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, *family.latent.shape, generator=generator).double(), torch.linspace(0.2, 0.9, size).double(), cond


def test_the_dense_roles_share_one_network_and_the_student_has_its_own() -> None:
    roles = made(moe.Conversion(moe.Experts(active=12)))
    assert network(roles["fake_score"]) is network(roles["teacher"])
    assert {name: len(moe.expert_layers(network(role))) for name, role in roles.items()} == {"student": 7, "fake_score": 0, "teacher": 0}
    x, t, cond = drawn(roles)
    with torch.no_grad():
        student, fake, teacher = (roles[name].predictor(x, t, cond) for name in ("student", "fake_score", "teacher"))
    assert (student - teacher).abs().max() <= 1e-12
    assert torch.equal(fake, teacher)


def test_adapters_and_routers_train_and_nothing_else() -> None:
    roles = made(moe.Conversion(router_std=0.5))
    own = roles["student"].parameters()
    routers = {name for name in own if name.endswith("router.weight")}
    assert len(routers) == 7
    assert all("lora_" in name for name in own.keys() - routers)
    assert any("shared.up.lora_A" in name for name in own)
    assert not any("router" in name for name in roles["fake_score"].parameters())
    x, t, cond = drawn(roles)
    with roles.training(["student"]):
        roles["student"].predictor(x, t, cond).square().sum().backward()
    changed = {name for name, p in network(roles["student"]).named_parameters() if p.grad is not None}
    assert changed == {name for name in own if "lora_A" in name or name.endswith(("router.weight", "lora_B.student.weight"))}
    assert all(p.grad is None for p in network(roles["teacher"]).parameters())
    assert all((grad := own[name].grad) is not None and grad.any() for name in routers)


def test_what_is_kept_beside_it_is_all_the_rest() -> None:
    roles = made(moe.Conversion())
    role = roles["student"]
    whole = build_roles({"student": student()}, role.denoiser.family, role.denoiser.family.load_backbone().double(), experts=moe.Conversion())[
        "student"
    ]
    assert {name: value.shape for name, value in role.whole().items()} == {name: value.shape for name, value in whole.parameters().items()}
    assert not (role.base().keys() & role.parameters().keys())
    assert roles["fake_score"].base() == roles["teacher"].base() == {}


@torch.no_grad()
def test_its_exact_tangent_is_that_of_a_finite_difference() -> None:
    roles = made(moe.Conversion(router_std=1.0))
    for name, parameter in roles["student"].parameters().items():
        if "lora_B" in name:
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    x, t, cond = drawn(roles)
    dx, h = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double(), 1e-6

    def call(x: Tensor) -> Tensor:
        return roles["student"].predictor(x, t, cond)

    exact = tangent(call, (x,), (dx,))[1]
    torch.testing.assert_close(exact, (call(x + h * dx) - call(x - h * dx)) / (2 * h), rtol=1e-6, atol=1e-7)
    assert (call(x) - roles["teacher"].predictor(x, t, cond)).abs().max() > 1e-3


# Runs


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains a whole network of experts."""
    keys = ["student.tune=full", "distiller.shared=0.5"]
    return run.train(digits(*keys, recipe="digits_dense2moe"), tmp_path_factory.mktemp("moe_full") / "run", only="train")


@pytest.fixture(scope="module")
def tuned(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """And one that trains adapters on its student."""
    return run.train(digits(f"student.init={full}"), tmp_path_factory.mktemp("moe_tuned") / "run", only="train")


def component(run_dir: Path, name: str, step: int = 4) -> dict[str, Tensor]:
    return load_file(run_dir / f"checkpoints/step_{step:06d}/{name}.safetensors")


def test_adapters_begin_on_the_student_of_a_run_that_trained_all_of_it(full: Path, tuned: Path) -> None:
    theirs, base = component(full, "ema_student"), component(tuned, "base_student")
    assert all(torch.equal(base[name], theirs[name]) for name in base)
    assert base.keys() == {name for name in theirs if not name.endswith("router.weight")} - {"updates"}
    running = built(f"student.init={full}")
    own = running.roles["student"].parameters()
    assert all(torch.equal(own[name], theirs[name]) for name in own if name.endswith("router.weight"))
    assert not any(own[name].any() for name in own if "lora_B" in name)


def test_a_checkpoint_links_what_does_not_change(tuned: Path) -> None:
    files = [tuned / f"checkpoints/step_{step:06d}/base_student.safetensors" for step in (2, 4)]
    assert files[0].samefile(files[1])


def test_where_a_disk_has_no_links_it_is_written_again(full: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    run.train(digits(f"student.init={full}", "train.steps=4"), tmp_path / "run", only="train")
    first, second = (tmp_path / f"run/checkpoints/step_{step:06d}/base_student.safetensors" for step in (2, 4))
    assert not first.samefile(second)
    assert first.read_bytes() == second.read_bytes() == (tuned / "checkpoints/step_000004/base_student.safetensors").read_bytes()


def same(run_dir: Path, other: Path, names: Sequence[str]) -> bool:
    pairs = [(component(run_dir, name), component(other, name)) for name in names]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


@pytest.mark.parametrize("keys", [[], ["train.precision=bf16"]])
def test_a_resumed_run_ends_as_if_nothing_had_happened(
    full: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str]
) -> None:
    recipe = digits(f"student.init={full}", *keys)
    whole = tuned if not keys else run.train(recipe, tmp_path / "whole", only="train")
    resumed = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(resumed / "checkpoints/step_000004")
    monkeypatch.setattr("fastgen.checkpoint.load_students", None)  # the checkpoint has all of it
    run.train(recipe, resumed, resume=True, only="train")
    assert same(resumed, whole, ["base_student", "ema_student", "role_student", "role_fake_score", "optimizer_student"])


def test_a_run_takes_over_an_adapter_with_its_network(tuned: Path) -> None:
    running = built(f"student.init={tuned}")
    role = running.roles["student"]
    base, ema = component(tuned, "base_student"), component(tuned, "ema_student")
    assert all(torch.equal(value, base[name]) for name, value in role.base().items())
    assert all(torch.equal(value, ema[name]) for name, value in role.parameters().items())


@pytest.mark.parametrize(
    "keys", [["student.tune=full"], ["student.tune.lora.rank=8"], ["student.tune.lora.alpha=8"], ["student.tune.lora.targets=[to_q]"]]
)
def test_an_adapter_is_taken_over_as_it_is_or_not_at_all(tuned: Path, keys: list[str]) -> None:
    with pytest.raises(UserError, match=r"^recipe key student\.init: .* holds a student with student\.tune .*; both need the same$"):
        plan(digits(f"student.init={tuned}", *keys), only="train", dry=True)


def test_an_adapter_of_a_dense_student_does_not_begin_on_a_whole_one(tmp_path: Path) -> None:
    whole = run.train(digits("student.tune=full", "student.moe=null"), tmp_path / "run", only="train")
    with pytest.raises(UserError, match=r"^recipe key student\.init: .* holds a student with student\.tune 'full', here .*; both need the same$"):
        plan(digits(f"student.init={whole}", "student.moe=null"), only="train", dry=True)


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize("keys", [[], ["train.precision=bf16"]])
def test_the_whole_line_is_walked(full: Path, tmp_path: Path, keys: list[str]) -> None:
    output = run.train(digits(f"student.init={full}", "train.steps=2", *keys), tmp_path / "run")
    assert verify(output / "student").passed
    assert (output / "student/transformer/modeling_sd3transformer2dmodel_experts.py").is_file()
    names = load_file(output / "student/transformer/diffusion_pytorch_model.safetensors")
    assert not any("lora" in name or "base_layer" in name or "codes" in name for name in names)


def test_in_half_precision_the_frozen_network_is_kept_so(full: Path) -> None:
    running = built(f"student.init={full}", "train.precision=bf16")
    role = running.roles["student"]
    base, theirs = role.base(), component(full, "ema_student")
    narrow = {name for name, value in base.items() if value.dtype == torch.bfloat16}
    assert any(name.endswith(".w1") for name in narrow) and any(name.endswith("shared.up.weight") for name in narrow)
    assert all(torch.equal(base[name], theirs[name].to(base[name].dtype)) for name in base)
    assert all(p.dtype == torch.float32 for p in role.parameters().values())
    assert role.denoiser.dtype == torch.float32


@pytest.mark.parametrize("keys", [[], ["train.precision=bf16"], ["teacher.quantise=int8"]])
def test_a_plan_counts_both_networks(keys: list[str]) -> None:
    found = plan(digits(*keys), only="train", dry=True)
    asked: Any = found.student | {"storage": found.storage}
    meta = build_roles(found.roles, found.family, found.family.load_backbone(meta=True), **asked)
    real = build_roles(found.roles, found.family, found.family.load_backbone(), **asked)

    def frozen_bytes(roles: Roles) -> int:
        networks = {id(network(role)): network(role) for role in roles.values()}
        trained = {id(p) for role in roles.values() for p in role.parameters().values()}
        rest = [p for each in networks.values() for p in (*each.parameters(), *each.buffers()) if id(p) not in trained]
        return sum(p.numel() * p.element_size() for p in rest)

    counted = held(found, meta)
    assert counted.frozen + counted.buffers == frozen_bytes(real)


def test_experts_are_removed_from_and_added_to_what_adapters_go_on(full: Path) -> None:
    running = built(f"student.init={full}", "student.moe.upcycle={factor: 2, most: 2, noise: 0}", "student.moe.active=4")
    layers = moe.expert_layers(network(running.roles["student"]))
    assert {layer.num_experts for layer in layers} == {24}
    assert not any(p.requires_grad for layer in layers for p in (layer.w1, layer.w2))
    running.trainer.train_step()


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize(("recipe", "keys"), [("digits_scm_2step", []), ("digits_phased_dmd_4step", [])])
def test_methods_train_them(recipe: str, keys: list[str], tmp_path: Path) -> None:
    output = run.train(digits("train.steps=2", *keys, recipe=recipe), tmp_path / "run")
    assert verify(output / "student").passed


# Refusals


def test_what_adapters_cannot_do_is_refused(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UserError, match=r"^recipe key student\.tune: dense2moe trains the experts themselves, which adapters do not reach; use full$"
    ):
        plan(digits(recipe="digits_dense2moe"), only="train", dry=True)
    said = r"the student's adapter belongs to a network that is not its teacher's \(student\.moe\)"
    with pytest.raises(UserError, match=rf"^recipe key export\.weights: {said}; `export\.weights: full` merges it$"):
        plan(digits("export.weights=lora"), dry=True)
    for flag in ("--lora", "--comfy"):
        assert cli.main(["export", str(tuned), "--output", str(tmp_path / "student"), flag]) == 2
        assert f"{flag}: the student's adapter belongs to a network that is not its teacher's (student.moe)" in capsys.readouterr().err
