"""Students of experts in the house: roles, balance loss, refusals, resumed runs, exports that plain diffusers draws with, and what reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from pipelines import card_snippet
from pipelines import same_interpreter as same_interpreter
from safetensors.torch import load_file
from torch import Tensor

from fastgen import cli, load_student, run
from fastgen.config import Recipe
from fastgen.curves import by_group
from fastgen.distillers.base import Batch, Loss, Update
from fastgen.errors import UserError
from fastgen.export import export_student, verify
from fastgen.families import find_family
from fastgen.outlook import dry_run
from fastgen.plan import plan
from fastgen.rng import SampleRng
from fastgen.roles import Roles, build_roles, frozen, student, trainable
from fastgen.room import answer
from fastgen.run.building import Run
from fastgen.surgery import moe
from fastgen.surgery.moe.accounting import account
from fastgen.surgery.moe.conversion import flops_in_words, in_words, summary

EXPERTS = ["student.moe={experts: 12, shared: 1.0, routed: 0.25, active: 2, calibration: 2}"]
DENSE, SPLIT = 586120, 591496  # parameters of the digits teacher, and with seven routers of 12 x 64


def digits(*overrides: str, recipe: str = "digits_dmd2_1step") -> Recipe:
    keys = ["train.batch_size=4", "train.sample_every=0", "train.device=cpu", "evaluate.protocol=null"]
    return Recipe.load(recipe, [*keys, *overrides])


def built(*overrides: str, recipe: str = "digits_dmd2_1step") -> Run:
    return run.build(plan(digits(*EXPERTS, *overrides, recipe=recipe), only="train"), run.Progress())


def network(role: Any) -> Any:
    return role.denoiser.backbone


# Roles


def made(conversion: moe.Conversion, *, double: bool = False) -> Roles:
    family = find_family("fastgen:digits")
    base = family.load_backbone()
    specs = {"student": student(), "fake_score": trainable(), "teacher": frozen()}
    return build_roles(specs, family, base.double() if double else base, experts=conversion)


def inputs(roles: Roles, size: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    family = roles["student"].denoiser.family
    rng = SampleRng(0, ("test",), range(size))
    cond = family.encode_prompts(["a handwritten seven", "an even digit", "any digit"][:size])
    return rng.normal("x", family.latent.shape), torch.linspace(0.2, 0.9, size).double(), cond


def test_only_what_is_exported_has_experts() -> None:
    roles = made(moe.Conversion())
    assert {name: len(moe.expert_layers(network(role))) for name, role in roles.items()} == {"student": 7, "fake_score": 0, "teacher": 0}
    assert {name: sum(p.numel() for p in role.parameters().values()) for name, role in roles.items()} == {
        "student": SPLIT,
        "fake_score": DENSE,
        "teacher": 0,
    }
    assert all(parameter.requires_grad for parameter in network(roles["student"]).parameters())


@torch.no_grad()
def test_with_all_experts_and_routers_of_zeros_the_student_begins_as_its_teacher() -> None:
    roles = made(moe.Conversion(moe.Experts(active=12)), double=True)
    x, t, cond = inputs(roles)
    got, wanted = (roles[name].predictor(x.double(), t, cond) for name in ("student", "teacher"))
    assert (got - wanted).abs().max() <= 1e-12
    fewer = roles["student"].predictor.using(11)(x.double(), t, cond)
    assert (fewer - wanted).abs().max() > 1e-4
    assert torch.equal(roles["student"].predictor(x.double(), t, cond), got)  # and is as it was


def test_only_some_blocks_are_split_where_only_some_are_asked_for() -> None:
    roles = made(moe.Conversion(blocks=(1, 3), leave=("ff_context",)))
    names = [layer.name for layer in moe.expert_layers(network(roles["student"]))]
    assert names == ["transformer_blocks.1.ff", "transformer_blocks.3.ff"]


def test_routers_begin_small_and_from_their_seed() -> None:
    seeds = [made(moe.Conversion(router_std=0.5, seed=seed)) for seed in (1, 1, 2)]
    first, again, other = ([layer.router.weight for layer in moe.expert_layers(network(roles["student"]))] for roles in seeds)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])
    logits = torch.randn(10000, 64) @ torch.cat(first).detach().T
    assert logits.std() == pytest.approx(0.5, rel=0.05)


# The balance loss


def test_a_pass_with_gradients_brings_the_weighted_balance_loss() -> None:
    roles = made(moe.Conversion(router_std=1.0, balance=0.3))
    x, t, cond = inputs(roles)
    predict = roles["student"].predictor
    with moe.recording(network(roles["student"])) as routings:
        predict(x, t, cond)
    assert len(routings) == 0  # for the network's own recording comes in between
    taken = predict.take_auxiliary()
    assert taken is not None
    with torch.no_grad():
        predict(x, t, cond)
        with moe.recording(network(roles["student"])) as routings:
            predict(x, t, cond)
    assert predict.take_auxiliary() is None
    assert taken.value.item() == pytest.approx(0.3 * moe.balance_loss(routings).item(), rel=1e-6)
    counts = list(moe.counts(routings).values())
    assert taken.logs["idle"].item() == pytest.approx(torch.stack([(c == 0).float().mean() for c in counts]).mean().item())
    assert taken.logs["busiest"].item() == pytest.approx(max((12 * c.max() / c.sum()).item() for c in counts))
    assert 0 < taken.logs["entropy"].item() < 1
    assert taken.logs["dropped"].item() == 0


def test_who_does_not_train_or_has_no_experts_brings_none() -> None:
    roles = made(moe.Conversion())
    x, t, cond = inputs(roles)
    models = roles.predictors()
    with roles.training(["fake_score"]):
        for predict in models.values():
            predict(x, t, cond)
    assert [predict.take_auxiliary() for predict in models.values()] == [None] * 3
    models["student"].using(0)(x, t, cond)  # as if routed experts had been pruned
    assert models["student"].take_auxiliary() is None
    models["student"](x, t, cond)
    assert models["student"].using(1).take_auxiliary() is not None  # it is the same network


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_trainer_adds_it_by_the_share_of_each_micro_batch(micro_batch: int | None) -> None:
    """Of a loss that is always 0."""
    running = built("student.moe.balance=0.5", "student.moe.router_std=1.0", *([] if micro_batch is None else [f"train.micro_batch={micro_batch}"]))
    trainer, models = running.trainer, running.trainer.models
    seen: list[tuple[Tensor, Tensor, Any, int]] = []

    def nothing(models: Any, batch: Batch, rng: SampleRng, step: int) -> Loss:
        x, t = rng.normal("x", running.plan.family.latent.shape), rng.uniform("t")
        seen.append((x, t, batch.cond, batch.size))
        return Loss(0 * models["student"](x, t, batch.cond).sum())

    with running.roles.training(["student"]):
        metrics = trainer._backward(Update(("student",), (nothing,)), 0, trainer._batches())
        got = {name: p.grad.clone() for name, p in running.roles["student"].parameters().items() if p.grad is not None and p.grad.any()}
        for parameter in running.roles["student"].parameters().values():
            parameter.grad = None
        for x, t, cond, size in seen:
            models["student"](x, t, cond)
            taken = models["student"].take_auxiliary()
            assert taken is not None
            (taken.value * size / 4).backward()
    assert len(seen) == (1 if micro_batch is None else 2)
    assert any(name.endswith("router.weight") for name in got)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, running.roles["student"].parameters()[name].grad, rtol=1e-5, atol=1e-9)
    assert metrics["loss/nothing"] == 0
    assert metrics["experts/student/balance"] >= 1


def test_blocks_that_are_computed_again_change_no_number() -> None:
    kept, again = (built(f"train.checkpointing={flag}") for flag in ("false", "true"))
    rows = [running.trainer.train_step() for running in (kept, again)]
    assert rows[0] == rows[1]
    ours, theirs = (running.roles["student"].parameters() for running in (kept, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Importance


def test_importance_is_measured_once_and_from_the_seed() -> None:
    def shared(*overrides: str, recipe: str = "digits_dmd2_1step") -> Tensor:
        (layer, *_) = moe.expert_layers(network(built(*overrides, recipe=recipe).roles["student"]))
        return layer.shared.up.weight.detach()

    first = shared()
    assert torch.equal(shared(), first)
    others = [
        shared(*keys)
        for keys in (
            ["student.moe.importance=random", "student.moe.calibration=8"],
            ["student.moe.importance=magnitude", "student.moe.calibration=8"],
            ["train.seed=1"],
        )
    ]
    others.append(shared(recipe="digits_dense2moe"))  # on images, not on what the teacher draws
    assert not any(torch.equal(first, other) for other in others)


# Refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.moe.calibration=0"], ".calibration: importance is measured on 1 batch or more; for none, set student.moe.importance to"),
        (["student.moe.experts=0"], ".experts: Input should be greater than or equal to 1 (given: 0)"),
        (["student.moe.routers=token"], ".routers: unknown key; did you mean 'router'?"),
        (["student.moe.blocks=[]"], ".blocks:"),
        (["student.moe.blocks=[1, 0, 1]"], ".blocks: 1 is there twice"),
        (["student.moe.importance=random", "student.moe.calibration=-1"], ".calibration: Input should be greater than or equal to 0"),
        (["student.moe.importance=random", "student.moe.calibration=3"], ": calibration is not used with importance: random"),
        (["student.moe.router=expert", "student.moe.balance=0.5"], ": balance is not used with router: expert"),
        (["student.moe.active=0", "student.moe.balance=0.5"], ": balance is not used with active: 0"),
        (["student.moe.router=expert", "student.moe.remove_dead=0.1"], ".remove_dead: where experts choose, their loads are alike"),
        (["student.moe.router=expert", "student.moe.upcycle={}"], ".upcycle: where experts choose, a copy takes its original's tokens for ever"),
    ],
)
def test_what_is_no_split_is_refused_by_its_key(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        digits(*overrides)
    assert str(caught.value).startswith(f"recipe key student.moe{message}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["student.moe.experts=5"],
            ": transformer_blocks.0.ff has 256 hidden neurons, which 1.0 + 5 x 0.25 does not divide into whole experts",
        ),
        (["student.moe.active=13"], ".active: 13 of 12 experts (transformer_blocks.0.ff); allowed: 0 to 12, a whole number where tokens choose"),
        (["student.moe.active=1.5"], ".active: 1.5 of 12 experts (transformer_blocks.0.ff); allowed: 0 to 12, a whole number where tokens choose"),
        (["student.moe.blocks=[4]"], ".blocks: no block 4; the teacher's are 0 to 3"),
        (["student.moe.leave=[ff, fff]"], ".leave: no layer in question has a name that ends in 'fff'; names here end in ff, ff_context"),
        (["student.moe.leave=[attn]"], ".leave: no layer in question has a name that ends in 'attn'; names here end in ff, ff_context"),
        (["student.moe.leave=[ff, ff_context]"], ": SD3Transformer2DModel has no feed-forward layer in its blocks that is not left dense"),
        (
            ["student.moe.experts=12", "student.shrink.depth=2"],
            ": the student has fewer blocks than its teacher (student.shrink); remove one of them",
        ),
        (
            ["student.moe.experts=12", "distiller.ida=0.1"],
            ": distiller.ida (0.1) moves the fake score towards a student of its own shape; remove one",
        ),
    ],
)
def test_what_cannot_be_trained_so_is_refused_by_the_plan(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(digits(*overrides), only="train")
    assert str(caught.value) == f"recipe key student.moe{message}"


# Plans


def test_a_dry_run_and_a_plan_say_what_a_token_uses(capsys: pytest.CaptureFixture[str]) -> None:
    found = dry_run(digits(*EXPERTS))
    hidden = 7 * 10 * 16  # neurons of routed experts that a token does not use
    # The same per token: 16 of the picture in four layers, 16 of the text in three, two products of 64; and routers of 12 x 64.
    line = f"student     {in_words(found['experts'])}\n"
    flops, dense_flops = found["experts"].pop("flops"), found["experts"].pop("dense_flops")
    tokens = 4 * 16 + 3 * 16
    assert flops - dense_flops == 2 * tokens * (12 * 64 - 160 * 2 * 64)
    assert found["experts"] == {
        "layers": 7,
        "experts": 12,
        "active": 2.0,
        "choice": "token",
        "parameters": SPLIT,
        "active_parameters": SPLIT - hidden * (64 + 64 + 1),  # of each a row, its bias and a column
        "dense_parameters": DENSE,
    }
    assert {name: role["trains"] for name, role in found["roles"].items()} == {"student": SPLIT, "fake_score": DENSE, "teacher": 0}
    assert "1 shared and 2 of 12 routed experts a token in 7 feed-forward layers" in line
    assert cli.main(["train", "digits_dmd2_1step", *EXPERTS, "--dry-run"]) == 0
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("router", ["token", "expert"])
def test_a_step_is_measured_with_experts(router: str) -> None:
    dense, split = (answer(digits(*keys)) for keys in ([], [*EXPERTS, f"student.moe.router={router}"]))
    assert split["bytes"]["step"] > dense["bytes"]["step"] / 2
    assert split["bytes"]["trained"] - dense["bytes"]["trained"] == 4 * (SPLIT - DENSE)
    assert split["experts"]["choice"] == router
    rows = split["layers"]
    assert rows["router"] == {
        "dense": {"parameters": 0, "active": 0, "flops": 0.0},
        "student": {"parameters": 5376, "active": 5376, "flops": 2.0 * 112 * 12 * 64},
    }
    for whose, total in (("dense", "dense_flops"), ("student", "flops")):
        assert sum(row[whose]["flops"] for row in rows.values()) == pytest.approx(split["experts"][total], abs=1)


def test_flops_have_the_largest_unit_of_which_there_is_one() -> None:
    assert [flops_in_words(value) for value in (66.07e12, 4.2e9, 8.6e6)] == ["66.07 TFLOPs", "4.2 GFLOPs", "8.6 MFLOPs"]


# From recipe to student

RUN = [*EXPERTS, "train.steps=4", "train.checkpoint_every=2", "student.moe.router_std=0.5"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of four steps."""
    return run.train(digits(*RUN), tmp_path_factory.mktemp("moe") / "run", only="train")


