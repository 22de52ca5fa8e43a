"""Whole networks with experts: with all of them active they are the dense networks; exact tangents are finite differences; refusals."""

from __future__ import annotations

import diffusers_zoo
import pytest
import torch
from moe_networks import SPLIT, blocks, experts, largest, split, stir
from tangents import F64, math_tangent, normal, relative
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.jvp import check_tangent, tangent
from fastgen.surgery import moe
from fastgen.surgery.held import Storage, hold
from fastgen.surgery.lora import add_adapter
from fastgen.surgery.moe.split import Choice
from fastgen.surgery.recompute import recompute_blocks


@pytest.mark.parametrize("name", SPLIT)
@torch.no_grad()
def test_with_all_experts_and_a_router_of_zeros_it_is_the_dense_network(name: str) -> None:
    dense = diffusers_zoo.build(name, torch.float64)
    expected = dense.call(dense.x, dense.t)
    denoiser, layers = split(name)
    assert largest(denoiser.call(denoiser.x, denoiser.t), expected) <= 1e-12
    assert sum(p.numel() for p in denoiser.network.parameters()) - sum(layer.router.weight.numel() for layer in layers) == sum(
        p.numel() for p in dense.network.parameters()
    )
    moe.set_active(denoiser.network, 3)  # and the experts are not there for nothing
    assert largest(denoiser.call(denoiser.x, denoiser.t), expected) > 1e-4


@pytest.mark.parametrize("name", SPLIT)
@torch.no_grad()
def test_experts_that_take_every_token_are_the_dense_mixture(name: str) -> None:
    by_token, layers = split(name)
    by_expert, others = split(name, choice="expert")
    stir(layers)
    stir(others)
    expected = by_token.call(by_token.x, by_token.t)
    assert largest(by_expert.call(by_expert.x, by_expert.t), expected) <= 1e-12
    moe.set_active(by_expert.network, 1.5)
    assert largest(by_expert.call(by_expert.x, by_expert.t), expected) > 1e-4


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("choice", ["token", "expert"])
@pytest.mark.parametrize("name", ["sd3", "flux", "flux2klein", "ovis", "prx"])
@pytest.mark.parametrize("grad", [False, True])
def test_exact_tangents_are_finite_differences(name: str, choice: Choice, grad: bool) -> None:
    (network, call, x, t), layers = split(name, 2, choice)
    stir(layers)
    network.requires_grad_(grad)
    dx, dt = normal(*x.shape, seed=1), torch.tensor([0.9, -0.7], dtype=F64) * t.max()
    with torch.no_grad():
        h = 1e-7
        expected = (call(x + h * dx, t + h * dt) - call(x - h * dx, t - h * dt)) / (2 * h)
    with torch.set_grad_enabled(grad):
        out, d_out = tangent(call, (x, t), (dx, dt))
    assert relative(d_out, expected) < 1e-6
    if grad:
        out.square().sum().backward()
        assert all(layer.w1.grad is not None and layer.router.weight.grad is not None for layer in layers)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("choice", ["token", "expert"])
@torch.no_grad()
def test_differences_of_held_choices_do_not_jump(choice: Choice) -> None:
    """Steps at which tokens change their experts, but for which the network bends little."""
    (network, call, x, t), layers = split("sd3", 2, choice)
    stir(layers)
    dx = normal(*x.shape, seed=1)
    found, h = tangent(lambda x: call(x, t), (x,), (dx,))[1], 0.05

    def step(sign: int) -> Tensor:
        return call(x + sign * h * dx, t)

    loose = (step(1) - step(-1)) / (2 * h)
    with moe.holding(network) as held:
        here = call(x, t)
        for sign in (1, -1):
            held.restart()
            found = found - sign * step(sign) / (2 * h)
        held.restart()
        assert torch.equal(call(x, t), here)
    off = relative(tangent(lambda x: call(x, t), (x,), (dx,))[1], loose)
    assert found.norm() < 0.005 * loose.norm() and off > 0.015
    assert all(layer.held is None for layer in layers)


@pytest.mark.parametrize("name", SPLIT)
def test_exact_tangents_are_those_of_forward_ad_through_unfused_attention(name: str) -> None:
    (_, call, x, t), layers = split(name, 2)
    stir(layers)
    both = (normal(*x.shape, seed=1), torch.tensor([0.9, -0.7], dtype=F64) * t.max())
    with torch.no_grad():
        d_out = tangent(call, (x, t), both)[1]
    assert relative(d_out, math_tangent(call, (x, t), both)[1]) < 1e-10


