"""Every structure of feed-forward layer is found and read: its experts together are the dense layer."""

from __future__ import annotations

import importlib
import inspect
import re
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
DIFFUSERS = ("gelu", "gelu-approximate", "geglu", "swiglu", "linear-silu")  # `activation_fn` of its FeedForward


def of(file: str, name: str, *args: Any) -> Callable[[], nn.Module]:
    """Makes a layer of a class that one of diffusers' files defines; skips where this version has none."""

    def make() -> nn.Module:
        try:
            return getattr(importlib.import_module(f"diffusers.models.{file}"), name)(*args)
        except (ImportError, AttributeError):
            pytest.skip(f"diffusers has no {name} here")

    return make


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda name=name: FeedForward(WIDTH, activation_fn=name, inner_dim=80)) for name in DIFFUSERS},
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
    "cosmos 3": of("transformers.transformer_cosmos3", "Cosmos3VLTextMLP", WIDTH, 80),
    "stable audio 3": of("transformers.transformer_stable_audio3", "StableAudio3FeedForward", WIDTH, 80 / WIDTH),
    "longcat audio": of("transformers.transformer_longcat_audio_dit", "AudioDiTFeedForward", WIDTH, 80 / WIDTH),
    "t5 film": of("transformers.t5_film_transformer", "T5DenseGatedActDense", WIDTH, 80, 0.1),
    "wan animate 2": lambda: nn.Sequential(nn.Linear(WIDTH, 80), nn.GELU(approximate="tanh"), nn.Linear(80, WIDTH)),
    "sequence with dropout": lambda: nn.Sequential(nn.Linear(WIDTH, 80), nn.GELU(), nn.Dropout(0.5), nn.Linear(80, WIDTH)),
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


@torch.no_grad()
def test_a_single_block_that_gates_splits_values_from_ones() -> None:
    """As Ovis' blocks end."""
    block = single_block("ovis_image")
    attention, h = normal(2, 5, 32, seed=1), normal(2, 5, 32, seed=2)

    def end() -> Tensor:
        values, gates = block.proj_mlp(h).split([block.mlp_hidden_dim] * 2, dim=-1)
        return block.proj_out(torch.cat([attention, block.act_mlp(gates) * values], dim=2))

    expected, network = end(), nn.ModuleDict({"block": block})
    layers = moe.to_convert(network, [block], moe.Experts(4, 1.0, 0.25, 4))
    assert [(layer.activation, layer.hidden, layer.beside) for layer in layers] == [("swiglu", 128, 32)]
    (layer,) = moe.convert(network, [block], moe.Experts(4, 1.0, 0.25, 4), moe.magnitude(layers))
    assert largest(end(), expected) <= 1e-12
    layer.active = 1
    assert largest(end(), expected) > 1e-3


class InBlock(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_that_attention_and_neurons_share(bias: bool) -> None:
    """FLUX.2's, whose layers have no biases; and with them. Attention's rows stay, dtype and gradient included."""
    make = of("transformers.transformer_flux2", "Flux2ParallelSelfAttention", 24, 3, 8, 0.0, bias, bias, 1e-5, 24, True, 2.0, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = InBlock(make()).to(F64).eval()
    block: Any = network.block
    rows, x = block.to_qkv_mlp_proj.weight[:72].detach().clone(), normal(2, 5, 24, seed=1)
    expected = network(x)
    layers = moe.to_convert(network, [block], moe.Experts(4, 1.0, 0.25, 4))
    assert [(layer.name, layer.hidden, layer.beside, layer.above) for layer in layers] == [("block", 48, 24, 72)]
    (layer,) = moe.convert(network, [block], moe.Experts(4, 1.0, 0.25, 4), moe.magnitude(layers))
    assert largest(network(x), expected) <= 1e-12
    assert torch.equal(block.to_qkv_mlp_proj.attention.weight, rows) and (block.to_qkv_mlp_proj.attention.bias is None) == (not bias)
    assert (layer.b1 is None) == (not bias) and layer.shared.down.bias is None
    layer.active = 1
    assert largest(network(x), expected) > 1e-4
    network.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert block.to_qkv_mlp_proj(x.float()).dtype == torch.bfloat16  # attention computes in what it did, though tokens are wider


@torch.no_grad()
def test_a_layer_that_is_called_with_more_than_tokens() -> None:
    """Sana-WM's, whose sizes no expert would take."""
    make = of("transformers.transformer_sana_wm", "SanaWMMlp", WIDTH, 80, WIDTH, lambda: nn.GELU(approximate="tanh"))
    network = InBlock(make()).to(F64).eval()
    block: Any = network.block
    x = normal(2, 5, WIDTH, seed=1)
    expected = block(x, HW=(1, 5))
    layers = moe.to_convert(network, [block], moe.Experts(4, 1.0, 0.25, 4))
    moe.convert(network, [block], moe.Experts(4, 1.0, 0.25, 4), moe.magnitude(layers))
    assert largest(block(x, HW=(1, 5)), expected) <= 1e-12


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "cosmos 3, relu2": (of("transformers.transformer_cosmos3", "Cosmos3VLTextMLP", WIDTH, 80, "relu2"), "ff (Cosmos3VLTextMLP)"),
    "x sigmoid(1.7 x)": (lambda: FeedForward(WIDTH, activation_fn="geglu-approximate", inner_dim=80), "ff (FeedForward)"),
    "hidream's own experts": (of("transformers.transformer_hidream_image", "MOEFeedForwardSwiGLU", WIDTH, 80, 4, 2), "ff (MOEFeedForwardSwiGLU)"),
    "minimax music 3": (of("transformers.transformer_minimax_music3", "MiniMaxMusic3TransformerBlock", WIDTH, 2, 6, 80), "block.ff_in (Linear)"),
    "minimax depth decoder": (
        of("transformers.minimax_music3_rvq_depth_decoder", "MiniMaxMusic3DepthDecoderBlock", WIDTH, 2, 80), "block.up_proj (Linear)"
    ),
    "rfd4": (of("transformers.transformer_rfd4_proteina", "RFD4ProteinaTransition", WIDTH), "ff (RFD4ProteinaTransition)"),
    "a sequence of another activation": (lambda: nn.Sequential(nn.Linear(WIDTH, 80), nn.ReLU(), nn.Linear(80, WIDTH)), "ff (Sequential)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_another_structure_is_refused_by_name(name: str) -> None:
    make, said = REFUSED[name]
    network = (InBlock if said.startswith("block.") else Around)(make())
    with pytest.raises(UserError, match=rf"{re.escape(said)} is a feed-forward layer of unknown structure"):
        moe.to_convert(network, [network], moe.Experts())
