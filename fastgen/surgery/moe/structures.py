"""Finds the feed-forward layers of a network that somebody else wrote, and says how their weights lie.

Three structures: diffusers' `FeedForward`; named classes whose values and gates are linear layers of their own, or lie in one; and single
blocks as FLUX.1 has them, whose last layer reads [attention; hidden] side by side. Others are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fastgen_kernels.moe_ffn import Activation, is_gated
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.surgery.moe.beside import BesideAttention

KEY = "recipe key student.moe"


class Dense(NamedTuple):
    """w1: (H, D), gated (2H, D), values above gates; b1: (H,) or (2H,); w2: (D', H); b2: (D',)."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None


@dataclass(frozen=True)
class Structure:
    """One feed-forward layer. name: of the module that is replaced, in the network; up: linear layers whose outputs, one under the other, are
    values and then gates, or, with gates_first, one layer the other way round; down: the layer whose last `hidden` inputs are the hidden
    activations; place: puts another module, which maps tokens (…, D) to (…, D'), where this layer was."""

    name: str
    activation: Activation
    up: tuple[nn.Linear, ...]
    down: nn.Linear
    place: Callable[[nn.Module], None]
    gates_first: bool = False
    beside: int = 0  # how many inputs of `down` come first and are attention's; its bias is attention's then

    @property
    def hidden(self) -> int:
        return self.down.in_features - self.beside

    def dense(self) -> Dense:
        """The layer's weights, detached; views where nothing has to be joined."""
        w1, b1 = _joined([layer.weight for layer in self.up]), _joined([layer.bias for layer in self.up])
        if self.gates_first:
            w1, b1 = _swapped(w1), _swapped(b1)
        assert w1 is not None
        return Dense(w1, b1, self.down.weight.detach()[:, self.beside :], None if self.beside or self.down.bias is None else self.down.bias.detach())


def find(network: nn.Module, blocks: Iterable[nn.Module], leave: Sequence[str] = ()) -> list[Structure]:
    """The feed-forward layers of some of the network's blocks, in the order of its modules.

    leave: ends of names of modules that stay dense, known or not. UserError, which names the module, for one of another structure, for one
    that convolves over space, and for weights that are held in another format or have adapters; and where none is found.
    """
    found = [structure for structure, _ in walk(network, blocks, leave) if structure is not None]
    if not found:
        raise UserError(f"{KEY}: {type(network).__name__} has no feed-forward layer in its blocks that is not left dense")
    return found


def walk(
    network: nn.Module, blocks: Iterable[nn.Module], leave: Sequence[str] = (), *, strict: bool = True
) -> Iterator[tuple[Structure | None, str]]:
    """(structure, name) of each feed-forward layer, None for one of no known structure; with strict, an error instead."""
    inside = {id(module) for block in blocks for module in block.modules()}
    done: set[str] = set()
    for name, module in network.named_modules():
        if id(module) not in inside or any(f"{name}.".startswith(f"{other}.") for other in done):
            continue
        if any(f".{name}".endswith(f".{end}") for end in leave):
            done.add(name)
            continue
        structure = _recognised(network, name, module)
        if structure is not None and strict:
            _check_layers(structure)
        elif structure is None and not _looks_like_one(name, module):
            continue
        elif structure is None and strict:
            what = (
                "convolves over space, where no token can be routed alone" if _convolves(module) else "is a feed-forward layer of unknown structure"
            )
            raise UserError(f"{KEY}: {name} ({type(module).__name__}) {what}; student.moe.leave: [{name}] leaves it dense")
        done |= {f"{name}.proj_mlp"} if structure is not None and structure.beside else {name}  # a single block holds attention too
        yield structure, name


# Names under which networks keep a feed-forward layer, or the first part of one inside a larger block.
_NAMES = {"ff", "ff_context", "ff_i", "ff_t", "ffn", "feed_forward", "img_mlp", "txt_mlp", "mlp", "mlp_context"}
_PARTS = {"proj_mlp", "to_qkv_mlp_proj", "up_proj"}


def _looks_like_one(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2]
    return last in _NAMES or (last in _PARTS and isinstance(module, nn.Linear)) or _convolves(module) or _kind(module) == "attention.FeedForward"


def _convolves(module: nn.Module) -> bool:
    return type(module).__name__ in ("GLUMBConv", "GLUMBTempConv", "GLUMBConvTemp")


