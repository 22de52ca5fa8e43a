from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.errors import UserError
from fastgen.families.base import Family
from fastgen.families.toy import Toy
from fastgen.roles import LoraTuning, Role, Roles, RoleSpec, build_roles, frozen, judge, student, trainable
from fastgen.surgery import lora
from fastgen.surgery.second_time import Defaults

SPECS = {"student": trainable(), "fake_score": trainable(), "teacher": frozen()}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """A family, a fresh random network of it, and inputs."""

    family: Family
    backbone: Callable[[], nn.Module]
    x: Tensor
    cond: Conditioning
    t: Tensor

    def roles(self, *, adapters: bool, specs: dict[str, RoleSpec] = SPECS, recompute: bool = False) -> Roles:
        tuning = LoraTuning(rank=3, alpha=6.0, targets=self.family.lora_targets) if adapters else None
        return build_roles(specs, self.family, self.backbone(), tuning=tuning, recompute=recompute)

    def run(self, role: Role) -> Tensor:
        return role.module(self.x, self.t, self.cond).prediction


def toy_case() -> Case:
    family = Toy("toy:mixture", width=16)

    def backbone() -> nn.Module:
        network = family.load_backbone()
        nn.init.normal_(network.out.weight, std=0.2, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr, arg-type]
        return network

    return Case(family, backbone, normal(4, 2), {}, torch.tensor([0.2, 0.4, 0.6, 0.8]))


def sd3_case() -> Case:
    from diffusers import SD3Transformer2DModel

    from fastgen.families.sd3 import SD3

    def network() -> Any:
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=4, patch_size=2, in_channels=2, out_channels=2, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            caption_projection_dim=16, joint_attention_dim=12, pooled_projection_dim=10, pos_embed_max_size=4,
        ).eval()  # fmt: skip

    vae = SimpleNamespace(config={"block_out_channels": (8,)})
    family = SD3(SimpleNamespace(transformer=network(), vae=vae), max_sequence_length=3)
    cond = {"encoder_hidden_states": normal(2, 3, 12), "pooled_projections": normal(2, 10)}
    return Case(family, lambda: family.load_backbone(), normal(2, 2, 4, 6), cond, torch.tensor([0.3, 0.9]))


@pytest.fixture(scope="module", params=[toy_case, sd3_case], ids=["toy", "sd3"])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param()


