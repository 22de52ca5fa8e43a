"""Slim modulation: the dense network at full rank, the nearest one below it; exact tangents; refusals by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from moe_networks import deep, largest
from tangents import F64, math_tangent, normal, relative

from fastgen.errors import UserError
from fastgen.jvp import tangent
from fastgen.surgery import moe
from fastgen.surgery.held import Storage, hold
from fastgen.surgery.lora import add_adapter
from fastgen.surgery.moe.modulation import BesideCommon, LowRank

OWN = {  # networks whose blocks have layers for it, and where they are
    "dit": ["norm1.linear"],
    "sd3": ["norm1.linear", "norm1_context.linear"],
    "flux": ["norm1.linear", "norm1_context.linear", "norm.linear"],
    "qwen": ["img_mod.1", "txt_mod.1"],
    "zimage": ["adaLN_modulation.0"],
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_with_full_rank_it_is_the_dense_network(name: str, shared: bool) -> None:
    dense, _ = deep(name)
    denoiser, inside = deep(name)
    layers = moe.find_modulation(denoiser.network, inside)
    assert {place for _, place in (layer.place for layer in layers)} == set(OWN[name])
    full = max(min(layer.layer.weight.shape) for layer in layers)
    expected = dense.call(dense.x, dense.t)
    names = moe.slim(denoiser.network, inside, moe.Slim(full, shared))
    assert all(isinstance(denoiser.network.get_submodule(each), BesideCommon if shared else LowRank) for each in names)
    assert largest(denoiser.call(denoiser.x, denoiser.t), expected) <= 1e-12
    again, inside = deep(name)
    moe.slim(again.network, inside, moe.Slim(full - 2, shared))
    assert largest(again.call(again.x, again.t), expected) > 1e-6


def test_a_lower_rank_is_the_nearest_there_is() -> None:
    """Eckart and Young: the error is the root of the squares of the singular values left out; biases stay."""
    weight, bias, y = normal(12, 8), normal(12, seed=1), normal(3, 8, seed=2)
    low = LowRank(weight, bias, 3)
    product = low.up.weight @ low.down.weight
    left = torch.linalg.svdvals(weight)[3:].square().sum().sqrt()
    assert abs(float((product - weight).detach().norm() - left)) <= 1e-13
    assert largest(low(y), y @ product.T + bias) <= 1e-13
    assert largest(low.up.weight.norm(dim=0), low.down.weight.norm(dim=1)) <= 1e-13  # neither factor is the larger one


@torch.no_grad()
def test_what_blocks_share_is_their_mean() -> None:
    dense, _ = deep("flux")
    denoiser, inside = deep("flux")
    names = moe.slim(denoiser.network, inside, moe.Slim(0, shared=True))
    common: Any = denoiser.network.get_submodule("common_modulation")
    assert len(names) == 2 * 4 + 5 and len(common.layers) == 3
    for index, (blocks, place, num) in enumerate(
        [("transformer_blocks", "norm1", 4), ("transformer_blocks", "norm1_context", 4), ("single_transformer_blocks", "norm", 5)]
    ):
        each: list[Any] = [dense.network.get_submodule(f"{blocks}.{i}.{place}.linear") for i in range(num)]
        mean = torch.stack([layer.weight for layer in each]).sum(0) / num
        assert largest(common.layers[index].weight, mean) <= 1e-15
        y = normal(2, 32, seed=3)
        for i, layer in enumerate(each):
            slim = denoiser.network.get_submodule(f"{blocks}.{i}.{place}.linear")
            assert largest(slim(y), y @ mean.T + layer.bias) <= 1e-13


@torch.no_grad()
def test_blocks_that_are_alike_lose_nothing_by_sharing() -> None:
    for name in ("dit", "flux", "qwen"):
        denoiser, inside = deep(name)
        for each in moe.find_modulation(denoiser.network, inside):
            first: Any = denoiser.network.get_submodule(f"{each.place[0]}.0.{each.place[1]}")
            each.layer.weight.copy_(first.weight)
        expected = denoiser.call(denoiser.x, denoiser.t)
        moe.slim(denoiser.network, inside, moe.Slim(0, shared=True))
        assert largest(denoiser.call(denoiser.x, denoiser.t), expected) <= 1e-12


@pytest.mark.parametrize("shared", [False, True])
def test_exact_tangents_and_gradients(shared: bool) -> None:
    denoiser, inside = deep("flux")
    denoiser.network.requires_grad_(True)
    moe.slim(denoiser.network, inside, moe.Slim(3, shared))
    both = (normal(*denoiser.x.shape, seed=1), torch.tensor([0.9, -0.7], dtype=F64))
    _, d_out = tangent(denoiser.call, (denoiser.x, denoiser.t), both)
    assert relative(d_out, math_tangent(denoiser.call, (denoiser.x, denoiser.t), both)[1]) < 1e-10
    denoiser.call(denoiser.x, denoiser.t).square().sum().backward()
    names = [name for name, _ in denoiser.network.named_parameters() if "norm1.linear" in name or "common_modulation" in name]
    assert len(names) == 4 * 3 + 3 * shared
    assert all(p.grad is not None for name, p in denoiser.network.named_parameters() if name in names)


@pytest.mark.parametrize("shared", [False, True])
def test_a_slim_network_is_copied_and_read_again(shared: bool) -> None:
    first, inside = deep("sd3")
    moe.slim(first.network, inside, moe.Slim(4, shared))
    other, inside = deep("sd3")
    for p in other.network.parameters():
        p.data.mul_(0.9)
    moe.slim(other.network, inside, moe.Slim(4, shared))
    expected = first.call(first.x, first.t)
    copied = copy.deepcopy(first.network)
    for p in first.network.parameters():
        p.data.zero_()
    other.network.load_state_dict(copied.state_dict())
    assert torch.equal(other.call(other.x, other.t), expected)
    assert len({p.data_ptr() for p in copied.state_dict().values()}) == len(copied.state_dict())  # nothing has two names


def test_blocks_in_groups_are_slimmed_too() -> None:
    dense, _ = deep("flux")
    for first in ("groups", "slim"):
        denoiser, inside = deep("flux")
        if first == "groups":
            moe.mix_blocks(denoiser.network, inside, moe.Groups(2, 2))
        moe.slim(denoiser.network, inside, moe.Slim(32, shared=True))
        if first == "slim":
            moe.mix_blocks(denoiser.network, inside, moe.Groups(2, 2))
        assert largest(denoiser.call(denoiser.x, denoiser.t), dense.call(dense.x, dense.t)) <= 1e-12


def test_what_was_frozen_stays_frozen() -> None:
    for frozen in (True, False):
        for shared in (True, False):
            denoiser, inside = deep("flux")
            denoiser.network.requires_grad_(not frozen)
            moe.slim(denoiser.network, inside, moe.Slim(2, shared))
            assert all(p.requires_grad != frozen for p in denoiser.network.parameters())


def test_what_is_left_stays() -> None:
    denoiser, inside = deep("sd3")
    names = moe.slim(denoiser.network, inside, moe.Slim(2), ("norm1_context.linear",))
    assert names == [f"transformer_blocks.{i}.norm1.linear" for i in range(5)]


def refused(name: str, how: moe.Slim, leave: tuple[str, ...] = ()) -> str:
    denoiser, inside = deep(name)
    with pytest.raises(UserError, match=r"^recipe key student\.moe\.modulation: ") as error:
        moe.slim(denoiser.network, inside, how, leave)
    return str(error.value)


def test_what_cannot_be_slimmed_is_named() -> None:
    for name, block in (("pixart", "transformer_blocks.0 (Basic"), ("sana", "transformer_blocks.0 (Sana"), ("wan", "blocks.0 (Wan")):
        assert f"{block}TransformerBlock) has no layer that makes its modulation; it adds a scale_shift_table" in refused(name, moe.Slim(4))
    assert "transformer_blocks.0 (Flux2TransformerBlock) has no layer that makes its modulation; it is given it" in refused("flux2klein", moe.Slim(4))
    assert "rank 33; transformer_blocks.0.norm1.linear has 32; allowed: 1 to 32" in refused("flux", moe.Slim(33))
    assert "rank 0; transformer_blocks.0.norm1.linear has 32; allowed: 1" in refused("flux", moe.Slim(0))
    assert "rank -1; transformer_blocks.0.norm1.linear has 32; allowed: 0" in refused("flux", moe.Slim(-1, shared=True))
    assert "DiTTransformer2DModel has no modulation layer" in refused("dit", moe.Slim(4), ("norm1.linear",))


def test_layers_that_are_not_plain_are_refused() -> None:
    held, adapted, slim = (deep("flux") for _ in range(3))
    hold(held[0].network, held[1], Storage("bf16"))
    add_adapter(adapted[0].network, "student", rank=2, alpha=2, targets=["norm1.linear"])
    moe.slim(slim[0].network, slim[1], moe.Slim(2))
    for denoiser, inside in (held, adapted, slim):
        with pytest.raises(UserError, match=r"transformer_blocks\.0\.norm1\.linear is a \w+; merge adapters, and slim once"):
            moe.slim(denoiser.network, inside, moe.Slim(2))
