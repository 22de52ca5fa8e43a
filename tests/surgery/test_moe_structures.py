"""Every structure of feed-forward layer is found and read: its experts together are the dense layer."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from moe_networks import Around, largest
from tangents import F64, normal, relative
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.surgery import moe

WIDTH = 12


def of(file: str, name: str, *args: Any) -> Callable[[], nn.Module]:
    """Makes a layer of a class that one of diffusers' files defines; skips where this version has none."""

    def make() -> nn.Module:
        try:
            return getattr(importlib.import_module(f"diffusers.models.{file}"), name)(*args)
        except (ImportError, AttributeError):
            pytest.skip(f"diffusers has no {name} here")

    return make


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda name=name: FeedForward(WIDTH, activation_fn=name, inner_dim=80)) for name in ("gelu", "gelu-approximate", "geglu", "swiglu")},
    "no bias": lambda: FeedForward(WIDTH, activation_fn="swiglu", inner_dim=80, bias=False),
    "other width out": lambda: FeedForward(WIDTH, dim_out=7, inner_dim=80, final_dropout=True),
    "z-image": of("transformers.transformer_z_image", "FeedForward", WIDTH, 80),
    "lumina": of("attention", "LuminaFeedForward", WIDTH, 80, 16),
    "hidream": of("transformers.transformer_hidream_image", "HiDreamImageFeedForwardSwiGLU", WIDTH, 120, 16),
    "auraflow": of("transformers.auraflow_transformer_2d", "AuraFlowFeedForward", WIDTH, 80),
    "flux2": of("transformers.transformer_flux2", "Flux2FeedForward", WIDTH, WIDTH, 3.0, 80),
    "flux3": of("transformers.transformer_flux3", "Flux3FeedForward", WIDTH, WIDTH, 3.0, 80),
    "omnigen": of("transformers.transformer_omnigen", "OmniGenFeedForward", WIDTH, 80),
    "kandinsky5": of("transformers.transformer_kandinsky", "Kandinsky5FeedForward", WIDTH, 80),
    "krea2": of("transformers.transformer_krea2", "Krea2SwiGLU", WIDTH, 80),
    "ernie": of("transformers.transformer_ernie_image", "ErnieImageFeedForward", WIDTH, 80),
    "qwen 2.1": of("transformers.transformer_qwenimage21", "QwenImage21SwiGLUFeedForward", WIDTH, 80),
    "ideogram": of("transformers.transformer_ideogram4", "Ideogram4MLP", WIDTH, 80),
    "bria fibo 2": of("transformers.transformer_bria_fibo2", "FeedForward", WIDTH, 80),
    "ace step": of("transformers.ace_step_transformer", "AceStepMLP", WIDTH, 80),
}


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("importance", ["random", "magnitude"])
@torch.no_grad()
def test_the_experts_of_every_structure_are_the_dense_layer(name: str, importance: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Around(LAYERS[name]()).to(F64).eval()
    x = normal(2, 5, WIDTH, seed=1)
    expected = network(x)
    layers = moe.to_convert(network, [network.block], moe.Experts(4, 1.0, 0.25, 4))
    scores = moe.random(layers, 3) if importance == "random" else moe.magnitude(layers)
    (layer,) = moe.convert(network, [network.block], moe.Experts(4, 1.0, 0.25, 4), scores)
    assert network.block["ff"] is layer and largest(network(x), expected) <= 1e-12
    layer.active = 0
    assert largest(network(x), layer.shared(x)) == 0 and relative(network(x), expected) > 0.01


SINGLE = ("flux", "bria", "bria_fibo", "chroma", "hunyuan_video", "hunyuanimage", "longcat_image", "motif_video")


def single_block(file: str) -> Any:
    """The single block that one of diffusers' files defines, 32 wide."""
    module = pytest.importorskip(f"diffusers.models.transformers.transformer_{file}")
    cls = next(value for name, value in vars(module).items() if name.endswith("SingleTransformerBlock") and value.__module__ == module.__name__)
    sizes = {"dim": 32, "num_attention_heads": 2, "attention_head_dim": 16, "mlp_ratio": 4.0}
    accepted = {key: value for key, value in sizes.items() if key in inspect.signature(cls).parameters}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(**accepted).to(F64).eval()


@pytest.mark.parametrize("file", SINGLE)
@torch.no_grad()
def test_the_experts_of_every_single_block_are_its_dense_layer(file: str) -> None:
    block = single_block(file)
    attention, h = normal(2, 5, 32, seed=1), normal(2, 5, 32, seed=2)

    def end() -> Tensor:
        """As all of these blocks end, whatever they do before."""
        return block.proj_out(torch.cat([attention, block.act_mlp(block.proj_mlp(h))], dim=2))

    expected, network = end(), nn.ModuleDict({"block": block})
    layers = moe.to_convert(network, [block], moe.Experts(4, 1.0, 0.25, 4))
    (layer,) = moe.convert(network, [block], moe.Experts(4, 1.0, 0.25, 4), moe.magnitude(layers))
    assert largest(end(), expected) <= 1e-12
    layer.active = 1
    assert largest(end(), expected) > 1e-3


def test_a_single_block_that_gates_is_refused() -> None:
    network = nn.ModuleDict({"block": single_block("ovis_image")})
    with pytest.raises(UserError, match=r"block\.proj_mlp \(Linear\) is a feed-forward layer of unknown structure"):
        moe.to_convert(network, [network], moe.Experts())