def perturb(role: Role, seed: int) -> None:
    """Move a role's parameters away from where they started."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in role.parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def gradients(role: Role) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in role.parameters().items() if parameter.grad is not None}


def clear(roles: Roles) -> None:
    for role in roles.values():
        role.denoiser.zero_grad(set_to_none=True)


def assert_equal(values: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert values.keys() == expected.keys()
    assert values
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)


# Full fine-tuning


def test_full_roles_start_as_separate_copies_of_the_teacher(case: Case) -> None:
    roles = case.roles(adapters=False)
    before = case.run(roles["teacher"])
    for name in ("student", "fake_score"):
        # Equal weights at other addresses: the last bits of a matrix product may depend on alignment.
        torch.testing.assert_close(case.run(roles[name]), before, rtol=1e-6, atol=1e-6)
        weights, own = roles["teacher"].denoiser.backbone.state_dict(), roles[name].denoiser.backbone.state_dict()
        assert roles[name].state_dict().keys() == dict(case.backbone().named_parameters()).keys()
        assert all(torch.equal(own[key], value) for key, value in weights.items())
    untouched = case.run(roles["fake_score"])
    addresses = [p.data_ptr() for role in roles.values() for p in role.denoiser.backbone.parameters()]
    assert len(addresses) == len(set(addresses))
    perturb(roles["student"], 0)
    assert not torch.allclose(case.run(roles["student"]), before, atol=1e-3)
    assert torch.equal(case.run(roles["teacher"]), before)
    assert torch.equal(case.run(roles["fake_score"]), untouched)


def test_frozen_roles_train_nothing_and_precision_follows_the_role(case: Case) -> None:
    roles = build_roles(SPECS, case.family, case.backbone(), autocast=torch.bfloat16, frozen=torch.bfloat16)
    assert roles["teacher"].parameters() == roles["teacher"].state_dict() == {}
    assert not any(p.requires_grad for p in roles["teacher"].denoiser.parameters())
    assert roles.trained.keys() == {"student", "fake_score"}
    assert {p.dtype for p in roles["teacher"].denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in roles["student"].parameters().values()} == {torch.float32}
    assert roles.predictors()["student"].denoiser is roles["student"].module


# LoRA


def test_adapters_share_one_base_and_start_as_the_teacher(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a second adapter is nothing to warn of
        roles = case.roles(adapters=True)
    backbones = {id(role.denoiser.backbone) for role in roles.values()}
    assert len(backbones) == 1
    for role in roles.values():
        assert torch.equal(case.run(role), case.run(roles["teacher"]))
        expected = case.family.call(case.backbone(), case.x, case.t, case.cond)
        torch.testing.assert_close(case.run(role), expected, rtol=1e-6, atol=1e-6)
    trained = {id(p) for role in roles.trained.values() for p in role.parameters().values()}
    for name, parameter in roles["teacher"].denoiser.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained) == ("lora_" in name)


def test_adapters_are_independent(case: Case) -> None:
    roles = case.roles(adapters=True)
    teacher = case.run(roles["teacher"])
    perturb(roles["student"], 0)
    student = case.run(roles["student"])
    assert not torch.allclose(student, teacher, atol=1e-3)
    assert torch.equal(case.run(roles["fake_score"]), teacher)
    assert torch.equal(case.run(roles["teacher"]), teacher)
    perturb(roles["fake_score"], 1)
    assert torch.equal(case.run(roles["student"]), student)
    assert roles["student"].parameters().keys().isdisjoint(roles["fake_score"].parameters())


def test_adapter_output_by_hand() -> None:
    case = toy_case()
    roles = case.roles(adapters=True)
    perturb(roles["student"], 0)
    state = roles["student"].state_dict()
    reference = case.backbone()
    for target in case.family.lora_targets:
        down, up = state[f"{target}.lora_A.student.weight"], state[f"{target}.lora_B.student.weight"]
        assert down.shape[0] == up.shape[1] == 3
        reference.get_submodule(target).weight.data += 6.0 / 3 * up @ down  # type: ignore[union-attr, operator]
    torch.testing.assert_close(case.run(roles["student"]), case.family.call(reference, case.x, case.t, case.cond), rtol=1e-6, atol=1e-6)


def test_switching_adapters_before_backward_keeps_gradients(case: Case) -> None:
    roles = case.roles(adapters=True)
    perturb(roles["student"], 0)
    perturb(roles["fake_score"], 1)
    with roles.training(["student"]):
        case.run(roles["student"]).square().sum().backward()
        alone = gradients(roles["student"])
        clear(roles)
        loss = case.run(roles["student"]).square().sum()
        with torch.no_grad():
            case.run(roles["fake_score"])
            case.run(roles["teacher"])
        loss.backward()
    assert alone.keys() == roles["student"].parameters().keys()
    unused = {name for name, value in alone.items() if not value.any()}
    assert all(".1.attn.add_q_proj." in name for name in unused)  # SD3's last block ignores its text queries
    assert_equal(gradients(roles["student"]), alone)
    assert not gradients(roles["fake_score"])


def test_gradients_flow_through_a_frozen_role_into_the_trained_one(case: Case) -> None:
    for adapters in (False, True):
        roles = case.roles(adapters=adapters)
        with roles.training(["student"]):
            generated = case.run(roles["student"])
            roles["fake_score"].module(generated, case.t, case.cond).prediction.sum().backward()
        assert gradients(roles["student"])
        assert not gradients(roles["fake_score"])


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_blocks_computed_again_have_the_adapters_of_their_forward(adapters: bool) -> None:
    """Student, fake score and the bare teacher in one graph, on one network: none is left active when the backward pass computes again."""
    case = sd3_case()

    def found(recompute: bool) -> dict[str, dict[str, Tensor]]:
        roles = case.roles(adapters=adapters, recompute=recompute)
        perturb(roles["student"], 0)
        perturb(roles["fake_score"], 1)
        x = case.x.clone().requires_grad_()
        drawn = roles["student"].denoiser(x, case.t, case.cond, (1,))
        judged = roles["fake_score"].denoiser(drawn.prediction, case.t, case.cond).prediction
        kept = roles["teacher"].denoiser(drawn.prediction, case.t, case.cond).prediction
        lora.activate(roles["teacher"].denoiser.backbone, None)
        (judged * kept + drawn.features[0].square().mean()).sum().backward()
        assert x.grad is not None
        return {"x": {"": x.grad}} | {name: gradients(roles[name]) for name in ("student", "fake_score")}

    expected, again = found(False), found(True)
    assert all(expected.values())
    for name, values in expected.items():
        assert_equal(again[name], values)


def test_blocks_computed_again_keep_their_inputs_alone() -> None:
    case = sd3_case()
    kept: list[int] = []
    for recompute in (False, True):
        student = case.roles(adapters=True, recompute=recompute)["student"]
        count = 0

        def keep(x: Tensor) -> Tensor:
            nonlocal count
            count += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            case.run(student)
        kept.append(count)
    assert kept[1] < kept[0] / 2


def test_a_network_that_cannot_compute_its_blocks_again_is_refused() -> None:
    with pytest.raises(UserError, match=r"^recipe key train\.checkpointing: Backbone cannot compute its blocks again; remove it$"):
        toy_case().roles(adapters=False, recompute=True)


# Turns


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_gradients_reach_only_the_named_role(case: Case, adapters: bool) -> None:
    roles = case.roles(adapters=adapters)
    for name in ("student", "fake_score"):
        clear(roles)
        with roles.training([name]):
            sum(case.run(role).square().sum() for role in roles.values()).backward()  # type: ignore[union-attr]
        own = {id(p) for p in roles[name].parameters().values()}
        for role in roles.values():
            for key, parameter in role.denoiser.named_parameters():
                assert (parameter.grad is not None) <= (id(parameter) in own), f"{role.name}: {key}"
        assert all(p.requires_grad for role in roles.trained.values() for p in role.parameters().values())
        assert any(gradient.abs().max() > 0 for gradient in gradients(roles[name]).values())


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_the_gradient_of_a_turn_is_that_of_the_role_alone(adapters: bool) -> None:
    case = toy_case()
    roles = case.roles(adapters=adapters)
    perturb(roles["student"], 0)
    case.run(roles["student"]).square().sum().backward()
    alone = gradients(roles["student"])
    clear(roles)
    with roles.training(["student"]):
        (case.run(roles["student"]).square().sum() + 3 * case.run(roles["fake_score"]).sum()).backward()
    assert_equal(gradients(roles["student"]), alone)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_requires_grad_comes_back_after_an_exception(adapters: bool) -> None:
    roles = toy_case().roles(adapters=adapters)
    odd = next(iter(roles["fake_score"].parameters().values()))
    odd.requires_grad_(False)
    before = {key: p.requires_grad for role in roles.values() for key, p in role.denoiser.named_parameters()}

    def fail() -> None:
        with roles.training(["fake_score"]):
            assert all(p.requires_grad for p in roles["fake_score"].parameters().values())
            assert not any(p.requires_grad for p in roles["student"].parameters().values())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert before == {key: p.requires_grad for role in roles.values() for key, p in role.denoiser.named_parameters()}
    assert not odd.requires_grad


# Weights in and out


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_state_round_trip(case: Case, adapters: bool) -> None:
    roles, fresh = case.roles(adapters=adapters), case.roles(adapters=adapters)
    perturb(roles["student"], 0)
    fresh["student"].load_state_dict({name: value.clone() for name, value in roles["student"].state_dict().items()})
    for name, value in roles["student"].state_dict().items():
        assert torch.equal(fresh["student"].state_dict()[name], value)
    for name in ("student", "teacher"):
        torch.testing.assert_close(case.run(fresh[name]), case.run(roles[name]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_loading_is_strict(change: str, adapters: bool) -> None:
    role = toy_case().roles(adapters=adapters)["student"]
    before = {name: value.clone() for name, value in role.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    last = [*state][-1]
    if change == "missing":
        del state[last]
    elif change == "extra":
        state["elsewhere"] = torch.zeros(2)
    else:
        state[last] = state[last][:1]  # would broadcast
    expected = last if change != "extra" else "elsewhere"
    with pytest.raises(ValueError, match=rf"weights of role 'student'.*{expected}"):
        role.load_state_dict(state)
    assert_equal(role.state_dict(), before)


def test_merge_is_the_adapter_and_leaves_the_plain_architecture(case: Case) -> None:
    roles = case.roles(adapters=True)
    perturb(roles["student"], 0)
    perturb(roles["fake_score"], 1)
    student, teacher = case.run(roles["student"]).detach(), case.run(roles["teacher"]).detach()
    backbone = roles["student"].denoiser.backbone
    lora.activate(backbone, None)  # whichever adapter ran last must not matter
    lora.merge(backbone, "student")
    merged = case.family.call(backbone, case.x, case.t, case.cond)
    assert (merged - student).abs().max() <= 1e-6 * student.abs().max()
    assert (merged - teacher).abs().max() > 1e-3
    assert backbone.state_dict().keys() == case.backbone().state_dict().keys()
    plain = case.backbone()
    plain.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(case.family.call(plain, case.x, case.t, case.cond), merged, rtol=1e-6, atol=1e-6)
    assert not hasattr(backbone, "peft_config")


def test_adapter_in_pefts_format() -> None:
    roles = toy_case().roles(adapters=True)
    perturb(roles["student"], 0)
    exported, config = lora.exported(roles["student"].denoiser.backbone, "student")
    state = roles["student"].state_dict()
    assert {name.replace(".weight", ".student.weight") for name in exported} == state.keys()
    for name, value in exported.items():
        assert torch.equal(value, (2 if "lora_B" in name else 1) * state[name.replace(".weight", ".student.weight")])
    assert config["lora_alpha"] == config["r"] == 3


def test_adapters_start_from_the_seed_alone() -> None:
    def first_weights(seed: int, ambient: int) -> dict[str, Tensor]:
        torch.manual_seed(ambient)
        tuning = LoraTuning(rank=3, alpha=6.0, targets=Toy.lora_targets, seed=seed)
        family = Toy("toy:mixture", width=16)
        roles = build_roles(SPECS, family, family.load_backbone(), tuning=tuning)
        return {f"{name}/{key}": value.clone() for name, role in roles.trained.items() for key, value in role.state_dict().items()}

    one, same, other = first_weights(5, 1), first_weights(5, 2), first_weights(6, 1)
    assert all(torch.equal(one[key], same[key]) for key in one)
    random = [key for key in one if "lora_A" in key]
    assert random and not any(torch.equal(one[key], other[key]) for key in random)


# Blending, and roles that share a network


def product(role: Role, target: str) -> Tensor:
    """What an adapter adds to a layer's weight, without its scale."""
    state = role.state_dict()
    return state[f"{target}.lora_B.{role.name}.weight"] @ state[f"{target}.lora_A.{role.name}.weight"]