def test_the_check_before_training_passes_with_experts() -> None:
    denoiser, layers = split("sd3", 2, dtype=torch.float32)
    stir(layers)
    check = check_tangent(denoiser.call, (denoiser.x, denoiser.t), (torch.ones_like(denoiser.x), torch.ones_like(denoiser.t)))
    assert check.relative_error < 0.01


@pytest.mark.parametrize("choice", ["token", "expert"])
@pytest.mark.parametrize("name", ["sd3", "flux", "flux2klein", "prx"])
def test_blocks_that_are_computed_again_choose_as_before(name: str, choice: Choice) -> None:
    grads, passes = [], []
    for again in (False, True):
        (network, call, x, t), layers = split(name, 2, choice)
        stir(layers)
        network.requires_grad_(True)
        passes.append([])
        layers[0].router.register_forward_hook(lambda *_: passes[-1].append(1))
        if again:
            recompute_blocks(network)
        with moe.recording(network) as routings:
            loss = call(x, t).square().mean() + moe.balance_loss(routings)
            moe.set_active(network, 1)  # as another pass may do before this one's gradient
            loss.backward()
            assert len(routings) == len(layers)
        grads.append([p.grad for p in network.parameters() if p.grad is not None])
    assert [len(each) for each in passes] == [1, 2]
    assert len(grads[0]) == len(grads[1]) and all(largest(a, b) <= 1e-14 for a, b in zip(*grads, strict=True))


def refused(name: str, how: moe.Experts, leave: tuple[str, ...] = ()) -> str:
    network = diffusers_zoo.build(name).network
    with pytest.raises(UserError, match=r"^recipe key student\.moe") as error:
        moe.to_convert(network, [network], how, leave)
    return str(error.value)


def test_what_cannot_be_split_is_named() -> None:
    assert "transformer_blocks.0.ff (GLUMBConv) convolves over space" in refused("sana", moe.Experts())
    assert "noise_refiner.0.feed_forward has 85 hidden neurons, which 1.0 + 12 x 0.25 does not divide" in refused("zimage", moe.Experts(), ("mlp",))
    assert "student.moe.active: 13 of 12 experts (transformer_blocks.0.ff); allowed: 0 to 12" in refused("flux", moe.Experts(active=13))
    assert "student.moe.active: 1.5 of 12 experts" in refused("flux", moe.Experts(active=1.5))
    assert "0 experts of 0.25 beside a shared one of 1.0 (transformer_blocks.0.ff)" in refused("sd3", moe.Experts(0))
    assert "has no feed-forward layer in its blocks" in refused("sana", moe.Experts(), ("ff",))


@pytest.mark.parametrize(
    ("name", "leave"),
    [
        ("flux", ("proj_mlp", "ff_context")),
        ("flux2klein", ("to_qkv_mlp_proj", "ff_context")),
        ("flux2klein", ("single_transformer_blocks.0", "ff_context")),
        ("ovis", ("proj_out", "ff_context")),
        ("prx", ("blocks.1.up_proj",)),
    ],
)
@torch.no_grad()
def test_layers_in_blocks_are_left_by_the_block_or_by_a_layer(name: str, leave: tuple[str, ...]) -> None:
    denoiser = diffusers_zoo.build(name, torch.float64)
    before = {key: value.shape for key, value in denoiser.network.state_dict().items()}
    expected = denoiser.call(denoiser.x, denoiser.t)
    inside = blocks(name, denoiser.network)
    layers = moe.to_convert(denoiser.network, inside, experts(name, 4), leave)
    assert [layer.name for layer in layers] == ["blocks.0" if name == "prx" else "transformer_blocks.0.ff"]
    moe.convert(denoiser.network, inside, experts(name, 4), moe.magnitude(layers), leave)
    assert largest(denoiser.call(denoiser.x, denoiser.t), expected) <= 1e-12
    kept = {key: value.shape for key, value in denoiser.network.state_dict().items()}
    assert all(kept[key] == shape for key, shape in before.items() if not key.startswith(f"{layers[0].name}."))


@torch.no_grad()
def test_what_is_left_dense_is_left() -> None:
    denoiser = diffusers_zoo.build("flux2klein", torch.float64)
    expected = denoiser.call(denoiser.x, denoiser.t)
    leave = ("attn.to_qkv_mlp_proj", "transformer_blocks.0.ff_context")
    layers = moe.to_convert(denoiser.network, [denoiser.network], experts("flux2klein", 4), leave)
    assert [layer.name for layer in layers] == ["transformer_blocks.0.ff"]
    moe.convert(denoiser.network, [denoiser.network], experts("flux2klein", 4), moe.magnitude(layers), leave)
    assert largest(denoiser.call(denoiser.x, denoiser.t), expected) <= 1e-12


