"""Mixture of Blocks: dense with all blocks kept, a network without the others with fewer, sample by sample; gradients, tangents, refusals."""

from __future__ import annotations

import copy
from typing import Any

import diffusers_zoo
import pytest
import torch
from moe_networks import DEEP, deep, grouped, largest
from tangents import F64, math_tangent, normal, relative
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.errors import UserError
from fastgen.jvp import tangent
from fastgen.surgery import moe
from fastgen.surgery.lora import add_adapter
from fastgen.surgery.moe.blocks import grouped_blocks
from fastgen.surgery.moe.streams import seen, streams_of
from fastgen.surgery.offload import offload
from fastgen.surgery.recompute import recompute_blocks


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("grad", [False, True])
def test_with_all_blocks_kept_it_is_the_dense_network_to_the_bit(name: str, grad: bool) -> None:
    dense, _ = deep(name)
    denoiser, routers = grouped(name, 2)
    dense.network.requires_grad_(grad)
    denoiser.network.requires_grad_(grad)
    assert torch.equal(denoiser.call(denoiser.x, denoiser.t), dense.call(dense.x, dense.t))
    moe.set_kept(denoiser.network, 1)
    assert largest(denoiser.call(denoiser.x, denoiser.t), dense.call(dense.x, dense.t)) > 1e-4
    added = sum(p.numel() for router in routers for p in router.parameters())
    assert sum(p.numel() for p in denoiser.network.parameters()) == sum(p.numel() for p in dense.network.parameters()) + added


@pytest.mark.parametrize("name", ["sd3", "flux", "dit"])
def test_centred_routers_see_what_tells_samples_apart(name: str) -> None:
    denoiser, routers = grouped(name, 1)
    before = [[p.detach().clone() for p in router.parameters()] for router in routers]
    inputs: dict[str, list[Any]] = {router.name: [] for router in routers}
    moved = [denoiser.x + i for i in range(3)]
    for router in routers:
        router.register_forward_hook(lambda _router, given, _out, name=router.name: inputs[name].append(given))
    moe.centre(denoiser.network, [lambda x=x: denoiser.call(x, denoiser.t) for x in moved])
    assert all(router.kept == 1 for router in routers)
    for router, old in zip(routers, before, strict=True):
        for layer, was, given in zip((router.tokens, router.modulation), old, zip(*inputs[router.name], strict=True), strict=True):
            mean = torch.cat(given).mean(0)
            assert largest(layer.weight @ mean, torch.zeros(1)) <= 1e-10 < float((was @ mean).abs().max())
            across = torch.linalg.qr(torch.stack([mean, *torch.eye(len(mean), dtype=F64)[1:]]).T)[0][:, 1:]
            assert largest(layer.weight @ across, was @ across) <= 1e-10  # nothing else is gone
    moe.set_kept(denoiser.network, 2)
    dense, _ = deep(name)
    assert torch.equal(denoiser.call(denoiser.x, denoiser.t), dense.call(dense.x, dense.t))
    with pytest.raises(ValueError, match=r"^passes: none through "):
        moe.centre(denoiser.network, [])


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("grad", [False, True])
def test_under_autocast_too(name: str, grad: bool) -> None:
    dense, _ = deep(name, torch.float32)
    denoiser, _ = grouped(name, 2, dtype=torch.float32)
    dense.network.requires_grad_(grad)
    denoiser.network.requires_grad_(grad)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = denoiser.call(denoiser.x, denoiser.t), dense.call(dense.x, dense.t)
    assert out.dtype == expected.dtype and torch.equal(out, expected)


