"""Dense2MoE's stages and losses, on the digits teacher."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastgen import run
from fastgen.config import Recipe
from fastgen.distillers.dense2moe import relative_error, self_weighted
from fastgen.errors import UserError
from fastgen.plan import plan
from fastgen.rng import SampleRng
from fastgen.run.building import Run
from fastgen.surgery import moe

KEYS = ["train.batch_size=4", "train.sample_every=0", "train.device=cpu", "evaluate.protocol=null", "student.moe.calibration=2"]
KEYS += ["distiller.others=frozen"]


def digits(*overrides: str) -> Recipe:
    return Recipe.load("digits_dense2moe", [*KEYS, *overrides])


def built(*overrides: str) -> Run:
    return run.build(plan(digits(*overrides), only="train"), run.Progress())


def changed(running: Run) -> set[str]:
    """The student's parameters that the next step changes."""
    own = running.roles["student"].parameters()
    before = {name: value.detach().clone() for name, value in own.items()}
    running.trainer.train_step()
    return {name for name, value in own.items() if not torch.equal(value, before[name])}


def of(running: Run, *parts: str | None) -> set[str]:
    return {name for name in running.roles["student"].parameters() if moe.part(name) in parts}


@pytest.mark.parametrize("others", ["frozen", "trained"])
def test_each_stage_trains_its_own_parameters_and_no_other(others: str) -> None:
    running = built("train.steps=4", "distiller.shared=0.5", f"distiller.others={others}", "optimizer.student.warmup=0", "train.batch_size=16")
    rest: list[str | None] = [None] if others == "trained" else []
    for part in ("shared", "shared", "experts", "experts"):
        allowed, moved = of(running, part, *rest), changed(running)
        assert moved <= allowed
        everywhere = {name for name in allowed if moe.part(name) == "shared" or name.endswith("router.weight")}
        assert {name for name in everywhere if not name.startswith("transformer_blocks.3.ff_context")} <= moved
        if others == "trained":
            assert len(moved & of(running, None)) > 50


def test_every_parameter_of_an_expert_layer_is_one_or_the_other() -> None:
    running = built()
    network: Any = running.roles["student"].denoiser.backbone
    inside = {f"{layer.name}.{name}" for layer in moe.expert_layers(network) for name, _ in layer.named_parameters()}
    assert inside == of(running, "shared", "experts")
    assert {name for name in inside if ".shared." in name} == of(running, "shared")


@pytest.mark.parametrize(("share", "stages"), [(0.0, ["experts"] * 4), (0.25, ["shared"] + ["experts"] * 3), (1.0, ["shared"] * 4)])
def test_stages_divide_the_run(share: float, stages: list[str]) -> None:
    distiller: Any = built("train.steps=4", f"distiller.shared={share}").trainer.distiller
    assert [distiller.stage(step) for step in range(4)] == stages


def test_the_first_stage_runs_without_routed_experts() -> None:
    running = built("train.steps=2", "distiller.shared=0.5")
    for rows in (False, True):
        metrics = running.trainer.train_step()
        assert any(name.startswith("experts/") for name in metrics) == rows
    layers = moe.expert_layers(running.roles["student"].denoiser.backbone)
    assert {layer.active for layer in layers} == {2.0}