@pytest.mark.parametrize("weight", [0.0, 0.03, 1.0])
def test_blending_moves_every_weight_of_the_network(case: Case, weight: float) -> None:
    roles = case.roles(adapters=False, specs={"student": trainable(), "fake_score": trainable(heads="auto"), "teacher": frozen()})
    perturb(roles["student"], 0)
    perturb(roles["fake_score"], 1)
    student, fake = ({k: v.clone() for k, v in roles[name].state_dict().items()} for name in ("student", "fake_score"))
    roles["fake_score"].blend(roles["student"], weight)
    heads = {name for name in fake if name.startswith("heads.")}
    assert heads and fake.keys() - heads == student.keys()
    assert_equal(roles["fake_score"].state_dict(), fake | {name: (1 - weight) * fake[name] + weight * value for name, value in student.items()})
    assert all(torch.equal(value, student[name]) for name, value in roles["student"].state_dict().items())


def test_blending_adapters_moves_their_factors() -> None:
    """Each factor exactly, hence their product only roughly: (1 - w) B A + w B' A' and terms of order w (1 - w)."""
    case, weight = toy_case(), 0.25
    roles = case.roles(adapters=True)
    perturb(roles["student"], 0)
    perturb(roles["fake_score"], 1)
    student, fake = ({k: v.clone() for k, v in roles[name].state_dict().items()} for name in ("student", "fake_score"))
    before = {name: product(roles[name], "out") for name in ("student", "fake_score")}
    roles["fake_score"].blend(roles["student"], weight)
    moved = {name: 0.75 * value + 0.25 * student[name.replace(".fake_score.", ".student.")] for name, value in fake.items()}
    assert_equal(roles["fake_score"].state_dict(), moved)
    assert all(torch.equal(value, student[name]) for name, value in roles["student"].state_dict().items())
    # the average of products less the product of averages: w (1 - w) (B' - B)(A' - A)
    difference = {
        kind: student[f"out.lora_{kind}.student.weight"] - fake[f"out.lora_{kind}.fake_score.weight"] for kind in ("A", "B")
    }  # fmt: skip
    average = 0.75 * before["fake_score"] + 0.25 * before["student"]
    error = weight * (1 - weight) * difference["B"] @ difference["A"]
    torch.testing.assert_close(average - product(roles["fake_score"], "out"), error, rtol=1e-4, atol=1e-6)
    roles["fake_score"].blend(roles["student"], 1.0)
    torch.testing.assert_close(case.run(roles["fake_score"]), case.run(roles["student"]))