@pytest.fixture(scope="module")
def exported(whole: Path) -> Path:
    return run.export(whole, whole.parent / "student")


def test_a_resumed_run_ends_as_if_nothing_had_happened(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(resumed / "checkpoints/step_000004")
    monkeypatch.setattr("fastgen.run.building.measured", None)  # the split is the checkpoint's
    run.train(digits(*RUN), resumed, resume=True, only="train")
    files = sorted(file.name for file in (whole / "checkpoints/step_000004").glob("*.safetensors"))
    assert "ema_student.safetensors" in files
    for name in files:
        got, want = (load_file(folder / "checkpoints/step_000004" / name) for folder in (resumed, whole))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want), name


def test_a_run_is_resumed_with_the_same_experts(whole: Path) -> None:
    with pytest.raises(UserError, match=r"^--resume: recipe key student\.moe\.active is 3\.0, the run in .* has 2\.0; resume with the same recipe$"):
        run.train(digits(*RUN, "student.moe.active=3"), whole, resume=True, only="train")


def test_a_few_step_run_begins_with_a_student_of_experts(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.run.building.measured", None)
    running = run.build(
        plan(
            digits(*RUN, f"student.init={whole}", "student.moe.active=3", "student.moe.importance=random", "student.moe.calibration=8"), only="train"
        ),
        run.Progress(),
    )
    state = load_file(whole / "checkpoints/step_000004/ema_student.safetensors")
    own = running.roles["student"].parameters()
    assert own.keys() == state.keys() - {"updates"}
    assert all(torch.equal(own[name], state[name]) for name in own)
    assert {layer.active for layer in moe.expert_layers(network(running.roles["student"]))} == {3.0}
    for overrides in (["student.moe.experts=6"], ["student.moe=null"], ["student.moe.leave=[ff_context]"]):
        with pytest.raises(UserError, match=r"^recipe key student\.init: .* holds a student with student\.moe .*; both need the same split$"):
            plan(digits(*RUN, f"student.init={whole}", "student.moe.shared=0.5", *overrides), only="train")


def test_the_export_brings_its_own_class(exported: Path) -> None:
    name = "modeling_sd3transformer2dmodel_experts"
    assert (exported / f"transformer/{name}.py").is_file()
    index = json.loads((exported / "model_index.json").read_text(encoding="utf-8"))
    assert index["transformer"] == [name, "SD3Transformer2DModelWithExperts"]
    manifest = json.loads((exported / "fastgen.json").read_text(encoding="utf-8"))
    assert manifest["surgery"]["moe"]["active_parameters"] < DENSE < manifest["surgery"]["moe"]["parameters"] == SPLIT
    assert manifest["loading"] == {"trust_remote_code": True}
    assert f"Its feed-forward layers are mixtures of experts: {in_words(manifest['surgery']['moe'])}." in (exported / "README.md").read_text(
        encoding="utf-8"
    )
    assert "trust_remote_code=True)" in card_snippet(exported)
    with pytest.raises(ValueError, match=r"Pass `trust_remote_code=True` to allow loading remote code modules"):
        DiffusionPipeline.from_pretrained(exported)


@pytest.mark.parametrize("settings", [{}, {"low_cpu_mem_usage": False}, {"torch_dtype": torch.bfloat16}])
def test_the_native_class_alone_refuses_its_weights(exported: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"experts of fastgen: load the pipeline with trust_remote_code=True"):
        SD3Transformer2DModel.from_pretrained(exported, subfolder="transformer", **settings)


def test_plain_diffusers_in_another_process_draws_what_we_draw(exported: Path, whole: Path) -> None:
    assert cli.main(["verify", str(exported)]) == 0
    prompts, seeds = ["a handwritten seven", "an even digit"], [0, 1]
    pictures = load_student(exported)(prompts, seeds)
    running = run.build(plan(Recipe.load(whole / "recipe.yaml"), only="train"), run.Progress())
    assert (pictures - running.generator("student")(prompts, seeds)).abs().max() > 1e-4  # untrained
    state = load_file(whole / "checkpoints/step_000004/ema_student.safetensors")
    state.pop("updates")
    running.roles["student"].load_state_dict(state)
    torch.testing.assert_close(running.generator("student")(prompts, seeds), pictures, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "500KB"}])
