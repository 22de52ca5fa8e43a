"""Finds the feed-forward layers of a network that somebody else wrote, and says how their weights lie.

Three structures: diffusers' `FeedForward`, and sequences of a linear layer, an activation and another linear layer; named classes that are a layer
with values and gates; and named blocks that hold such a layer, beside attention or fused with it, and whose own code stays (inside.py). layouts.py
names them. Others are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from fastgen_kernels.moe_ffn import Activation, is_gated
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.surgery.moe.inside import AboveTokens, Inside
from fastgen.surgery.moe.layouts import BLOCKS, LAYERS, BlockLayout, Layout

KEY = "recipe key student.moe"


class Dense(NamedTuple):
    """w1: (H, D), gated (2H, D), values above gates; b1: (H,) or (2H,); w2: (D', H); b2: (D',)."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None


@dataclass(frozen=True)
class Structure:
    """One feed-forward layer. name: of the module that is replaced, in the network, or of the block that it lies in; up: linear layers whose
    outputs, one under the other, are values and then gates, or, with gates_first, one layer the other way round; down: the layer whose last `hidden`
    inputs are the hidden activations; place: puts another module, which maps tokens (…, D) to (…, D'), where this layer was; inside: how it lies
    in its block, None where it is a module of its own."""

    name: str
    activation: Activation
    up: tuple[nn.Linear, ...]
    down: nn.Linear
    place: Callable[[nn.Module], None]
    gates_first: bool = False
    inside: Inside | None = None

    @property
    def beside(self) -> int:
        """How many inputs of `down` come first and are attention's; its bias is attention's then."""
        return self.inside.beside if self.inside else 0

    @property
    def above(self) -> int:
        """How many outputs of the one layer `up` come first and are attention's."""
        return self.inside.above if self.inside else 0

    @property
    def hidden(self) -> int:
        return self.down.in_features - self.beside

    def dense(self) -> Dense:
        """The layer's weights, detached; views where nothing has to be joined."""
        w1, b1 = _joined([layer.weight for layer in self.up]), _joined([layer.bias for layer in self.up])
        assert w1 is not None
        w1, b1 = w1[self.above :], None if b1 is None else b1[self.above :]
        if self.gates_first:
            w1, b1 = _swapped(w1), _swapped(b1)
        assert w1 is not None
        return Dense(w1, b1, self.down.weight.detach()[:, self.beside :], None if self.beside or self.down.bias is None else self.down.bias.detach())

    def parts(self) -> list[str]:
        """Names of what the layer is: its own, or those of the block's layers that it is made of."""
        return [self.name] if self.inside is None else [f"{self.name}.{part}" for part in (*self.inside.up, self.inside.act, self.inside.down)]


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
        structure = _recognised(network, name, module)
        parts = [name] if structure is None else structure.parts()
        if any(f".{part}".endswith(f".{end}") for part in (name, *parts) for end in leave):
            done |= {name} if any(f".{name}".endswith(f".{end}") for end in leave) else set(parts)
            continue
        if structure is not None and strict:
            _check_layers(structure)
        elif structure is None and not _looks_like_one(name, module):
            continue
        elif structure is None and strict:
            what = (
                "convolves over space, where no token can be routed alone" if _convolves(module) else "is a feed-forward layer of unknown structure"
            )
            raise UserError(f"{KEY}: {name} ({type(module).__name__}) {what}; student.moe.leave: [{name}] leaves it dense")
        done |= set(parts)  # a block that holds a layer holds attention too
        yield structure, name


# Names under which networks keep a feed-forward layer, or the first part of one inside a larger block.
_NAMES = {"ff", "ff_context", "ff_i", "ff_t", "ffn", "feed_forward", "img_mlp", "txt_mlp", "mlp", "mlp_context", "transition", "transition_out"}
_PARTS = {"proj_mlp", "to_qkv_mlp_proj", "up_proj", "ff_in"}


def _looks_like_one(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2]
    return last in _NAMES or (last in _PARTS and isinstance(module, nn.Linear)) or _convolves(module) or _kind(module) == "attention.FeedForward"


def _convolves(module: nn.Module) -> bool:
    return type(module).__name__ in ("GLUMBConv", "GLUMBTempConv", "GLUMBConvTemp")


