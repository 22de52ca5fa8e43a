"""Which neurons go where: importance beside its closed form, shares dealt out, weights that follow their neurons."""

from __future__ import annotations

from typing import Any

import diffusers_zoo
import pytest
import torch
from diffusers.models.attention import FeedForward
from moe_networks import Around, blocks, largest, split
from tangents import F64, normal
from torch import Tensor

from fastgen.surgery import moe
from fastgen.surgery.moe.split import Partition, deal, select, sizes
from fastgen.surgery.moe.structures import Structure
from fastgen.surgery.recompute import recompute_blocks

WIDTH = 12


def test_it_is_split_as_the_paper_splits_flux() -> None:
    assert sizes(12288, moe.Experts(), "ff") == (3072, 768)  # four widths of 3072: one shared, twelve quarters
    assert sizes(10, moe.Experts(3, 0.1, 0.3), "ff") == (1, 3)  # decimals are meant as they are written


def test_the_most_important_are_shared_and_the_rest_dealt_in_turn() -> None:
    importance = torch.tensor([5.0, 0, 9, 3, 3, 8, 1, 4])
    shared, routed = deal(importance, moe.Experts(3, 1, 1), "ff")
    assert shared.tolist() == [2, 5]
    assert routed.tolist() == [[0, 4], [7, 6], [3, 1]]  # 5 and 3, 4 and 1, 3 and 0: equal ones keep their order
    everything = torch.cat([shared, routed.flatten()])
    assert everything.sort().values.tolist() == list(range(8))


def test_values_gates_and_hidden_biases_follow_their_neurons() -> None:
    network = Around(FeedForward(3, activation_fn="geglu", inner_dim=5)).to(F64)
    (structure,) = moe.to_convert(network, [network.block], moe.Experts(4, 1, 1))
    dense = structure.dense()
    part = select(dense, torch.tensor([4, 1]), gated=True)
    layer: Any = network.block["ff"]
    assert torch.equal(part.w1, layer.net[0].proj.weight[[4, 1, 9, 6]])
    assert part.b1 is not None and torch.equal(part.b1, layer.net[0].proj.bias[[4, 1, 9, 6]])
    assert torch.equal(part.w2, layer.net[2].weight[:, [4, 1]])
    assert part.b2 is None and dense.b2 is not None and torch.equal(dense.b2, layer.net[2].bias)
    several = select(dense, torch.tensor([[4, 1], [0, 2]]), gated=True)
    assert torch.equal(several.w1[0], part.w1) and torch.equal(several.w2[0], part.w2)


def test_the_output_bias_is_the_shared_experts_alone() -> None:
    denoiser = diffusers_zoo.build("flux", F64)
    block: Any = denoiser.network.get_submodule("single_transformer_blocks.0")
    columns, bias = block.proj_out.weight[:, :32], block.proj_out.bias
    _, layers = split("flux")
    assert [layer.name for layer in layers] == ["transformer_blocks.0.ff", "transformer_blocks.0.ff_context", "single_transformer_blocks.0"]
    double, single = layers[0], layers[2]
    assert double.shared.down.bias is not None and single.shared.down.bias is None  # there it is the attention projection's
    again, _ = split("flux")
    place: Any = again.network.get_submodule("single_transformer_blocks.0.proj_out")
    assert torch.equal(place.attention.weight, columns) and torch.equal(place.attention.bias, bias)


def structures(name: str) -> tuple[diffusers_zoo.Denoiser, list[Structure]]:
    denoiser = diffusers_zoo.build(name, F64)
    fits = moe.Experts(4, 1.0, 1.0 if name == "zimage" else 0.25)
    return denoiser, moe.to_convert(denoiser.network, blocks(name, denoiser.network), fits)