def test_what_plain_diffusers_saves_again_has_the_file_and_the_guard(exported: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    def pictures(folder: Path) -> Any:
        pipeline: Any = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        call = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 8, "height": 8, "width": 8, "output_type": "np"}
        return pipeline, pipeline("an even digit", generator=torch.Generator().manual_seed(0), **call).images

    pipeline, expected = pictures(exported)
    pipeline.save_pretrained(tmp_path / "again", **settings)
    file = "transformer/modeling_sd3transformer2dmodel_experts.py"
    assert (tmp_path / "again" / file).read_bytes() == (exported / file).read_bytes()
    assert abs(pictures(tmp_path / "again")[1] - expected).max() < 1e-5  # weights in parts lie elsewhere in memory
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="experts of fastgen"):
        SD3Transformer2DModel.from_pretrained(tmp_path / "again", subfolder="transformer")
    pipeline.transformer.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="experts of fastgen"):
        SD3Transformer2DModel.from_pretrained(tmp_path / "alone")


def test_loading_a_student_runs_none_of_its_code(exported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "student"))
    file = copy / "transformer/modeling_sd3transformer2dmodel_experts.py"
    file.write_text("raise SystemExit('run')\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"modeling_sd3transformer2dmodel_experts\.py"):
        load_student(copy)
    with pytest.raises(UserError, match=r"modeling_sd3transformer2dmodel_experts\.py"):
        verify(copy)
    loaded = find_family(copy, size=[8, 8]).load_backbone()
    assert len(moe.expert_layers(loaded)) == 7


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize("router", ["token", "expert"])
def test_half_precision_leaves_routers_in_full(whole: Path, tmp_path: Path, router: str) -> None:
    running = built("export.dtype=bf16", f"student.moe.router={router}", "train.steps=1")
    running.trainer.train_step()
    output = export_student(running.averaged(), running.plan.family, running.info(), tmp_path / "student", dtype="bf16")
    state = load_file(output / "transformer/diffusion_pytorch_model.safetensors")
    kinds = {
        name.rpartition(".")[0].endswith("router") or name.endswith("selection_bias"): value.dtype for name, value in state.items() if "ff" in name
    }
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert verify(output).passed


def test_a_student_of_experts_may_teach_but_is_not_split_again(exported: Path, tmp_path: Path) -> None:
    teaching = [f"teacher.pretrained={exported}", "teacher.guidance=1.0", "train.steps=1"]
    with pytest.raises(UserError) as caught:
        plan(digits(*EXPERTS, *teaching), only="train")
    said = "transformer_blocks.0.ff of SD3Transformer2DModel is split into experts already; split the dense network"
    assert str(caught.value) == f"recipe key student.moe: {said}"
    running = run.build(plan(digits(*teaching)), run.Progress())
    running.trainer.train_step()
    assert [len(moe.expert_layers(network(role))) for role in running.roles.values()] == [7, 7, 7]
    output = export_student(running.averaged(), running.plan.family, running.info(), tmp_path / "student")
    assert json.loads((output / "transformer/config.json").read_text(encoding="utf-8"))["experts"]["layers"]
    loaded: Any = load_student(output)
    assert loaded(["a handwritten seven"], [0]).isfinite().all()


@pytest.mark.usefixtures("same_interpreter")
@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ("digits_scm_2step", ["student.moe.router_std=0.5"]),  # whose check of the exact tangent runs before the first step
        ("digits_meanflow_2step", []),
        ("digits_phased_dmd_4step", []),  # two students, of which one lies beside the pipeline
        ("digits_progressive_4step", ["distiller.halvings=1"]),
    ],
)
def test_few_step_methods_train_it_unchanged(recipe: str, keys: list[str], tmp_path: Path) -> None:
    running = built("train.steps=2", *keys, recipe=recipe)
    before = {name: value.detach().clone() for name, value in running.roles["student"].parameters().items()} if "student" in running.roles else {}
    for _ in range(2):
        metrics = running.trainer.train_step()
    assert any(name.startswith("experts/") for name in metrics)
    if before:
        changed = {moe.part(name) for name, value in running.roles["student"].parameters().items() if not torch.equal(value, before[name])}
        assert changed == {"shared", "experts", None}
    output = export_student(running.averaged(), running.plan.family, running.info(), tmp_path / "student")
    assert verify(output, seeds=(0, 1)).passed