def test_a_fresh_adapter_blends_towards_the_students_product() -> None:
    """Adapters of one run start with one A, so a share of the student's B adds that share of its product."""
    roles = toy_case().roles(adapters=True)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in roles["student"].parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=generator)
    roles["fake_score"].blend(roles["student"], 0.03)
    assert product(roles["student"], "out").abs().max() > 1e-2
    torch.testing.assert_close(product(roles["fake_score"], "out"), 0.03 * product(roles["student"], "out"))


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_discriminator_trains_heads_on_the_teachers_own_network(case: Case, adapters: bool) -> None:
    roles = case.roles(adapters=adapters, specs=SPECS | {"discriminator": judge("auto")})
    network, teacher = roles["discriminator"].denoiser, roles["teacher"].denoiser
    assert network.backbone is teacher.backbone
    assert (network.adapter, network.heads is not None, teacher.heads) == (None, True, None)
    names = roles["discriminator"].parameters()
    assert names and all(name.startswith("heads.heads.") for name in names)
    assert all(parameter.requires_grad for parameter in names.values())
    perturb(roles["student"], 0)
    perturb(roles["discriminator"], 1)
    output = roles["discriminator"].module(case.x, case.t, case.cond, judge=True)
    assert torch.equal(output.prediction, case.run(roles["teacher"]))
    assert network.heads is not None and output.logits is not None
    assert output.logits.shape == (len(case.x), len(network.heads.taps))
    clear(roles)
    with roles.training(["discriminator"]):
        roles["discriminator"].module(case.x, case.t, case.cond, judge=True).logits.sum().backward()
    assert gradients(roles["discriminator"]).keys() == names.keys()
    trained = {id(parameter) for parameter in names.values()}
    for role in roles.values():
        assert all((parameter.grad is None) == (id(parameter) not in trained) for parameter in role.denoiser.parameters())