# Class: values, gates ("" where there are none), the way back, activation. One layer that holds both has its gates first.
_NAMED: dict[str, tuple[str, str, str, Activation]] = {
    "transformer_z_image.FeedForward": ("w3", "w1", "w2", "swiglu"),
    "transformer_bria_fibo2.FeedForward": ("w3", "w1", "w2", "swiglu"),
    "transformer_hidream_image.HiDreamImageFeedForwardSwiGLU": ("w3", "w1", "w2", "swiglu"),
    "transformer_ideogram4.Ideogram4MLP": ("w3", "w1", "w2", "swiglu"),
    "attention.LuminaFeedForward": ("linear_3", "linear_1", "linear_2", "swiglu"),
    "auraflow_transformer_2d.AuraFlowFeedForward": ("linear_2", "linear_1", "out_projection", "swiglu"),
    "transformer_krea2.Krea2SwiGLU": ("up", "gate", "down", "swiglu"),
    "transformer_qwenimage21.QwenImage21SwiGLUFeedForward": ("proj", "gate_layer", "out", "swiglu"),
    "ace_step_transformer.AceStepMLP": ("up_proj", "gate_proj", "down_proj", "swiglu"),
    "transformer_ernie_image.ErnieImageFeedForward": ("up_proj", "gate_proj", "linear_fc2", "geglu"),
    "transformer_flux2.Flux2FeedForward": ("linear_in", "linear_in", "linear_out", "swiglu"),
    "transformer_flux3.Flux3FeedForward": ("linear_in", "linear_in", "linear_out", "swiglu"),
    "transformer_omnigen.OmniGenFeedForward": ("gate_up_proj", "gate_up_proj", "down_proj", "swiglu"),
    "transformer_kandinsky.Kandinsky5FeedForward": ("in_layer", "", "out_layer", "gelu"),
}
_SINGLE = {
    f"{name}SingleTransformerBlock" for name in ("Flux", "Bria", "BriaFibo", "Chroma", "HunyuanVideo", "HunyuanImage", "LongCatImage", "MotifVideo")
}
_SINGLE |= {"HunyuanVideoTokenReplaceSingleTransformerBlock"}


def _recognised(network: nn.Module, name: str, module: Any) -> Structure | None:
    kind = _kind(module)
    if kind == "attention.FeedForward":
        return _diffusers(network, name, module)
    if kind in _NAMED:
        value, gate, down, activation = _NAMED[kind]
        up = [getattr(module, value)] if gate in ("", value) else [getattr(module, value), getattr(module, gate)]
        return Structure(name, activation, tuple(up), getattr(module, down), _at(network, name), gates_first=gate == value)
    is_single = kind.rpartition(".")[2] in _SINGLE and isinstance(module.proj_mlp, nn.Linear)  # else it is split already
    return _single(name, module) if is_single else None


def _kind(module: nn.Module) -> str:
    """Module and class of what diffusers defines."""
    package, _, file = type(module).__module__.rpartition(".")
    return f"{file}.{type(module).__name__}" if package.startswith("diffusers.") else ""


def _diffusers(network: nn.Module, name: str, module: Any) -> Structure | None:
    """net is [activation with its linear layer, dropout, linear layer]; dropout, which networks in evaluation mode do not have, is not kept."""
    first = module.net[0]
    gelu: Activation = "gelu-approximate" if getattr(first, "approximate", "none") == "tanh" else "gelu"
    activations: dict[str, Activation] = {"GELU": gelu, "GEGLU": "geglu", "SwiGLU": "swiglu"}
    activation = activations.get(type(first).__name__)
    return None if activation is None else Structure(name, activation, (first.proj,), module.net[2], _at(network, name))


def _single(name: str, block: Any) -> Structure:
    attention = block.proj_out.in_features - block.proj_mlp.out_features

    def place(experts: nn.Module) -> None:
        block.proj_out = BesideAttention(block.proj_out, attention, experts)
        block.proj_mlp = block.act_mlp = nn.Identity()

    return Structure(name, "gelu-approximate", (block.proj_mlp,), block.proj_out, place, beside=attention)


def _at(network: nn.Module, name: str) -> Callable[[nn.Module], None]:
    return lambda module: network.set_submodule(name, module)


def _check_layers(structure: Structure) -> None:
    for layer in (*structure.up, structure.down):
        if type(layer) is not nn.Linear:
            raise UserError(
                f"{KEY}: {structure.name} holds a {type(layer).__name__}; merge adapters, and split before weights are held in another format"
            )
    outputs, inputs = sum(layer.out_features for layer in structure.up), (1 + is_gated(structure.activation)) * structure.hidden
    assert outputs == inputs, f"{structure.name}: {outputs} outputs for {structure.hidden} hidden neurons, {structure.activation}"


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part.detach() for part in parts if part is not None]
    return None if not tensors else tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _swapped(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.cat(x.chunk(2)[::-1])