def _recognised(network: nn.Module, name: str, module: Any) -> Structure | None:
    kind = _kind(module)
    if kind == "attention.FeedForward":
        return _diffusers(network, name, module)
    if kind in LAYERS:
        return _whole(network, name, module, LAYERS[kind])
    if kind in BLOCKS:
        return _inside(name, module, BLOCKS[kind])
    return _sequence(network, name, module) if type(module) is nn.Sequential and name.rpartition(".")[2] in _NAMES else None


def _kind(module: nn.Module) -> str:
    """Module and class of what diffusers defines."""
    package, _, file = type(module).__module__.rpartition(".")
    return f"{file}.{type(module).__name__}" if package.startswith("diffusers.") else ""


def _diffusers(network: nn.Module, name: str, module: Any) -> Structure | None:
    """net is [activation with its linear layer, dropout, linear layer]; dropout, which networks in evaluation mode do not have, is not kept."""
    first = module.net[0]
    gelu: Activation = "gelu-approximate" if getattr(first, "approximate", "none") == "tanh" else "gelu"
    activations: dict[str, Activation] = {"GELU": gelu, "GEGLU": "geglu", "SwiGLU": "swiglu"}
    if type(getattr(first, "activation", None)) is nn.SiLU:
        activations["LinearActivation"] = "silu"
    activation = activations.get(type(first).__name__)
    return None if activation is None else Structure(name, activation, (first.proj,), module.net[2], _at(network, name))


def _sequence(network: nn.Module, name: str, module: nn.Sequential) -> Structure | None:
    """A linear layer, GELU and another linear layer, whatever dropout is between."""
    layers: list[Any] = [layer for layer in module if not isinstance(layer, nn.Dropout)]
    if [type(layer) for layer in layers[1:2]] != [nn.GELU] or len(layers) != 3:
        return None
    activation: Activation = "gelu-approximate" if layers[1].approximate == "tanh" else "gelu"
    return Structure(name, activation, (layers[0],), layers[2], _at(network, name))


def _whole(network: nn.Module, name: str, module: nn.Module, layout: Layout) -> Structure | None:
    names = {key for key, _ in module.named_modules()}
    if not names.issuperset((*layout.up, layout.down)):  # a class that leaves gates out where its configuration says so
        return None
    up: Any = tuple(module.get_submodule(key) for key in layout.up)
    down: Any = module.get_submodule(layout.down)
    return Structure(name, layout.activation, up, down, _at(network, name), layout.gates_first)


def _inside(name: str, block: Any, layout: BlockLayout) -> Structure | None:
    """Of attention are what inputs `down` has beyond the hidden neurons, and what outputs `up` has beyond values and gates."""
    up: Any = tuple(block.get_submodule(key) for key in layout.up)
    if any(isinstance(layer, (nn.Identity, AboveTokens)) for layer in up):  # it is split already
        return None
    down = block.get_submodule(layout.down)
    per_neuron = 1 + is_gated(layout.activation)
    outputs = sum(layer.out_features for layer in up)
    hidden = getattr(block, layout.hidden) if layout.hidden else outputs // per_neuron
    inside = Inside(
        layout.up, layout.act, layout.down, down.in_features - hidden, outputs - per_neuron * hidden, 1 + layout.splits, layout.multiplies,
        {layout.hidden: up[0].in_features, **dict.fromkeys(layout.others, 1)} if layout.hidden else {},
    )  # fmt: skip
    return Structure(name, layout.activation, up, down, partial(inside.put, block), layout.gates_first, inside)


def _at(network: nn.Module, name: str) -> Callable[[nn.Module], None]:
    return lambda module: network.set_submodule(name, module)


def _check_layers(structure: Structure) -> None:
    for layer in (*structure.up, structure.down):
        if type(layer) is not nn.Linear:
            raise UserError(
                f"{KEY}: {structure.name} holds a {type(layer).__name__}; merge adapters, and split before weights are held in another format"
            )
    outputs = sum(layer.out_features for layer in structure.up) - structure.above
    assert outputs == (1 + is_gated(structure.activation)) * structure.hidden, (
        f"{structure.name}: {outputs} outputs for {structure.hidden} hidden neurons, {structure.activation}"
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part.detach() for part in parts if part is not None]
    return None if not tensors else tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _swapped(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.cat(x.chunk(2)[::-1])