def test_experts_of_one_base_keep_their_adapters_apart() -> None:
    """`student` is a prefix of `student_2`."""
    case = toy_case()
    roles = case.roles(adapters=True, specs={"student": student(), "student_2": student(), "teacher": frozen()})
    teacher = case.run(roles["teacher"])
    perturb(roles["student"], 0)
    assert torch.equal(case.run(roles["student_2"]), teacher)
    assert not torch.allclose(case.run(roles["student"]), teacher, atol=1e-3)
    assert all(".student_2." in name for name in roles["student_2"].parameters())
    assert all(".student." in name for name in roles["student"].parameters())
    assert (roles["student"].spec.averaged, roles["teacher"].spec.averaged) == (True, False)


def test_what_a_role_has_beside_its_network_starts_from_the_runs_seed() -> None:
    case = toy_case()
    specs = {
        "student": RoleSpec(True, inputs=("second_time", "guidance"), log_variance=True),
        "fake_score": trainable(heads="auto"),
        "discriminator": judge("auto"),
        "teacher": frozen(),
    }

    def additions(seed: int) -> dict[str, Tensor]:
        roles = build_roles(specs, case.family, case.backbone(), defaults=Defaults(torch.tensor([0.5, 1.0]), 2.0), seed=seed)
        named = {f"{name}/{key}": value.detach() for name, role in roles.items() for key, value in role.parameters().items()}
        return {key: value for key, value in named.items() if key.split("/")[1].startswith(("inputs.", "log_variance.", "heads."))}

    one, same, other = additions(1), additions(1), additions(2)
    drawn = [key for key, value in one.items() if value.flatten().unique().numel() > 1]  # the rest start at zero or one
    assert {key.split(".")[0] for key in drawn} == {"student/inputs", "student/log_variance", "fake_score/heads", "discriminator/heads"}
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert all(not (one[key] == other[key]).any() for key in drawn)
    head = "heads.heads.0.tokens.1.weight"
    assert not (one[f"fake_score/{head}"] == one[f"discriminator/{head}"]).any()


def test_adapters_start_with_the_a_of_a_student_that_was_taken_over() -> None:
    """Of a run with another seed: without it the blend of factors is no average of products."""
    case = toy_case()
    specs = {"student": student(), "fake_score": trainable(), "teacher": frozen()}
    tuning = LoraTuning(rank=3, alpha=6.0, targets=case.family.lora_targets, seed=5)
    other, roles = case.roles(adapters=True, specs=specs), build_roles(specs, case.family, case.backbone(), tuning=tuning)
    for name, parameter in other["student"].parameters().items():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    roles["student"].load_state_dict(other["student"].state_dict())
    teacher = case.run(roles["teacher"])
    roles.align_adapters(["student"])
    assert torch.equal(case.run(roles["fake_score"]), teacher)
    roles["fake_score"].blend(roles["student"], 0.03)
    assert product(roles["student"], "out").abs().max() > 1e-2
    torch.testing.assert_close(product(roles["fake_score"], "out"), 0.03 * product(roles["student"], "out"))


def test_full_roles_have_no_adapters_to_align() -> None:
    roles = toy_case().roles(adapters=False)
    before = {name: value.clone() for name, value in roles["fake_score"].state_dict().items()}
    roles.align_adapters(["student"])
    roles.align_adapters([])
    assert_equal(roles["fake_score"].state_dict(), before)