def test_a_summary_is_of_the_network_itself() -> None:
    roles = made(moe.Conversion(moe.Experts(choice="expert", active=1.5)))
    costs = [account(network(role), role.denoiser.family.blocks(network(role))) for role in (roles["student"], roles["teacher"])]
    found = summary(network(roles["student"]), *costs)
    assert (found["active"], found["choice"]) == (1.5, "expert")
    assert "1.5 on average of 12 routed experts" in in_words(found)


# Groups of blocks, slim modulation, selection bias

GROUPS = ["student.moe.groups=[{size: 2, kept: 1}]", "student.moe.modulation={rank: 4}"]


def test_groups_and_slim_modulation_are_what_the_operators_make() -> None:
    running = built(*GROUPS, "student.moe.router_std=0.3")
    own = network(running.roles["student"])
    routers = moe.block_routers(own)
    assert [router.name for router in routers] == ["transformer_blocks.0 to transformer_blocks.1"]  # the last block gives no text on
    assert all(router.kept == 1 and router.tokens.weight.std() > 0 for router in routers)
    dense: Any = find_family("fastgen:digits").load_backbone()
    moe.slim(dense, list(dense.transformer_blocks), moe.Slim(4))
    for name, value in dense.state_dict().items():
        if ".norm1" in name:
            assert torch.equal(value, own.state_dict()[name])
    assert not moe.block_routers(network(running.roles["teacher"]))
    metrics = running.trainer.train_step()
    assert {"experts/student/blocks_balance", "experts/student/balance"} <= metrics.keys()