def loss(running: Run, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    trainer: Any = running.trainer
    rng = SampleRng(0, ("loss",), range(4))
    found = trainer.distiller.imitate(trainer.models, trainer.data.draw(rng.at("data")), rng, step)
    return found.value, found.logs


def test_a_student_that_is_its_teacher_has_no_loss() -> None:
    running = built("student.moe.active=12", "student.moe.router_std=0", "distiller.shared=0.5", "train.steps=2")
    for role in running.roles.values():
        role.denoiser.double()
    value, logs = loss(running, 1)
    assert value.item() < 1e-24 * 100
    assert logs["features"].item() < 1e-24
    value.backward()
    gradients = [p.grad for p in running.roles["student"].parameters().values() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert loss(running, 0)[0].item() > 1e-2  # without its routed experts it is another


def test_features_of_both_streams_count() -> None:
    running = built()
    models, family = running.trainer.models, running.plan.family
    x, t = torch.randn(2, *family.latent.shape), torch.tensor([0.3, 0.8], dtype=torch.float64)
    cond = family.encode_prompts(["a handwritten seven", "any digit"])
    got = models["teacher"].features(x, t, cond, None).features
    tokens, width = (
        next(value for value in cond.values() if value.ndim == 3).shape[1],
        family.feature_widths(running.roles["teacher"].denoiser.backbone)[0],
    )
    assert [feature.shape[1:] for feature in got] == [(tokens, width), (16, width)] * 3 + [(16, width)]  # the last block drops the text
    assert [feature.shape[1] for feature in models["teacher"].features(x, t, cond, [1, 3]).features] == [tokens, 16, 16]
    torch.testing.assert_close(models["teacher"].features(x, t, cond, ()).prediction, models["teacher"](x, t, cond, models["teacher"].kind).float())


def test_layers_weigh_as_the_paper_says() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = [scale * torch.randn(3, n, 5, generator=generator, dtype=torch.float64) for scale, n in ((1.0, 4), (10.0, 4), (0.1, 7))]
    own = [(each + 0.3 * torch.randn(each.shape, generator=generator, dtype=torch.float64)).requires_grad_() for each in wanted]
    output = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    value = self_weighted(own, wanted, output)
    errors = [(a - b).square().mean() for a, b in zip(own, wanted, strict=True)]
    norms = [torch.stack([sample.norm() for sample in each]).mean() for each in wanted]
    weights = [(output / error * sum(norms) / (3 * norm)).item() for error, norm in zip(errors, norms, strict=True)]
    assert value.item() == pytest.approx(sum(w * e.item() for w, e in zip(weights, errors, strict=True)), rel=1e-12)
    value.backward()
    assert output.grad is None  # weights are constants
    for each, theirs, weight in zip(own, wanted, weights, strict=True):
        torch.testing.assert_close(each.grad, weight * 2 * (each.detach() - theirs) / each.numel())
    shares = [w * e.item() / 0.7 for w, e in zip(weights, errors, strict=True)]
    assert shares[0] > shares[1]  # large features count less
    relative = sum(((a - b).square().sum() / b.square().sum()).item() for a, b in zip(own, wanted, strict=True)) / 3
    assert relative_error(own, wanted).item() == pytest.approx(relative, rel=1e-12)


def test_a_layer_that_is_right_to_the_bit_weighs_nothing() -> None:
    wanted = [torch.ones(2, 3, 4), torch.ones(2, 3, 4)]
    own = [torch.ones(2, 3, 4, requires_grad=True), torch.full((2, 3, 4), 2.0, requires_grad=True)]
    value = self_weighted(own, wanted, torch.tensor(0.5))
    value.backward()
    assert value.item() == pytest.approx(0.5)
    assert not own[0].grad.any()  # type: ignore[union-attr]
    assert own[1].grad.isfinite().all()  # type: ignore[union-attr]


def test_a_run_resumes_across_its_stages(tmp_path: Path) -> None:
    keys = ["train.steps=4", "train.checkpoint_every=1", "train.keep=4", "distiller.shared=0.5"]
    whole = run.train(digits(*keys), tmp_path / "whole", only="train")
    for step in (1, 2, 3):
        resumed = Path(shutil.copytree(whole, tmp_path / f"from_{step}"))
        run.train(digits(*keys), resumed, resume=True, resume_from=f"step_{step:06d}", only="train")
        for name in ("role_student", "ema_student", "optimizer_student"):
            got, want = (load_file(folder / f"checkpoints/step_000004/{name}.safetensors") for folder in (resumed, whole))
            assert got.keys() == want.keys()
            assert all(torch.equal(got[key], want[key]) for key in want), name


def test_points_of_the_teachers_trajectories_need_prompts_only() -> None:
    keys = ["distiller.points=teacher_trajectory", "distiller.trajectory.evaluations=3", "data={prompts: fastgen:digits}", "train.steps=2"]
    running = built(*keys, "distiller.shared=0.5", "optimizer.student.warmup=0")
    assert running.data.parts[0].latents is None
    for part in ("shared", "experts"):
        moved = changed(running)
        assert moved
        assert moved <= of(running, part)


def test_it_is_drawn_with_its_teachers_guidance() -> None:
    running = built()
    assert running.info().guidance == 1.5
    assert running.generator("student").steps == 25


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distiller.taps=[1, 1]"], "distiller: taps: 1 is there twice"),
        (["student.moe=null"], "student.moe: missing; dense2moe trains a student of experts, and it says of how many"),
        (
            ["student.moe.active=0", "distiller.shared=0.5"],
            "student.moe.active: 0, so routed experts never run, but distiller.shared (0.5) leaves steps in which they train; set it to 1, or make "
            "some active",
        ),
        (["distiller.taps=[0, 4]"], "distiller.taps: no block 4; this network has blocks 0 to 3"),
        (
            ["distiller.taps=[0]", "distiller.features=0"],
            "distiller.taps: not used with features: 0.0; remove it",
        ),
        (["distiller.trajectory.evaluations=4"], "distiller.trajectory: not used with points: data; remove it"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(Recipe.load("digits_dense2moe", overrides), only="train")
    assert str(caught.value).startswith(f"recipe key {message}")


def test_a_pruned_student_is_one_without_routed_experts() -> None:
    plan(digits("student.moe.active=0", "distiller.shared=1"), only="train")


def test_without_noise_in_routers_every_token_chooses_the_same_experts_at_first() -> None:
    rows = [built(f"student.moe.router_std={std}", "distiller.shared=0", "train.batch_size=32").trainer.train_step() for std in (0, 0.02)]
    assert rows[0]["experts/student/idle"] == pytest.approx(10 / 12, abs=1e-4)
    assert rows[1]["experts/student/idle"] < 0.05


# Blocks in groups

GROUPS = ["student.moe.groups=[{size: 2, kept: 1}]", "student.moe.router_std=0.5", "train.steps=4", "distiller.shared=0.25", "distiller.blocks=0.5"]


@pytest.mark.parametrize("others", ["frozen", "trained"])
def test_at_last_blocks_in_groups_and_their_routers_train(others: str) -> None:
    running = built(*GROUPS, f"distiller.others={others}", "optimizer.student.warmup=0", "train.batch_size=32")
    distiller: Any = running.trainer.distiller
    assert [distiller.stage(step) for step in range(4)] == ["shared", "experts", "blocks", "blocks"]
    own = running.roles["student"].parameters()
    inside = {name for name in own if name.startswith(("transformer_blocks.0.", "transformer_blocks.1."))}
    routers = of(running, "blocks")
    assert len(routers) == 2 and routers <= inside
    for _ in range(2):
        assert not changed(running) & routers
    moved = changed(running)
    assert routers <= moved
    assert {name for name in inside if "attn.to_q.weight" in name} & moved  # of the block that this batch's samples keep, at least
    assert moved <= inside | (of(running, None) if others == "trained" else set())


def test_blocks_are_left_out_at_last_alone_and_groups_count_by_their_outputs() -> None:
    running = built(*GROUPS, "train.batch_size=8")
    trainer = running.trainer
    batch, rng = next(trainer._batches()), SampleRng(0, ("test",), range(8))
    distiller: Any = trainer.distiller
    losses = [distiller.imitate(trainer.models, batch, rng, step).value for step in (1, 2)]
    x, t, cond = distiller._points(trainer.models, batch, rng)
    with torch.no_grad():
        got = trainer.models["student"].using(whole=False).features(x, t, cond, (1,))
        wanted = trainer.models["teacher"].features(x, t, cond, (1,))
    assert len(got.features) == len(wanted.features) == 2  # the streams of text and picture behind the group
    output = (got.prediction - wanted.prediction).square().mean()
    expected = output + self_weighted(got.features, wanted.features, output)
    assert losses[1].item() == pytest.approx(expected.item(), rel=1e-6)
    with torch.no_grad():
        got = trainer.models["student"].using(whole=True).features(x, t, cond, None)
        wanted = trainer.models["teacher"].features(x, t, cond, None)
    output = (got.prediction - wanted.prediction).square().mean()
    assert losses[0].item() == pytest.approx((output + self_weighted(got.features, wanted.features, output)).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["student.moe.groups=[{size: 2, kept: 1}]", "distiller.blocks=0.0001"],
            "distiller.blocks: 0.0001 of 600 steps are none, so which blocks a sample passes through is never learned; give it more",
        ),
        (
            ["student.moe.groups=[{size: 2, kept: 1}]", "distiller.blocks=1", "distiller.shared=0", "distiller.taps=[0]"],
            "distiller: taps are not used with blocks: 1, for the last blocks of groups count there; remove them",
        ),
        (
            ["student.moe.groups=[{size: 2, kept: 1}]"],
            "distiller.blocks: 0, so which blocks a sample passes through is never learned; give it a share",
        ),
        (["distiller.blocks=0.2"], "distiller.blocks: 0.2, but no blocks are in groups; give student.moe.groups, or remove it"),
        (["distiller.blocks=0.7", "distiller.shared=0.4"], "distiller: shared (0.4) and blocks (0.7) are shares of one run; together they are at"),
    ],
)
def test_blocks_have_a_stage_where_they_are_in_groups(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(digits(*overrides), only="train")
    assert str(caught.value).startswith(f"recipe key {message}")


@pytest.mark.parametrize("how", ["{rank: 4}", "{rank: 0, shared: true}"])
def test_modulation_that_was_made_small_trains_along(how: str) -> None:
    running = built("train.steps=4", "distiller.shared=0.5", f"student.moe.modulation={how}", "optimizer.student.warmup=0")
    for part in ("shared", "shared", "experts"):
        moved = changed(running)
        others = moved - of(running, part)
        assert others and all(".linear." in name or name.startswith("common_modulation.") for name in others)
        assert any("norm1.linear" in name for name in others)
