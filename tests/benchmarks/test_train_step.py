"""The passes that are recorded are those the methods' own code makes; made again they give the same numbers; arithmetic and memory by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fastgen_kernels.jvp_attention as kernel
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode
from toy_runs import normal, optimizer_block, toy_method, toy_setting, toy_trainer

from benchmarks import train_step
from benchmarks.measuring.case import LeftOut, Target
from benchmarks.random_sd3 import MEDIUM
from benchmarks.training import networks, trainers
from benchmarks.training.passes import Pass, arrange, grouped, recorded
from benchmarks.training.products import attention_flops, step_flops
from benchmarks.training.step import Part, forget, in_turn, measure_step, ratios
from fastgen.config import Recipe
from fastgen.denoiser import Output
from fastgen.distillers.dmd2 import DMD2
from fastgen.distillers.scm import SCM
from fastgen.families.toy import Toy
from fastgen.trainer import Trainer

BATCH = 4
REHEARSAL = Target("cpu", rehearsal=True)
TRAINED = "forward, backward to weights"


def trainer(method: type, **config: Any) -> Trainer:
    """Of a mixture with guidance, one step of which has been made; its networks are not the closed form any more."""
    family = Toy("toy:mixture")
    distiller = toy_method(method, toy_setting(family, guidance=2.0), **config)
    block = optimizer_block(lr=1e-3, name="sgd", clip=None)
    made = toy_trainer(distiller, family, prompts=("0", "1"), latents=normal(8, 2).float(), optimizers=block, batch_size=BATCH)
    with torch.no_grad():
        for role in made.roles.trained.values():
            for parameter in role.parameters().values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    made.train_step()
    return made


def counted(made: list[Pass]) -> dict[tuple[str, str, int], int]:
    return dict(Counter((one.network, one.kind, one.batch) for one in made))


def test_passes_of_dmd2() -> None:
    made, _ = recorded((run := trainer(DMD2, critic_updates=3)).train_step, run.roles, {})
    assert counted(made) == {
        ("student", "forward", BATCH): 3,  # a rollout for each critic update
        ("fake_score", TRAINED, BATCH): 3,
        ("student", TRAINED, BATCH): 1,
        ("teacher", "forward", 2 * BATCH): 1,  # guided: with and without prompt at once
        ("fake_score", "forward", BATCH): 1,
    }
    assert sorted(count for _, count in grouped(made)) == [1, 1, 1, 3, 3]


def test_passes_of_dmd2_with_a_discriminator() -> None:
    made, _ = recorded((run := trainer(DMD2, critic_updates=1, gan={})).train_step, run.roles, {})
    assert counted(made) == {
        ("student", "forward", BATCH): 2,  # critic and discriminator draw their own
        ("fake_score", TRAINED, BATCH): 1,
        ("discriminator", "forward, backward to heads", 2 * BATCH): 1,  # real and generated at once
        ("student", TRAINED, BATCH): 1,
        ("teacher", "forward", 2 * BATCH): 1,
        ("fake_score", "forward", BATCH): 1,
        ("discriminator", "forward, backward to input", BATCH): 1,
    }


@pytest.mark.parametrize(("mode", "differences"), [("exact", 0), ("semi_continuous", 1)])
def test_passes_of_scm(mode: str, differences: int) -> None:
    made, _ = recorded((run := trainer(SCM, tangent=mode)).train_step, run.roles, {})
    assert counted(made) == {
        ("teacher", "forward", 2 * BATCH): 1,
        ("student", TRAINED, BATCH): 1,
        ("student", "tangent", BATCH): 1,
        **({("student", "forward", BATCH): 1} if differences else {}),
    }
    (tangent,) = (one for one in made if one.tangents)
    assert len(tangent.tangents) == (1 if differences else 2)  # of x, and where the slope along t is exact, of t


@contextmanager
def originals(run: Trainer) -> Iterator[tuple[list[tuple[Tensor, Tensor | None]], dict[str, list[Tensor]]]]:
    """Every prediction with its tangent as the step has it, and the gradients that its optimizers see, which move nothing."""
    predictions: list[tuple[Tensor, Tensor | None]] = []
    gradients: dict[str, list[Tensor]] = {}

    def note(_module: Any, _inputs: Any, output: Output) -> None:
        value, tangent = forward_ad.unpack_dual(output.prediction)
        predictions.append((value.detach().clone(), None if tangent is None else tangent.clone()))

    def stop(name: str, optimizer: torch.optim.Optimizer) -> None:
        gradients[name] = [parameter.grad.clone() for parameter in run.parameters[name] if parameter.grad is not None]
        for group in optimizer.param_groups:
            group["lr"] = 0.0

    hooks = [role.module.register_forward_hook(note) for role in run.roles.values()]
    hooks += [optimizer.register_step_pre_hook(lambda one, *_, name=name: stop(name, one)) for name, optimizer in run.optimizers.items()]
    yield predictions, gradients
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("method", "config"), [(DMD2, {"critic_updates": 1}), (SCM, {"tangent": "exact"})])
def test_a_pass_made_again_gives_the_same_numbers(method: type, config: dict[str, Any]) -> None:
    run = trainer(method, **config)
    with originals(run) as (predictions, gradients):
        made, _ = recorded(run.train_step, run.roles, {})
    assert len(made) == len(predictions)
    for one, (value, tangent) in zip(made, predictions, strict=True):
        arrange(one, run.roles)
        outputs, _ = one.run()
        assert torch.equal(outputs[0], value)
        assert bool(one.tangents) == (tangent is not None)
        if tangent is not None:
            torch.testing.assert_close(outputs[1], tangent, rtol=1e-6, atol=1e-7)
        if one.gradients:
            own = [parameter.grad for parameter in run.parameters[one.network]]
            assert any(bool(gradient.any()) for gradient in gradients[one.network])
            for found, expected in zip(own, gradients[one.network], strict=True):
                assert found is not None
                assert torch.equal(found, expected)
    forget(run)
    assert all(parameter.requires_grad and parameter.grad is None for own in run.parameters.values() for parameter in own)


def test_a_gradient_that_goes_through_a_frozen_network_is_made_again() -> None:
    run = trainer(DMD2, critic_updates=1, gan={})
    made, _ = recorded(run.train_step, run.roles, {})
    (judged,) = (one for one in made if one.kind == "forward, backward to input")
    arrange(judged, run.roles)
    _, leaves = judged.run()
    (x,) = (leaves[i] for i in judged.moving)
    inputs = judged.leaves[0].clone().requires_grad_()
    logits = run.roles["discriminator"].module(inputs, *judged.leaves[1:2], {"component": judged.leaves[2]}, judge=True).logits
    (gradient,) = judged.gradients.values()
    (expected,) = torch.autograd.grad(logits, inputs, gradient)
    torch.testing.assert_close(x.grad, expected)
    assert all(parameter.grad is None for role in run.roles.trained.values() for parameter in role.parameters().values())


def heads(length: int) -> Tensor:
    return torch.randn(2, 3, length, 8, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(("moving", "factor"), [("", 4), ("q", 8), ("v", 6), ("qk", 10), ("qkv", 12)])
def test_flops_of_attention_are_those_that_pytorch_counts_of_the_reference(moving: str, factor: int) -> None:
    q, k, v = heads(10), heads(7), heads(7)
    tangents = [x if name in moving else None for name, x in (("q", q), ("k", k), ("v", v))]
    with FlopCounterMode(display=False) as counter:
        kernel.jvp_attention(q, k, v, *tangents)
    assert attention_flops(q, k, *tangents) == factor * 2 * 3 * 10 * 7 * 8
    means = (3 if "k" in moving else 2) * 2 * 2 * 3 * 7 * 8  # of keys and values, which are taken out before
    assert counter.get_total_flops() == attention_flops(q, k, *tangents) + means


def test_a_launch_that_pytorch_does_not_see_counts_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = heads(10), heads(7)
    step = lambda: kernel.jvp_attention(q @ q.transpose(-1, -2) @ q, k, k, q, k, k)[0]  # noqa: E731
    seen = step_flops(step)
    before = kernel.jvp_attention
    monkeypatch.setattr(kernel, "jvp_attention", lambda q, *_, **__: (torch.empty_like(q),) * 3)
    assert step_flops(step) == seen
    assert seen[1] == 12 * 2 * 3 * 10 * 7 * 8
    assert seen[0] == seen[1] + 2 * (2 * 2 * 3 * 10 * 10 * 8)
    monkeypatch.undo()
    assert kernel.jvp_attention is before


def test_ratio_by_hand() -> None:
    """Each round's step over each round's parts; the first round does not count."""
    script = iter([9.0, 9.0, 9.0, 10.0, 2.0, 1.0, 30.0, 6.0, 3.0])
    step, passes, optimizer = Part("step", {}, 1, lambda: 0), Part("passes", {}, 4, lambda: 0), Part("optimizers", {}, 1, lambda: 0)
    prepared: list[int] = []
    passes = Part("passes", {}, 4, lambda: 0, lambda: prepared.append(1))
    in_turn([step, passes, optimizer], REHEARSAL, seconds=0, timed=lambda *_: next(script))
    found = ratios(step, [passes, optimizer])
    assert (found["ratio"], found["ratio_all"]) == pytest.approx((10 / 8, 10 / 9))
    assert (found["passes_ms"], found["optimizers_ms"], found["averages_ms"]) == (16.0, 2.0, 0.0)
    assert len(prepared) == 3


def test_a_measured_step_leaves_training_as_it_was() -> None:
    run = trainer(DMD2, critic_updates=2)
    number = run.step
    row = measure_step(run, {}, REHEARSAL, seconds=0)
    assert json.loads(json.dumps(row)) == row
    assert row["step"] == number
    assert row["finite"] and set(row["metrics"]) == {"loss/critic", "loss/match", "grad_norm/student", "grad_norm/fake_score"}
    assert [(part["network"], part["kind"], part["count"]) for part in row["rest"]] == [
        ("fake_score", "optimizer", 2), ("student", "optimizer", 1), ("student", "average", 1),
    ]  # fmt: skip
    assert row["samples_per_s"] == pytest.approx(1e3 * BATCH / row["median_ms"])
    run.train_step()


def tried(needs: dict[str, int], free: int, measure: Callable[[str], Any] = lambda tuning: {}) -> str:
    return train_step.first_that_fits(needs, free, measure)["tuning"]


def test_the_tuning_that_fits() -> None:
    needs = {"full": 85, "lora": 10}
    assert tried(needs, 100) == "full"
    assert tried(needs, 99) == "lora"
    with pytest.raises(LeftOut, match=r"full: .* GB of networks, of .* free; lora: "):
        tried(needs, 11)


def test_lora_where_activations_do_not_fit() -> None:
    def measure(tuning: str) -> dict[str, Any]:
        if tuning == "full":
            raise torch.OutOfMemoryError("no")
        return {}

    row = train_step.first_that_fits({"full": 8 * 10**9, "lora": 10**9}, 10**10, measure)
    assert row == {"tuning": "lora", "refused": ["full: 8.0 GB of networks fit, activations do not, of 10.0 GB free"]}


@pytest.mark.parametrize(("recipe", "on_h100"), [("sd35_medium_dmd2_4step_lora", "lora"), ("sd35_medium_scm_2step", "full")])
def test_what_fits_of_sd35_medium(recipe: str, on_h100: str) -> None:
    """2.24 B parameters: 35 B each for dmd2, 22.8 for scm, and with LoRA 4 for the shared network and little more."""
    network = networks.sd3("sd35_medium", MEDIUM.transformer)
    plans = {name: trainers.planned_for(network, Recipe.load(recipe, ["train.device=cpu", change])) for name, change in train_step.TUNINGS.items()}
    needs = {name: trainers.planned_bytes(planned) for name, planned in plans.items()}
    assert tried(needs, 79 * 10**9) == on_h100
    assert tried(needs, 139 * 10**9) == "full"
    assert needs["lora"] < 6 * 2.25e9
    assert plans["lora"].family.latent.shape == (16, 128, 128)


def test_flux_at_1024_pixels_has_4096_tokens_and_its_own_guidance() -> None:
    family = networks.flux("blocks", networks.FLUX_BLOCKS).family()
    assert (family.latent.shape, family.options["embedded_guidance"], family.options["max_sequence_length"]) == ((16, 128, 128), 3.5, 512)


def test_rehearsal_of_real_sizes() -> None:
    (case,) = train_step.real_sizes(REHEARSAL)
    (row,) = case.measure()
    assert json.loads(json.dumps(row)) == row
    assert (row["network"], row["method"], row["tuning"], row["precision"]) == ("flux_tiny", "rcm", "lora", "bf16")
    assert row["finite"] and row["ratio"] > 0 and row["attention_tangent_flops"] > 0
    kinds = {name: {part["kind"] for part in row["passes"] if part["network"] == name} for name in ("student", "fake_score", "teacher")}
    assert kinds == {"student": {"forward", TRAINED, "tangent"}, "fake_score": {"forward", TRAINED}, "teacher": {"forward"}}
    assert row["passes"][0]["batch"] == 1
