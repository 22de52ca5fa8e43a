"""What FLUX.1-dev and its experts cost, on the meta device, beside numbers known for it; and of other networks, beside PyTorch's own counting."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import diffusers_zoo
import pytest
import torch
from moe_networks import BLOCKS, blocks, deep, experts, grouped, split
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastgen.surgery import moe
from fastgen.surgery.moe.accounting import Account, account, total

real_sizes = importlib.import_module("real_sizes")  # among the tests of families
LEFT_OUT = ("router", "modulation", "outside blocks")  # what the numbers of 2510.09094's table leave out


def flux_dev(is_split: bool) -> tuple[Any, list[nn.Module]]:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        network: Any = FluxTransformer2DModel(**real_sizes.FLUX_DEV["transformer"])
    inside = [*network.transformer_blocks, *network.single_transformer_blocks]
    if is_split:
        layers = moe.to_convert(network, inside, moe.Experts())
        moe.convert(network, inside, moe.Experts(), moe.magnitude(layers))
    return network, inside


def image(network: nn.Module, num_text: int) -> Callable[[], Any]:
    """A call for one picture of 1024 x 1024."""

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, device="meta")

    text = {"encoder_hidden_states": empty(1, num_text, 4096), "pooled_projections": empty(1, 768), "txt_ids": empty(num_text, 3)}
    return lambda: network(hidden_states=empty(1, 4096, 64), timestep=empty(1), guidance=empty(1), img_ids=empty(4096, 3), **text)


def flux2_dev(is_split: bool) -> tuple[Any, list[nn.Module]]:
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        network: Any = Flux2Transformer2DModel(**real_sizes.FLUX2_DEV["transformer"])
    inside = [*network.transformer_blocks, *network.single_transformer_blocks]
    if is_split:
        moe.convert(network, inside, moe.Experts(), moe.magnitude(moe.to_convert(network, inside, moe.Experts())))
    return network, inside


def picture_of_flux2(network: nn.Module, num_text: int) -> Callable[[], Any]:
    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, device="meta")

    text = {"encoder_hidden_states": empty(1, num_text, 15360), "txt_ids": empty(num_text, 4)}
    return lambda: network(hidden_states=empty(1, 4096, 128), timestep=empty(1), guidance=empty(1), img_ids=empty(4096, 4), **text)


def test_flux2_by_hand() -> None:
    """A width of D, three hidden neurons to each, in two streams of 8 blocks and in 48 more: D · 6D to values and gates, 3D · D back. Attention has
    4 D² in each stream and in each single block. No biases; a token uses 1 + 2/4 of 4 parts."""
    width, num_text = 6144, 512
    layers, tokens = 2 * 8 + 48, 4096 + num_text
    dense, split_up = (account(*made, picture_of_flux2(made[0], num_text)) for made in (flux2_dev(False), flux2_dev(True)))
    neurons, routers = layers * 9 * width**2, layers * 12 * width
    assert dense["feed-forward"].parameters == split_up["feed-forward"].parameters == neurons
    assert dense["attention"].parameters == split_up["attention"].parameters == layers * (4 * width**2 + 2 * 128)  # and norms of a head's width
    assert split_up["feed-forward"].active == pytest.approx(neurons * 1.5 / 4)
    assert split_up["router"].parameters == routers
    assert total(split_up).parameters == total(dense).parameters + routers
    passed = 8 * tokens + 48 * tokens  # tokens through 9 D² each: a double block's streams share them out
    assert dense["feed-forward"].flops == pytest.approx(2 * 9 * width**2 * passed)
    assert split_up["feed-forward"].flops == pytest.approx(2 * 9 * width**2 * passed * 1.5 / 4)
    assert dense["attention"].flops == split_up["attention"].flops == pytest.approx(2 * 4 * width**2 * passed)
    assert [billions(number) for number in (total(dense).parameters, neurons, total(split_up).active)] == [32.2233, 21.7433, 18.6385]
    assert [round(total(costs, LEFT_OUT).flops / 1e12, 2) for costs in (dense, split_up)] == [282.49, 172.90]


def billions(number: float) -> float:
    return round(number / 1e9, 4)


def test_parameters_of_flux() -> None:
    dense = account(*flux_dev(False))
    assert billions(total(dense).parameters) == 11.9014 == billions(total(dense).active)
    assert billions(dense["feed-forward"].parameters) == 5.7389
    assert billions(dense["modulation"].parameters) == 3.2286
    assert billions(dense["outside blocks"].parameters) == 0.0641
    assert total(dense).flops == 0


def test_parameters_of_flux_with_experts() -> None:
    found = account(*flux_dev(True))
    assert billions(total(found, ["router"]).parameters) == 11.9014
    assert billions(total(found, ["router"]).active) == 8.3147
    assert billions(total(found).active) == 8.3175
    assert round(total(found, ["router", "modulation"]).active / 1e9, 3) == 5.086


@pytest.mark.parametrize(("num_text", "dense", "split_up"), [(77, 66.07, 43.62), (512, 74.36, 49.57)])
def test_flops_of_an_image_of_flux(num_text: int, dense: float, split_up: float) -> None:
    for is_split, expected in ((False, dense), (True, split_up)):
        network, inside = flux_dev(is_split)
        found = account(network, inside, image(network, num_text))
        assert round(total(found, LEFT_OUT).flops / 1e12, 2) == expected
        assert 0 < found["outside blocks"].flops + found["modulation"].flops + found["router"].flops < 0.05e12


def counted(name: str, denoiser: diffusers_zoo.Denoiser | None = None) -> tuple[Account, float]:
    """Ours, and PyTorch's, which sees products and attention under the layers that run."""
    denoiser = diffusers_zoo.build(name) if denoiser is None else denoiser
    ours = account(denoiser.network, blocks(name, denoiser.network), lambda: denoiser.call(denoiser.x, denoiser.t))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoiser.call(denoiser.x, denoiser.t)
    return ours, counter.get_total_flops()


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "flux2klein", "ovis", "pixart", "prx", "qwen", "wan", "zimage"])
def test_flops_are_those_that_pytorch_counts(name: str) -> None:
    ours, theirs = counted(name)
    assert total(ours).flops == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_parameter_is_of_one_kind(name: str) -> None:
    network = diffusers_zoo.build(name).network
    found = account(network, blocks(name, network))
    assert total(found).parameters == sum(p.numel() for p in network.parameters())
    assert found["feed-forward"].parameters > 0 and found["attention"].parameters > 0 and found["router"].parameters == 0
    if name not in ("sd15", "sana"):
        fits = moe.to_convert(network, blocks(name, network), experts(name, 2))
        in_structures = sum(part.numel() for layer in fits for part in (layer.dense().w1, layer.dense().w2))
        biases = sum(0 if layer.dense().b1 is None else len(layer.dense().w1) for layer in fits)
        biases += sum(layer.down.out_features for layer in fits if layer.down.bias is not None and not layer.beside)
        assert found["feed-forward"].parameters == in_structures + biases