@pytest.mark.parametrize("name", ["sd3", "flux", "flux2klein", "ovis", "prx", "zimage"])
def test_a_neurons_taylor_score_is_that_of_its_output_column(name: str) -> None:
    denoiser, layers = structures(name)
    targets = [normal(*denoiser.x.shape, seed=seed) for seed in (1, 2)]

    def loss(target: Tensor) -> Tensor:
        return (denoiser.call(denoiser.x, denoiser.t) - target).square().mean()

    found = moe.taylor(layers, [lambda target=target: loss(target) for target in targets])
    assert not any(p.requires_grad or p.grad is not None for p in denoiser.network.parameters())
    for layer in layers:
        layer.down.weight.requires_grad_(True)
    expected = {layer.name: torch.zeros(layer.hidden, dtype=F64) for layer in layers}
    for target in targets:
        grads = torch.autograd.grad(loss(target), [layer.down.weight for layer in layers])
        for layer, grad in zip(layers, grads, strict=True):
            expected[layer.name] += (layer.down.weight * grad).detach()[:, layer.beside :].sum(0).abs() / len(targets)
    for layer in layers:
        scale = max(1e-5, float(expected[layer.name].max()))
        assert largest(found[layer.name], expected[layer.name]) <= 1e-12 * scale, layer.name
    assert max(float(score.max()) for score in found.values()) > 1e-5


def test_blocks_that_are_computed_again_have_the_same_importance() -> None:
    found = []
    for again in (False, True):
        denoiser, layers = structures("flux")
        if again:
            recompute_blocks(denoiser.network)
        found.append(moe.taylor(layers, [lambda denoiser=denoiser: denoiser.call(denoiser.x, denoiser.t).square().mean()]))
    assert all(torch.equal(found[1][name], score) for name, score in found[0].items())


def test_a_layer_whose_output_nobody_reads_counts_nothing() -> None:
    denoiser, layers = structures("qwen")
    found = moe.taylor(layers, [lambda: denoiser.call(denoiser.x, denoiser.t).square().mean()])
    assert not found["transformer_blocks.1.txt_mlp"].any()
    assert found["transformer_blocks.1.img_mlp"].all()


def test_importance_needs_a_batch() -> None:
    with pytest.raises(ValueError, match=r"^batches: none"):
        moe.taylor(structures("sd3")[1], [])


def test_magnitude_is_the_norm_of_all_that_a_neuron_has() -> None:
    network = Around(FeedForward(3, activation_fn="swiglu", inner_dim=5)).to(F64)
    layers = moe.to_convert(network, [network.block], moe.Experts(4, 1, 1))
    layer: Any = network.block["ff"]
    first, last = layer.net[0].proj, layer.net[2]
    parts = [first.weight[2], first.weight[7], first.bias[2:3], first.bias[7:8], last.weight[:, 2]]
    assert largest(moe.magnitude(layers)["block.ff"][2], torch.cat(parts).detach().norm()) <= 1e-14


def test_random_importance_follows_seed_and_name_alone() -> None:
    _, layers = structures("sd3")
    once, again, other = moe.random(layers, 1), moe.random(layers[::-1], 1), moe.random(layers, 2)
    names = list(once)
    assert all(torch.equal(once[name], again[name]) for name in names)
    assert not torch.equal(once[names[0]], other[names[0]]) and not torch.equal(once[names[0]], once[names[1]])


def test_without_routed_experts_it_is_the_pruned_layer() -> None:
    network = Around(FeedForward(WIDTH, activation_fn="gelu", inner_dim=20)).to(F64)
    layer: Any = network.block["ff"]
    x = normal(4, WIDTH)
    layers = moe.to_convert(network, [network.block], moe.Experts(4, 1, 1))
    partition: Partition = deal(moe.magnitude(layers)["block.ff"], moe.Experts(4, 1, 1), "block.ff")
    hidden = layer.net[0](x)
    kept = torch.zeros(20, dtype=F64)
    kept[partition.shared] = 1
    expected = layer.net[2](hidden * kept)
    moe.convert(network, [network.block], moe.Experts(4, 1, 1), moe.magnitude(layers))
    moe.set_active(network, 0)
    assert largest(network(x), expected) <= 1e-14