def test_samples_of_a_fresh_student_go_to_several_blocks() -> None:
    """Random routers whose inputs' mean was not taken out send most samples one way, the more so the fewer differ."""
    shares = []
    for calibration in (0, 8):
        keys = ["train.batch_size=64", "student.moe.importance=random", f"student.moe.calibration={calibration}"]
        running = built(*GROUPS, *keys, "distiller.blocks=0.3", recipe="digits_dense2moe")
        rng = SampleRng(7, ("test",), range(64))
        batch, t = running.data.draw(rng.at("data")), rng.uniform("t")
        assert batch.latents is not None
        family, own = running.plan.family, network(running.roles["student"])
        with torch.no_grad(), moe.recording_blocks(own) as choices:
            running.roles["student"].predictor(family.path.mix(batch.latents, rng.normal("noise", family.latent.shape), t), t, batch.cond)
        shares.append(float(choices[0].load.max()))
    assert shares[1] < 0.65 < shares[0]


def test_a_pass_may_leave_no_block_out() -> None:
    roles = made(moe.Conversion(router_std=0.5, groups=(("", moe.Groups(2, 1)),)))
    x, t, cond = inputs(roles)
    predict = roles["student"].predictor
    less, whole = predict(x, t, cond), predict.using(whole=True)(x, t, cond)
    assert (less - whole).abs().max() > 1e-4
    moe.set_kept(network(roles["student"]), 2)
    assert torch.equal(predict(x, t, cond), whole)