@pytest.mark.parametrize("active", [0, 1, 2, 4])
def test_experts_cost_what_is_active_of_them(active: int) -> None:
    denoiser, layers = split("sd3", active, dtype=torch.float32)
    dense = diffusers_zoo.build("sd3")
    before = account(dense.network, blocks("sd3", dense.network), lambda: dense.call(dense.x, dense.t))
    after = account(denoiser.network, blocks("sd3", denoiser.network), lambda: denoiser.call(denoiser.x, denoiser.t))
    share = (4 + active) / 8  # half of the neurons are shared, an eighth is each expert's
    assert after["feed-forward"].flops == pytest.approx(share * before["feed-forward"].flops)
    output_biases = sum(layer.shared.down.out_features for layer in layers)
    assert after["feed-forward"].active == pytest.approx(share * (before["feed-forward"].parameters - output_biases) + output_biases)
    assert after["attention"] == before["attention"] and after["attention products"] == before["attention products"]
    assert after["router"].parameters == sum(layer.router.weight.numel() for layer in layers)


def test_experts_that_choose_cost_their_mean() -> None:
    denoiser, _ = split("sd3", 2, "expert", torch.float32)
    fixed = account(denoiser.network, blocks("sd3", denoiser.network), lambda: denoiser.call(denoiser.x, denoiser.t))
    moe.set_active(denoiser.network, [1.0, 3.0])
    varied = account(denoiser.network, blocks("sd3", denoiser.network), lambda: denoiser.call(denoiser.x, denoiser.t))
    assert fixed == varied


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart", "qwen", "wan", "zimage"])
@pytest.mark.parametrize("kept", [1, 2])
def test_flops_of_blocks_in_groups_are_those_of_the_blocks_that_run(name: str, kept: int) -> None:
    """Routers of zero have both samples keep the first blocks, which cost what others of their list do. Not DiT: with fewer blocks its groups embed
    time and class once more for their routers, which is counted as the first block's."""
    denoiser, routers = grouped(name, kept, dtype=torch.float32, random=False)
    ours, theirs = counted(name, denoiser)
    assert total(ours).flops == pytest.approx(theirs, rel=1e-9)
    assert [router.kept for router in routers] == [kept] * len(routers)
    assert ours["router"].flops == sum(2 * 2 * p.numel() for router in routers for p in router.parameters())


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen"])
def test_a_group_has_its_share_of_each_kind_active(name: str) -> None:
    denoiser, routers = grouped(name, 1)
    dense, inside = deep(name)
    found, all_kept = account(denoiser.network, blocks(name, denoiser.network)), account(dense.network, inside)
    assert found["router"].active == found["router"].parameters == sum(p.numel() for router in routers for p in router.parameters())
    assert total(found, ["router"]).parameters == total(all_kept).parameters
    alone = account(*alone_in_groups(name))
    for kind in ("attention", "feed-forward", "modulation"):
        assert found[kind].active == pytest.approx(all_kept[kind].active - alone[kind].active / 2)
    assert found["outside blocks"] == all_kept["outside blocks"]


