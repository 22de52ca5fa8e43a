"""Experts copied and removed, beside the layer as it was; pruned networks, beside experts with none active; utilities by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers_zoo
import pytest
import torch
from moe_networks import SPLIT, Around, blocks, experts, largest, split, stir
from tangents import normal
from torch import Tensor

from fastgen.errors import UserError
from fastgen.surgery import moe
from fastgen.surgery.moe.accounting import account, total
from fastgen.surgery.moe.operators import _copies
from fastgen.surgery.moe.split import Choice


def even(layers: list[moe.ExpertLayer]) -> dict[str, Tensor]:
    return {layer.name: torch.ones(layer.num_experts) for layer in layers}


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("choice", ["token", "expert"])
@torch.no_grad()
def test_as_many_copies_of_each_and_as_many_times_more_active_is_what_was(name: str, choice: Choice) -> None:
    denoiser, layers = split(name, 2, choice)
    stir(layers)
    expected = denoiser.call(denoiser.x, denoiser.t)
    moe.upcycle(denoiser.network, even(layers), factor=2, noise=0)
    assert all(layer.num_experts == 8 and len(layer.w1) == 8 and layer.router.out_features == 8 for layer in layers)
    assert largest(denoiser.call(denoiser.x, denoiser.t), expected) > 1e-6  # with as many active it is another network
    moe.set_active(denoiser.network, 4)
    assert largest(denoiser.call(denoiser.x, denoiser.t), expected) <= 1e-12
    moe.upcycle(denoiser.network, even(layers), factor=3, noise=0)
    moe.set_active(denoiser.network, 12)
    assert largest(denoiser.call(denoiser.x, denoiser.t), expected) <= 1e-12


def test_the_most_useful_are_copied_most() -> None:
    assert _copies([8.0, 1.0, 3.0, 5.0], 4, 3) == [0, 3, 0, 2]  # 8, 5, 4, 3; then the first has its three, and 8/3 would not have won
    assert _copies([100.0, 1.0, 3.0, 5.0], 4, 3) == [0, 0, 3, 2]
    assert _copies([1.0, 1.0, 1.0], 3, 3) == [0, 1, 2]
    assert _copies([0.0, 0.0], 4, 3) == [0, 0, 1, 1]
    assert _copies([1.0, 2.0], 0, 3) == []


@torch.no_grad()
def test_copies_are_their_originals_but_for_noise_in_the_choice() -> None:
    denoiser, layers = split("sd3", 2)
    stir(layers)
    before = copy.deepcopy(layers[0])
    utilities = {layer.name: torch.tensor([1.0, 9.0, 4.0, 0.5]) for layer in layers}
    moe.upcycle(denoiser.network, utilities, factor=2, noise=1e-3, seed=3)
    layer, whose = layers[0], [0, 1, 2, 3, 1, 1, 2, 2]
    for name in ("w1", "b1", "w2"):
        assert torch.equal(getattr(layer, name), getattr(before, name)[whose])
    assert torch.equal(layer.router.weight, before.router.weight[whose])
    assert not layer.selection_bias[:4].any()
    assert (layer.selection_bias[4:].abs() <= 1e-3).all() and layer.selection_bias[4:].unique().numel() == 4
    assert not torch.equal(layer.selection_bias, layers[1].selection_bias)
    again, others = split("sd3", 2)
    moe.upcycle(again.network, utilities, factor=2, seed=3)
    assert torch.equal(others[0].selection_bias, layer.selection_bias)


def test_a_factor_that_cannot_be_is_refused() -> None:
    denoiser, layers = split("sd3", 2)
    for factor in (0, 4):
        with pytest.raises(ValueError, match=rf"^factor: {factor} times as many experts, at most 3 of each; allowed: 1 to 3"):
            moe.upcycle(denoiser.network, even(layers), factor=factor)
    assert layers[0].num_experts == 4


def losses(denoiser: diffusers_zoo.Denoiser) -> list[Callable[[], Tensor]]:
    def loss(i: int) -> Tensor:
        out = denoiser.call(denoiser.x + i, denoiser.t)
        return (out * normal(*out.shape, seed=i).to(out)).sum()

    return [lambda i=i: loss(i) for i in range(3)]


@pytest.mark.parametrize("frozen", [False, True])
def test_utility_is_the_square_of_the_mean_gradient(frozen: bool) -> None:
    denoiser, layers = split("sd3", 2)
    stir(layers)
    denoiser.network.requires_grad_(not frozen)
    found = moe.gradient_utility(denoiser.network, losses(denoiser))
    assert all(p.grad is None and p.requires_grad != frozen for p in denoiser.network.parameters())
    denoiser.network.requires_grad_(True)
    torch.stack([loss() for loss in losses(denoiser)]).mean().backward()
    for layer in layers:
        grads: list[Any] = [p.grad for p in (layer.w1, layer.b1, layer.w2) if p is not None]
        by_hand = torch.tensor([sum(float(grad[e].square().sum()) for grad in grads) for e in range(4)])
        assert largest(found[layer.name] / by_hand, torch.ones(4)) <= 1e-6 and by_hand.all()
    with pytest.raises(ValueError, match=r"^batches: none"):
        moe.gradient_utility(denoiser.network, [])


def test_utility_of_weights_is_their_norm_and_of_idle_experts_zero() -> None:
    denoiser, layers = split("zimage", 0)  # no biases
    found = moe.weight_utility(denoiser.network)
    for layer in layers:
        each = [torch.cat([layer.w1[e].flatten(), layer.w2[e].flatten()]).norm() for e in range(4)]
        assert layer.b1 is None and largest(found[layer.name], torch.stack(each)) <= 1e-12
    denoiser.network.requires_grad_(True)
    assert not any(value.any() for value in moe.gradient_utility(denoiser.network, losses(denoiser)).values())


@pytest.mark.parametrize("name", ["sd3", "flux", "zimage"])
@torch.no_grad()
def test_removing_experts_that_nobody_chooses_changes_nothing(name: str) -> None:
    denoiser, layers = split(name, 2)
    stir(layers)
    for layer in layers:
        layer.selection_bias[1] = -10
    with moe.recording(denoiser.network) as routings:
        expected = denoiser.call(denoiser.x, denoiser.t)
    assert all(routing.counts[1] == 0 and routing.probabilities[:, 1].max() > 0.1 for routing in routings)
    chosen = {layer: torch.tensor([max(float(n), 1e6 * (e != 1)) for e, n in enumerate(each)]) for layer, each in moe.counts(routings).items()}
    removed = moe.remove(denoiser.network, chosen)
    assert removed == {layer.name: [1] for layer in layers}
    assert all(layer.num_experts == 3 and len(layer.w1) == 3 and layer.router.out_features == 4 for layer in layers)
    with moe.recording(denoiser.network) as routings:
        assert largest(denoiser.call(denoiser.x, denoiser.t), expected) <= 1e-12
    assert all(largest(routing.probabilities.sum(1), torch.ones(1)) <= 1e-6 for routing in routings)  # load can be balanced among those left
    moe.upcycle(denoiser.network, even(layers), factor=2)
    assert all(layer.num_experts == 6 and layer.router.out_features == 7 for layer in layers)
    assert denoiser.call(denoiser.x, denoiser.t).isfinite().all()


def test_removal_goes_by_load_and_leaves_as_many_as_are_active() -> None:
    denoiser, layers = split("sd3", 2)
    given = {layer.name: torch.tensor([60.0, 35.0, 4.0, 1.0]) for layer in layers}
    assert moe.remove(copy.deepcopy(denoiser.network), given, 0.05) == {layer.name: [3] for layer in layers}  # 1 % is less than 5 % of 25 %
    assert moe.remove(copy.deepcopy(denoiser.network), given, 0.03) == {}
    assert moe.remove(denoiser.network, {name: torch.tensor([100.0, 0, 0, 0]) for name in given}, 1) == {layer.name: [2, 3] for layer in layers}
    for counts, below, message in ((given, 0, "below: 0; allowed"), ({}, 0.1, f"counts: none of {layers[0].name}")):
        with pytest.raises(ValueError, match=f"^{message}"):
            moe.remove(denoiser.network, counts, below)


def test_a_changed_network_is_built_again_from_its_weights() -> None:
    first, layers = split("flux", 1)
    stir(layers)
    moe.remove(first.network, {layer.name: torch.tensor([0.0, 2, 1, 1]) for layer in layers[:1]} | even(layers[1:]))
    moe.upcycle(first.network, even(layers), factor=2)
    state = first.network.state_dict()
    again, others = split("flux", 1)
    moe.resize(again.network, state)
    again.network.load_state_dict(state)
    assert [layer.num_experts for layer in others] == [6, 8, 8]
    assert torch.equal(again.call(again.x, again.t), first.call(first.x, first.t))


def test_what_was_frozen_stays_frozen_and_gradients_flow() -> None:
    for frozen in (True, False):
        denoiser, layers = split("sd3", 1)
        denoiser.network.requires_grad_(not frozen)
        moe.remove(denoiser.network, {layer.name: torch.tensor([0.0, 2, 1, 1]) for layer in layers})
        moe.upcycle(denoiser.network, even(layers))
        assert all(p.requires_grad != frozen for p in denoiser.network.parameters())
    denoiser.call(denoiser.x, denoiser.t).square().sum().backward()
    assert all(layer.router.weight.grad is not None and layer.w1.grad is not None and len(layer.w1.grad) == 6 for layer in layers)


def pruned(name: str, active: float) -> tuple[diffusers_zoo.Denoiser, list[str]]:
    denoiser = diffusers_zoo.build(name, torch.float64)
    inside, how = blocks(name, denoiser.network), experts(name, active)
    return denoiser, moe.prune(denoiser.network, inside, how, moe.magnitude(moe.to_convert(denoiser.network, inside, how)))


@pytest.mark.parametrize("name", SPLIT)
@torch.no_grad()
def test_a_pruned_network_is_one_with_a_shared_expert_of_that_size_alone(name: str) -> None:
    denoiser, names = pruned(name, 2)
    other = diffusers_zoo.build(name, torch.float64)
    dense = other.call(other.x, other.t)
    inside = blocks(name, other.network)
    how = moe.Experts(2, 3.0, 1.0) if name == "zimage" else moe.Experts(2, 1.5, 0.25)  # as wide as the shared one and two more were
    importance = moe.magnitude(moe.to_convert(other.network, inside, how))
    layers = moe.convert(other.network, inside, how, importance)
    moe.set_active(other.network, 0)
    assert [layer.name for layer in layers] == names
    assert torch.equal(denoiser.call(denoiser.x, denoiser.t), other.call(other.x, other.t))
    assert largest(denoiser.call(denoiser.x, denoiser.t), dense) > 1e-4


@pytest.mark.parametrize("name", ["sd3", "flux", "zimage"])
def test_a_pruned_network_costs_what_is_active_of_one_with_experts(name: str) -> None:
    denoiser, _ = pruned(name, 2)
    other, _ = split(name, 2)
    costs = [account(d.network, blocks(name, d.network), lambda d=d: d.call(d.x, d.t)) for d in (denoiser, other)]
    for kind in ("feed-forward", "attention", "modulation", "attention products", "outside blocks"):
        assert costs[0][kind].active == pytest.approx(costs[1][kind].active) and costs[0][kind].flops == pytest.approx(costs[1][kind].flops), kind
    assert total(costs[0]).parameters == total(costs[0]).active < total(costs[1]).parameters


def test_the_neurons_that_stay_are_the_most_important() -> None:
    from diffusers.models.attention import FeedForward

    network = Around(FeedForward(8, mult=4, activation_fn="gelu")).double()
    ff: Any = network.block["ff"]
    importance = normal(32, seed=1)
    up, down, x = ff.net[0].proj, ff.net[2], normal(3, 8)
    best = importance.topk(12).indices
    expected = torch.nn.functional.gelu(x @ up.weight[best].T + up.bias[best]) @ down.weight[:, best].T + down.bias
    assert moe.prune(network, [network.block], moe.Experts(), {"block.ff": importance}) == ["block.ff"]
    assert largest(network(x), expected) <= 1e-13


def test_pruning_refuses_what_converting_does() -> None:
    network = diffusers_zoo.build("sana").network
    with pytest.raises(UserError, match=r"^recipe key student\.moe: transformer_blocks\.0\.ff \(GLUMBConv\) convolves over space"):
        moe.prune(network, [network], moe.Experts(), {})