def test_each_step_moves_the_selection_bias_against_the_load() -> None:
    running = built("student.moe.bias_rate=0.01", "student.moe.balance=0", "student.moe.router_std=1.0")
    layer = moe.expert_layers(network(running.roles["student"]))[0]
    found: list[Tensor] = []
    denoiser = running.roles["student"].denoiser
    after = denoiser.after_step

    def seen(total: Any) -> None:
        found.append(denoiser._loads[layer.name].clone())
        after(total)

    denoiser.after_step = seen  # type: ignore[method-assign]
    running.trainer.train_step()
    assert len(found) == 1
    assert torch.equal(layer.selection_bias.detach(), 0.01 * (found[0].mean() - found[0]).sign())
    assert "transformer_blocks.0.ff.selection_bias" in running.roles["student"].state_dict()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["student.moe.groups=[{size: 2, kept: 3}]"], "groups.0.kept: 3 of groups of 2 blocks"),
        (["student.moe.bias_rate=0.1", "student.moe.router=expert"], "bias_rate: where experts choose, their load is even already; remove it"),
        (
            ["student.moe.groups=[{of: layers, size: 2, kept: 1}]"],
            "groups.of: no list of blocks 'layers'; SD3Transformer2DModel has transformer_blocks",
        ),
        (["student.moe.groups=[{size: 4, kept: 1}]"], "groups: SD3Transformer2DModel has no 4 consecutive blocks in one list that may be left out"),
        (["student.moe.modulation={rank: 65}"], "modulation: rank 65; transformer_blocks.0.norm1.linear has 64; allowed: 1 to 64"),
    ],
)
def test_what_cannot_be_grouped_or_slimmed_is_refused(keys: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(digits(*EXPERTS, *keys), only="train")
    assert str(caught.value).startswith(f"recipe key student.moe.{message}")


def test_a_run_of_groups_slim_modulation_and_bias_from_start_to_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [*RUN, *GROUPS, "student.moe.bias_rate=0.001"]
    folder = tmp_path / "run"
    run.train(digits(*keys), folder)
    manifest = json.loads((folder / "student" / "fastgen.json").read_text(encoding="utf-8"))
    assert (
        manifest["surgery"]["moe"]["grouped_blocks"],
        manifest["surgery"]["moe"]["kept_blocks"],
        manifest["surgery"]["moe"]["modulation_rank"],
    ) == (2, 1, 4)
    assert "1 of 2 blocks in groups a sample, modulation of rank 4" in (folder / "student" / "README.md").read_text(encoding="utf-8")
    state = load_file(next((folder / "student" / "transformer").glob("*.safetensors")))
    assert state["transformer_blocks.0.ff.selection_bias"].abs().max() > 0
    shutil.rmtree(folder / "student")
    shutil.rmtree(max((folder / "checkpoints").glob("step_*")))
    run.train(digits(*keys), folder, resume=True)
    again = load_file(next((folder / "student" / "transformer").glob("*.safetensors")))
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    with pytest.raises(UserError, match=r"both need the same split"):
        plan(digits(*RUN, f"student.init={folder}"), only="train")


def test_what_routers_do_is_logged_by_noise_level_and_has_panels_in_the_report() -> None:
    running = built("student.moe.router_std=0.5", "train.batch_size=16")
    metrics = running.trainer.train_step()
    own = {name for name in metrics if name.startswith("experts/student/")}
    assert {"experts/student/dropped", "experts/student/entropy_t0", "experts/student/busiest_t3", "experts/student/dropped_t2"} & own
    assert any(name.startswith("experts/student/busiest_t") for name in own)
    groups = by_group([{"step": 1, "experts/student/busiest": 2.0, "experts/student/busiest_t3": 3.0, "experts/student/entropy_t0": 0.5}])
    assert groups == {
        "expert_load": {"all": ([1], [2.0]), "nearest noise": ([1], [3.0])},
        "expert_entropy": {"nearest data": ([1], [0.5])},
    }