def alone_in_groups(name: str) -> tuple[nn.Module, list[nn.Module]]:
    """The blocks of a dense network that are in groups of two, and nothing else."""
    _, inside = deep(name)
    last = {"sd3": [4], "flux": [8], "qwen": []}[name]
    rest = nn.ModuleList(block for i, block in enumerate(inside) if i not in last)
    return rest, list(rest)


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "qwen", "zimage"])
@pytest.mark.parametrize("how", [moe.Slim(3), moe.Slim(0, shared=True), moe.Slim(2, shared=True)])
def test_slim_modulation_costs_its_factors(name: str, how: moe.Slim) -> None:
    denoiser, inside = deep(name, torch.float32)
    before = account(denoiser.network, inside)
    layers = [each.layer for each in moe.find_modulation(denoiser.network, inside)]
    common = {(each.place, each.layer.weight.shape) for each in moe.find_modulation(denoiser.network, inside)} if how.shared else ()
    moe.slim(denoiser.network, inside, how)
    ours, theirs = counted(name, denoiser)
    saved = sum(layer.weight.numel() - how.rank * sum(layer.weight.shape) for layer in layers) - sum(shape.numel() for _, shape in common)
    assert ours["modulation"].parameters == before["modulation"].parameters - saved
    assert all(ours[kind].parameters == before[kind].parameters for kind in before if kind != "modulation")
    assert total(ours).flops == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(
    ("how", "single", "active", "tera"),
    [
        (moe.Slim(48), None, 5.15, 43.62),  # the paper's L: 5.15 and 43.42
        (moe.Slim(0, shared=True), None, 5.23, 43.62),
        (moe.Slim(48), (3, 2), 3.14, 27.55),  # 10 double and 26 single blocks; its S: 3.19 and 26.43
        (moe.Slim(48), (2, 1), 2.68, 22.19),  # 10 and 19; its XS: 2.64 and 20.26
    ],
)
def test_flux_in_all_its_sizes(how: moe.Slim, single: tuple[int, int] | None, active: float, tera: float) -> None:
    network, inside = flux_dev(True)
    moe.slim(network, inside, how)
    if single:
        moe.mix_blocks(network, network.transformer_blocks, moe.Groups(2, 1))
        moe.mix_blocks(network, network.single_transformer_blocks, moe.Groups(*single))
    found = account(network, inside, image(network, 77))
    assert round(total(found).active / 1e9, 2) == active
    assert round(total(found, LEFT_OUT).flops / 1e12, 2) == tera
    assert total(found).parameters < 8.83e9