def test_a_network_is_split_once() -> None:
    denoiser, layers = split("flux")
    with pytest.raises(UserError, match=f"^recipe key student.moe: {layers[0].name} of FluxTransformer2DModel is split into experts already"):
        moe.to_convert(denoiser.network, [denoiser.network], experts("flux", 2))


def test_weights_that_are_not_plain_are_refused() -> None:
    fused = diffusers_zoo.build("flux2klein").network
    add_adapter(fused, "student", rank=2, alpha=2, targets=["to_qkv_mlp_proj"])
    with pytest.raises(UserError, match=r"single_transformer_blocks\.0\.attn holds a Linear; merge adapters"):
        moe.to_convert(fused, [fused], experts("flux2klein", 2))
    held, adapted = diffusers_zoo.build("sd3").network, diffusers_zoo.build("sd3").network
    hold(held, [held], Storage("bf16"))
    add_adapter(adapted, "student", rank=2, alpha=2, targets=["ff.net.2"])
    for network in (held, adapted):
        with pytest.raises(UserError, match=r"transformer_blocks\.0\.ff holds a \w*Linear; merge adapters"):
            moe.to_convert(network, [network], experts("sd3", 2))


@pytest.mark.parametrize(
    ("name", "targets", "adapted"),
    [
        ("flux2klein", ("to_q", "to_qkv_mlp_proj"), "single_transformer_blocks.0.attn.to_qkv_mlp_proj.attention"),
        ("flux", ("to_q", "proj_out", "proj_mlp"), "single_transformer_blocks.0.proj_out.attention"),
        ("ovis", ("proj_out", "proj_mlp"), "single_transformer_blocks.0.proj_out.attention"),
        ("prx", ("img_qkv_proj", "up_proj"), "blocks.0.attention.img_qkv_proj"),
    ],
)
def test_adapters_of_split_layers_are_of_what_is_attentions(name: str, targets: tuple[str, ...], adapted: str) -> None:
    (network, call, x, t), layers = split(name, 2)
    stir(layers)
    with torch.no_grad():
        before = call(x, t)
    add_adapter(network, "student", rank=2, alpha=2, targets=targets)
    factors = {key.split(".lora_")[0] for key, _ in network.named_parameters() if ".lora_" in key}
    assert adapted in factors and all(isinstance(network.get_submodule(key).base_layer, nn.Linear) for key in factors)
    assert not any(key.endswith(("proj_mlp", "up_proj", "to_qkv_mlp_proj")) for key in factors)
    out = call(x, t)
    assert largest(out, before) == 0
    out.square().mean().backward()
    gradient = network.get_submodule(adapted).lora_B["student"].weight.grad  # type: ignore[index, union-attr]
    assert isinstance(gradient, Tensor) and gradient.any()


def test_a_converted_network_is_built_again_from_its_weights() -> None:
    first, layers = split("flux", 2)
    stir(layers)
    again = diffusers_zoo.build("flux", torch.float64)
    inside = blocks("flux", again.network)
    moe.convert(again.network, inside, experts("flux", 2), moe.magnitude(moe.to_convert(again.network, inside, experts("flux", 2))))
    assert largest(again.call(again.x, again.t), first.call(first.x, first.t)) > 1e-4
    again.network.load_state_dict(first.network.state_dict())
    assert torch.equal(again.call(again.x, again.t), first.call(first.x, first.t))


def test_what_was_frozen_stays_frozen() -> None:
    for frozen in (True, False):
        network = diffusers_zoo.build("sd3").network.requires_grad_(not frozen)
        layers = moe.to_convert(network, [network], experts("sd3", 2))
        moe.convert(network, [network], experts("sd3", 2), moe.magnitude(layers))
        assert all(p.requires_grad != frozen for p in network.parameters())


def test_routers_compute_in_fp32_under_autocast() -> None:
    denoiser, layers = split("sd3", 2, dtype=torch.float32)
    stir(layers)
    logits = []
    for layer in layers:
        layer.router.register_forward_hook(lambda _module, _inputs, out: logits.append(out.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        denoiser.call(denoiser.x, denoiser.t)
    assert logits == [torch.float32] * len(layers)
    assert isinstance(layers[0].shared.up, nn.Linear)
