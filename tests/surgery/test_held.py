"""A layer that holds its weight is the ordinary layer of the weight that it reads: values, gradients, tangents; and keeps nothing more."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from narrow import FORMATS, NF4
from tangents import Network, gradient, inputs, network, relative
from torch import Tensor, nn

from fastgen.jvp import check_tangent, tangent
from fastgen.surgery import lora
from fastgen.surgery.formats import Scaled
from fastgen.surgery.held import Held, Storage, hold, is_held, num_held


def storage(name: Any) -> Storage:
    return Storage("bf16") if name == "bf16" else Storage(quantise=name)


def holding(net: nn.Module, name: str) -> nn.Module:
    """The network, each of whose layers holds its weight now."""
    hold(net.requires_grad_(False), [net], storage(name))
    return net


def read(net: nn.Module, held: nn.Module) -> nn.Module:
    """`net` with the weights that `held`, made from the same, reads."""
    for key, layer in held.named_modules():
        if isinstance(layer, Held):
            net.get_submodule(key).weight.data = layer.weight  # type: ignore[union-attr]
    return net.requires_grad_(False)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(20, 7), (3, 5, 20)),
    "without bias": (lambda: nn.Linear(20, 7, bias=False), (3, 20)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 5, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 3, 2), padding_mode="circular", padding=1), (2, 2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layer", LAYERS)
def test_values_gradients_and_tangents_are_those_of_the_weight_that_is_read(layer: str, name: str) -> None:
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    plain = make()
    held = holding(copy.deepcopy(plain), name)
    read(plain, held)
    x, dx = torch.randn(shape), torch.randn(shape)
    results = []
    for net in (held, plain):
        point = x.clone().requires_grad_()
        out = net(point)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        with torch.no_grad():
            results.append((out.detach(), point.grad, tangent(net, (x,), (dx,))[1]))
    for a, b in zip(*results, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_under_autocast_it_computes_as_the_ordinary_layer_does(name: str) -> None:
    plain = network(torch.float32)
    held = holding(copy.deepcopy(plain), name)
    read(plain, held)
    (x, t), _ = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = held(x, t), plain(x, t)
    assert ours.dtype == theirs.dtype
    assert relative(ours.double(), theirs.double()) < 1e-3, "rounded at the same places"


@pytest.mark.parametrize("name", FORMATS)
def test_a_half_precision_input_meets_a_weight_and_a_bias_of_its_dtype(name: str) -> None:
    held = holding(nn.Linear(20, 7), name)
    assert held(torch.randn(3, 20).bfloat16()).dtype == torch.bfloat16
    assert held(torch.randn(3, 20).double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["fp8", "int8", NF4])
def test_the_exact_tangent_of_a_network_passes_the_check_of_the_start(name: str) -> None:
    held = holding(network(torch.float32), name)
    primals, tangents = inputs(torch.float32)
    check = check_tangent(held, primals, tangents, held)
    assert check.relative_error < 3e-3
    plain = read(network(torch.float32), held)
    with torch.no_grad():
        expected = tangent(plain, primals, tangents)[1]
        assert relative(check.tangent, expected) < 1e-6
        assert 1e-3 < relative(expected, tangent(network(torch.float32), primals, tangents)[1]) < 0.3, "which is not that of other weights"


def test_a_graph_keeps_no_weight_but_reads_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    held = holding(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), "int8")
    weights: list[weakref.ref[Tensor]] = []
    own = Scaled.read

    def counted(self: Scaled, *args: Any) -> Tensor:
        weight = own(self, *args)
        weights.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(Scaled, "read", counted)
    x = torch.randn(5, 64, requires_grad=True)
    out = held(x)
    gc.collect()
    assert len(weights) == 2 and not any(ref() is not None for ref in weights)
    out.sum().backward()
    assert len(weights) == 4 and x.grad is not None


@pytest.mark.parametrize("name", FORMATS)
def test_adapters_on_it_are_fp32_and_train_as_on_the_weights_that_are_read(name: str) -> None:
    results = []
    held = holding(network(torch.float32), name)
    for net in (held, read(network(torch.float32), held)):
        lora.add_adapter(net, "student", rank=2, alpha=3.0, targets=["to_q", "to_k", "to_v", "to_out"])
        own = lora.parameters(net, "student")
        assert {parameter.dtype for parameter in own.values()} == {torch.float32}
        for i, parameter in enumerate(own.values()):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        net.requires_grad_(False)
        for parameter in own.values():
            parameter.requires_grad_(True)
        (x, t), _ = inputs(torch.float32)
        out = net(x, t)
        results.append((out.detach(), gradient(net, out)))
    for a, b in zip(*results, strict=True):
        assert relative(a, b) < 1e-6


def test_merging_goes_into_a_network_of_its_own() -> None:
    """The plain weights and the adapter, neither rounded."""
    held, plain, target = holding(network(torch.float32), "int8"), network(torch.float32), network(torch.float32)
    for net in (held, plain):
        lora.add_adapter(net, "student", rank=2, alpha=3.0, targets=["to_q"])
        for i, parameter in enumerate(lora.parameters(net, "student").values()):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    lora.merge_into(target, held, "student")
    lora.merge(plain, "student")
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(target.state_dict()[key], value)
    assert is_held(held) and len(lora.parameters(held, "student")) == 4


def test_norms_biases_and_what_lies_outside_the_blocks_are_not_quantised() -> None:
    net = nn.Sequential(nn.Linear(8, 8), Network(), nn.Embedding(3, 4), nn.Linear(8, 8))
    numbers = sum(parameter.numel() for parameter in net.parameters())
    hold(net, list(net[1].children()), Storage("bf16", "fp8"))
    dtypes = {type(layer).__name__: layer.get_buffer("codes").dtype for layer in (net[0], net[1].blocks[0].to_q)}  # type: ignore[union-attr, index]
    assert dtypes == {"HeldLinear": torch.float8_e4m3fn} and net[0].get_buffer("codes").dtype == torch.bfloat16
    assert {type(module) for module in net.modules() if next(module.parameters(recurse=False), None) is not None} > {nn.Embedding, nn.LayerNorm}
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    assert numbers == num_held([net, net]) + sum(parameter.numel() for parameter in net.parameters())


def test_nothing_is_held_unless_it_is_asked_for() -> None:
    net = network(torch.float32)
    before = net.state_dict()
    for kept in (Storage(), Storage("fp32")):
        hold(net, [net], kept)
    assert not is_held(net) and net.state_dict().keys() == before.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_conversions_leave_what_is_held_and_copies_are_independent(name: str) -> None:
    held = holding(nn.Linear(20, 7), name)
    x, before = torch.randn(2, 20), {key: value.dtype for key, value in held.named_buffers()}
    out, other = held(x), copy.deepcopy(held)
    other.double().float()
    assert {key: value.dtype for key, value in other.named_buffers()} == before
    assert torch.equal(other(x), out)
    other.get_buffer("codes").zero_()
    assert torch.equal(held(x), out)
    assert other.to("meta").get_buffer("codes").is_meta