class Skipped(nn.Module):
    """What stands where a sample skips a block, on a dense network: the block's arguments, found by hand."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1 = (
            block.norm1 if isinstance(block, nn.Module) and "norm1" in dict(block.named_children()) else nn.Identity()
        )  # DiT's last layer asks
        self.context_pre_only = False

    def forward(self, *args: Any, **given: Any) -> Any:
        text = given.get("encoder_hidden_states")
        if "joint_attention_kwargs" in given and text is not None:
            return text, given["hidden_states"]
        return args[0] if args else given["hidden_states"]


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("kept", [1, 2])
@torch.no_grad()
def test_each_sample_is_that_of_a_dense_network_without_the_blocks_it_skips(name: str, kept: int) -> None:
    size = 2 if name in ("zimage", "flux2klein") else 3
    denoiser, _ = grouped(name, kept, size) if kept < size else grouped(name, 1, size)
    with moe.recording_blocks(denoiser.network) as routings:
        out = denoiser.call(denoiser.x, denoiser.t)
    names = {id(module): name for name, module in denoiser.network.named_modules()}
    members = [names[id(block)] for block, _ in grouped_blocks(denoiser.network)]
    for b in range(2):
        dense, _ = deep(name)
        for i, routing in enumerate(routings):
            best = routing.probabilities[b].topk(min(kept, size - 1)).indices.tolist()
            for j, member in enumerate(members[i * size : (i + 1) * size]):
                if j not in best:
                    dense.network.set_submodule(member, Skipped(dense.network.get_submodule(member)))
        assert torch.equal(dense.call(dense.x, dense.t)[b], out[b])


@pytest.mark.parametrize("name", DEEP)
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_neighbours(name: str) -> None:
    denoiser, _ = grouped(name, 1)
    choices, outs = [], []
    for seed in range(6):
        x, t = denoiser.x.clone(), denoiser.t.clone()
        x[1], t[1] = 3 * normal(*x.shape[1:], seed=seed) + 10 * (seed - 3), denoiser.t[1] * (seed + 1) / 6
        with moe.recording_blocks(denoiser.network) as routings:
            outs.append(denoiser.call(x, t)[0])
        choices.append([routing.probabilities.argmax(1).tolist() for routing in routings])
    assert all(largest(out, outs[0]) <= 1e-12 for out in outs)
    assert all([c[0] for c in choice] == [c[0] for c in choices[0]] for choice in choices)
    assert any(group[0] != group[1] for choice in choices for group in choice)  # the neighbour goes another way


def runs(network: nn.Module) -> list[str]:
    """Names of grouped blocks, in a list that grows as their attention runs."""
    found: list[str] = []
    for block, _ in grouped_blocks(network):
        inner: Any = next(m for name, m in block.named_children() if name.startswith("att"))
        inner.register_forward_hook(lambda *_, block=block: found.append(names[id(block)]))
    names = {id(module): name for name, module in network.named_modules()}
    return found


def test_what_no_sample_keeps_does_not_run() -> None:
    denoiser, routers = grouped("flux", 1, random=False)  # routers of zero take the first of equals
    seen_running = runs(denoiser.network)
    denoiser.call(denoiser.x, denoiser.t)
    assert seen_running == [f"{kind}transformer_blocks.{i}" for kind in ("", "single_") for i in (0, 2)]
    assert all(router.choice is None for router in routers)  # nothing stays behind


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])
def test_a_router_has_the_gradient_of_a_soft_mixture(name: str) -> None:
    """dL/dP of a kept block, beside finite differences of h + (1 + s) (B(h) - h) in s, for each sample. Of the last group: what comes before also
    moves later routers."""
    denoiser, _ = grouped(name, 2, 3 if name != "flux" else 4)
    denoiser.network.requires_grad_(True)
    weight = normal(*denoiser.call(denoiser.x, denoiser.t).shape, seed=5)

    def loss() -> Tensor:
        return (denoiser.call(denoiser.x, denoiser.t) * weight).sum()

    with moe.recording_blocks(denoiser.network) as routings:
        (grad,) = torch.autograd.grad(loss(), routings[-1].probabilities)
    last = [block for block, router in grouped_blocks(denoiser.network) if router.name == routings[-1].layer]
    kept = torch.zeros_like(grad, dtype=torch.bool).scatter(1, routings[-1].probabilities.topk(2).indices, True)
    expected = torch.zeros_like(grad)
    for b in range(2):
        for j, block in enumerate(last):
            expected[b, j] = (scaled(block, b, 1e-6, loss) - scaled(block, b, -1e-6, loss)) / 2e-6
    assert relative(grad, expected) < 1e-6
    assert not grad[~kept].any() and grad[kept].all()


@torch.no_grad()
def scaled(block: nn.Module, sample: int, by: float, loss: Any) -> float:
    def hook(_module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        old = (kwargs["encoder_hidden_states"], kwargs["hidden_states"]) if isinstance(out, tuple) else (args[0],)
        s = torch.zeros(2, 1, 1, dtype=F64)
        s[sample] = by
        new = tuple(after + s * (after - before) for after, before in zip(out if isinstance(out, tuple) else (out,), old, strict=True))
        return new if isinstance(out, tuple) else new[0]

    handle = block.register_forward_hook(hook, with_kwargs=True)
    value = float(loss())
    handle.remove()
    return value


@pytest.mark.parametrize("name", DEEP)
def test_gradients_reach_every_router(name: str) -> None:
    denoiser, routers = grouped(name, 1)
    denoiser.network.requires_grad_(True)
    denoiser.call(denoiser.x, denoiser.t).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for router in routers for p in router.parameters())


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", ["sd3", "flux", "pixart", "wan"])
@pytest.mark.parametrize("grad", [False, True])
def test_exact_tangents_are_finite_differences(name: str, grad: bool) -> None:
    (network, call, x, t), routers = grouped(name, 1)
    network.requires_grad_(grad)
    dx, dt = normal(*x.shape, seed=1), torch.tensor([0.9, -0.7], dtype=F64) * t.max()
    with torch.no_grad(), moe.recording_blocks(network) as routings:
        h = 1e-7
        expected = (call(x + h * dx, t + h * dt) - call(x - h * dx, t - h * dt)) / (2 * h)
    half = len(routings) // 2
    assert all(torch.equal(a.probabilities.argmax(1), b.probabilities.argmax(1)) for a, b in zip(routings[:half], routings[half:], strict=True))
    with torch.set_grad_enabled(grad):
        out, d_out = tangent(call, (x, t), (dx, dt))
    assert relative(d_out, expected) < 1e-6
    if grad:
        out.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for router in routers for p in router.parameters())


def test_tangents_of_torch_func_leave_routers_their_gradient() -> None:
    (network, call, x, t), routers = grouped("sd3", 1)
    dx, expected = normal(*x.shape, seed=1), math_tangent(call, (x, t), (normal(*x.shape, seed=1), None))[1]
    grads = []
    for through_func in (False, True):
        network.requires_grad_(True)
        with sdpa_kernel(SDPBackend.MATH):
            both: Any = torch.func.jvp(lambda x: call(x, t), (x,), (dx,)) if through_func else (call(x, t), expected)
        out, d_out = both
        grads.append(torch.autograd.grad(out.square().sum(), [p for router in routers for p in router.parameters()]))
        assert relative(d_out, expected) < 1e-12
    assert all(relative(a, b) < 1e-10 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_blocks_that_are_computed_again_choose_as_before(name: str) -> None:
    grads = []
    for again in (False, True):
        (network, call, x, t), routers = grouped(name, 1)
        network.requires_grad_(True)
        if again:
            recompute_blocks(network)
        with moe.recording_blocks(network) as routings:
            loss = call(x, t).square().mean() + moe.balance_loss(routings)
            moe.set_kept(network, 2)  # as another pass may do before this one's gradient
            call(x + 1, t)
            loss.backward()
            assert len(routings) == 2 * len(routers) and all(router.choice is None and router.kept == 2 for router in routers)
        grads.append({key: p.grad for key, p in network.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(largest(grads[0][key], grads[1][key]) <= 1e-14 for key in grads[0])


def test_choices_are_recorded_in_the_terms_of_experts() -> None:
    denoiser, routers = grouped("flux", 1)
    with moe.recording_blocks(denoiser.network) as routings:
        denoiser.call(denoiser.x, denoiser.t)
    denoiser.call(denoiser.x, denoiser.t)
    assert [routing.layer for routing in routings] == [router.name for router in routers]
    assert routers[0].name == "transformer_blocks.0 to transformer_blocks.1"
    for routing in routings:
        assert routing.counts.tolist() == [(routing.probabilities.argmax(1) == j).sum() for j in range(2)] and routing.dropped == 0
    assert 0 < float(moe.balance_loss(routings).detach()) <= 2 and moe.counts(routings).keys() == {router.name for router in routers}


def test_a_network_is_copied_and_read_again() -> None:
    first, _ = grouped("sd3", 1)
    expected = first.call(first.x, first.t)
    copied: Any = copy.deepcopy(first.network)
    again, _ = grouped("sd3", 1, random=False)
    assert largest(again.call(again.x, again.t), expected) > 1e-4
    again.network.load_state_dict(first.network.state_dict())
    assert torch.equal(again.call(again.x, again.t), expected)
    for router in moe.block_routers(first.network):  # the copy has its own
        router.kept = 2
    assert {router.kept for _, router in grouped_blocks(copied)} == {1}
    assert len(moe.block_routers(copied)) == 2 and {id(r) for _, r in grouped_blocks(copied)} == {id(r) for r in moe.block_routers(copied)}


def test_blocks_with_experts_are_grouped_too() -> None:
    for first in ("experts", "blocks"):
        denoiser, inside = deep("flux")
        how = moe.Experts(4, 1.0, 0.25, 4)
        dense = denoiser.call(denoiser.x, denoiser.t)
        if first == "blocks":
            moe.mix_blocks(denoiser.network, inside, moe.Groups(2, 2))
        moe.convert(denoiser.network, inside, how, moe.magnitude(moe.to_convert(denoiser.network, inside, how)))
        if first == "experts":
            moe.mix_blocks(denoiser.network, inside, moe.Groups(2, 2))
        assert len(moe.expert_layers(denoiser.network)) == 13
        assert largest(denoiser.call(denoiser.x, denoiser.t), dense) <= 1e-12


def test_adapters_and_offloading_work_on_blocks_in_groups() -> None:
    denoiser, routers = grouped("flux", 1)
    expected = denoiser.call(denoiser.x, denoiser.t)
    add_adapter(denoiser.network, "student", rank=2, alpha=2, targets=["to_q", "norm1.linear"])
    adapters = [p for name, p in denoiser.network.named_parameters() if "lora_B" in name]
    assert torch.equal(denoiser.call(denoiser.x, denoiser.t), expected) and len(adapters) == 4 + 4 + 5
    with torch.no_grad():
        for p in adapters:
            p.fill_(0.1)
    assert largest(denoiser.call(denoiser.x, denoiser.t), expected) > 1e-4
    offloaded, _ = grouped("flux", 1)
    offload(offloaded.network, torch.device("cpu"))
    assert torch.equal(offloaded.call(offloaded.x, offloaded.t), expected) and len(routers) == 4


def test_text_that_a_mask_hides_does_not_count() -> None:
    found: list[Any] = []
    denoiser, _ = deep("qwen")
    block = denoiser.network.get_submodule("transformer_blocks.0")
    block.register_forward_pre_hook(lambda _module, _args, given: found.append(given), with_kwargs=True)
    denoiser.call(denoiser.x, denoiser.t)
    given, streams = found[0], streams_of(block, "block")
    tokens, vector = seen(block, streams, given)
    text = given["encoder_hidden_states"]
    by_hand = [text[b, :length].mean(0) for b, length in enumerate(diffusers_zoo.LENGTHS)]
    assert largest(tokens, torch.cat([given["hidden_states"].mean(1), torch.stack(by_hand)], 1)) <= 1e-14
    assert torch.equal(vector, given["temb"])


def test_routers_stay_in_fp32_beside_bf16_weights() -> None:
    denoiser, routers = grouped("sd3", 1, dtype=torch.bfloat16)
    assert {p.dtype for router in routers for p in router.parameters()} == {torch.float32}
    assert denoiser.call(denoiser.x, denoiser.t).dtype == torch.bfloat16


def test_how_many_are_kept_changes_at_run_time() -> None:
    denoiser, routers = grouped("sd3", 1)
    for wrong in (0, 3, 1.5):
        with pytest.raises(ValueError, match=rf"^kept: {wrong}; transformer_blocks\.0 to transformer_blocks\.1 are 2 blocks"):
            moe.set_kept(denoiser.network, wrong)  # type: ignore[arg-type]
    assert [router.kept for router in routers] == [1, 1] and "1 of 2 blocks" in repr(routers[0])


def test_what_was_frozen_stays_frozen() -> None:
    for frozen in (True, False):
        denoiser, inside = deep("flux")
        denoiser.network.requires_grad_(not frozen)
        moe.mix_blocks(denoiser.network, inside, moe.Groups(2, 1))
        assert all(p.requires_grad != frozen for p in denoiser.network.parameters())


def refused(name: str, groups: moe.Groups, leave: tuple[str, ...] = ()) -> str:
    denoiser, inside = deep(name) if name in DEEP else ((d := diffusers_zoo.build(name)), list(d.network.get_submodule("down_blocks").children()))
    with pytest.raises(UserError, match=r"^recipe key student\.moe\.groups: ") as error:
        moe.mix_blocks(denoiser.network, inside, groups, leave)
    return str(error.value)


def test_what_cannot_be_grouped_is_named() -> None:
    assert "down_blocks.0 is a DownBlock2D; how to leave one out is not known" in refused("sd15", moe.Groups(2, 1))
    assert "3 of 2 blocks" in refused("sd3", moe.Groups(2, 3)) and "alpha 2" in refused("sd3", moe.Groups(2, 1, 2))
    assert "SD3Transformer2DModel has no 5 consecutive blocks" in refused("sd3", moe.Groups(5, 1))  # the last of its five gives no text on
    denoiser, inside = deep("sd3")
    moe.mix_blocks(denoiser.network, inside, moe.Groups(2, 1))
    with pytest.raises(UserError, match=r"transformer_blocks\.0 of SD3Transformer2DModel is in a group already"):
        moe.mix_blocks(denoiser.network, inside, moe.Groups(2, 1))
    network = diffusers_zoo.build("zimage").network
    with pytest.raises(UserError, match=r"context_refiner\.0 is a ZImageTransformerBlock; how to leave one out"):  # it has no modulation
        moe.mix_blocks(network, network.get_submodule("context_refiner").children(), moe.Groups(1, 1))


def test_what_is_left_always_runs() -> None:
    denoiser, inside = deep("flux")
    routers = moe.mix_blocks(denoiser.network, inside, moe.Groups(2, 1), ("single_transformer_blocks.2",))
    assert [router.name.replace("transformer_blocks", "") for router in routers] == [
        ".0 to .1",
        ".2 to .3",
        "single_.0 to single_.1",
        "single_.3 to single_.4",
    ]
