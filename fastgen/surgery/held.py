"""Frozen weights held in fewer bits than they compute in, so that a network fits beside what trains on it.

A layer that holds its weight writes it in a format (formats.py) once, and reads it in every forward pass, in the dtype that this pass
computes in: autocast's, else that of its input. So a held network is the ordinary network of the weights that were read, in the same
operators: adapters, hooks and forward-mode AD see nothing else, and in fp32 it is exact. What a graph keeps for the backward pass is how
to read the weight again, not the weight.

diffusers' layerwise casting and bitsandbytes' own layers are not used: the first keeps every weight in full until the backward pass, rounds
biases, and knows no scale; the second has no forward-mode AD where gradients are asked for, nor on CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.surgery.formats import FORMATS, Name

Quantised = Literal["fp8", "int8", "nf4"]


@dataclass(frozen=True)
class Storage:
    """How frozen weights are kept. dtype: of linear and convolution layers; auto: as they are where adapters share the network, else
    the dtype of autocast, if any, for every parameter. quantise: the format of those in the network's blocks instead."""

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    quantise: Quantised | None = None


AS_LOADED = Storage()


class Held:
    """What layers have in common that hold their weight; mixed into a subclass of the layer's class by `hold`."""

    _held: tuple[Name, torch.Size, torch.dtype]  # the format, and the shape and dtype that the weight had

    @property
    def weight(self) -> Tensor:
        """The weight in its own dtype, read anew. What looks only at its dtype or device, as diffusers and peft do, pays for reading it."""
        return self.read(self._held[2])

    def read(self, dtype: torch.dtype) -> Tensor:
        name, shape, _ = self._held
        return FORMATS[name].read(self._buffers, shape, dtype)  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        dtype = _compute_dtype(x)
        weight, bias = self.read(dtype), self.bias  # type: ignore[attr-defined]
        with _read_again(weight, partial(self.read, dtype)):
            return self.apply_weight(x, weight, None if bias is None else bias.to(dtype))

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise AssertionError("each kind of layer has its own")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`to`, `float` and their like: what is held moves, and keeps its dtype."""

        def moved(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(moved, recurse)  # type: ignore[misc]


class HeldLinear(Held, nn.Linear):
    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class HeldConv2d(Held, nn.Conv2d):
    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class HeldConv3d(Held, nn.Conv3d):
    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


_HOLDING: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: HeldLinear, nn.Conv2d: HeldConv2d, nn.Conv3d: HeldConv3d}


@torch.no_grad()
def hold(network: nn.Module, blocks: Iterable[nn.Module], storage: Storage, device: torch.device | None = None) -> None:
    """Have a frozen network's linear and convolution layers hold their weights, for good; blocks: those of its parts that are quantised.

    Norms, biases, tables and the layers outside blocks, which embed the time among others, are not quantised. device: where each weight is
    written and kept, so that a network that does not fit there whole need never be there.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in list(network.modules()):
        name = storage.quantise if storage.quantise and id(module) in inside else "bf16" if storage.dtype == "bf16" else None
        if name is not None and type(module) in _HOLDING:
            _hold(module, name, device)


def _hold(layer: Any, name: Name, device: torch.device | None) -> None:
    weight = layer.weight.detach()
    written = FORMATS[name].write(weight if device is None else weight.to(device))
    del layer._parameters["weight"]
    layer.__class__ = _HOLDING[type(layer)]
    layer._held = (name, weight.shape, weight.dtype)
    for key, value in written.items():
        layer.register_buffer(key, value)


def rounded_weights(network: nn.Module) -> dict[str, Tensor]:
    """What layers hold that was only rounded, by the names that the weights had: filled in place, it is held."""
    layers: list[tuple[str, Any]] = [(name, module) for name, module in network.named_modules() if isinstance(module, Held)]
    return {f"{name}.weight": layer.codes for name, layer in layers if layer._held[0] == "bf16"}


@torch.no_grad()
def release(network: nn.Module) -> None:
    """Ordinary layers again, with the weights that were read in them, in the dtype that they had."""
    layers: list[Any] = [module for module in network.modules() if isinstance(module, Held)]
    for layer in layers:
        weight = layer.weight
        layer._buffers.clear()  # the layer's own class has none
        layer.__class__ = next(plain for plain, held in _HOLDING.items() if type(layer) is held)
        layer.weight = nn.Parameter(weight, requires_grad=False)


def is_held(network: nn.Module) -> bool:
    """Whether a part of it holds its weight, so that nothing can be merged into the weights that it had."""
    return any(isinstance(module, Held) for module in network.modules())


def held_bytes(networks: Iterable[nn.Module]) -> int:
    """What layers of some networks take that hold their weights; each layer counts once."""
    layers = {id(module): module for network in networks for module in network.modules() if isinstance(module, Held)}
    return sum(buffer.numel() * buffer.element_size() for layer in layers.values() for buffer in layer._buffers.values() if buffer is not None)


def num_held(networks: Iterable[nn.Module]) -> int:
    """How many weights layers of some networks hold, which are not among their parameters; each layer counts once."""
    layers = {id(module): module for network in networks for module in network.modules() if isinstance(module, Held)}
    return sum(math.prod(layer._held[1]) for layer in layers.values())


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if x.dtype != torch.float64 and torch.is_autocast_enabled(kind) else x.dtype


@contextmanager
def _read_again(weight: Tensor, read: Callable[[], Tensor]) -> Iterator[None]:
    """Graphs that are built inside keep views of `weight` as how to make them from `read()`."""
    dtype, memory = weight.dtype, weight.untyped_storage().data_ptr()  # the graph keeps these functions too, so they must not know the weight

    def pack(saved: Tensor) -> Any:
        same = saved.dtype == dtype and saved.untyped_storage().data_ptr() == memory
        return (saved.shape, saved.stride(), saved.storage_offset()) if same else saved

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else read().as_strided(*kept)

    if not torch.is_grad_enabled():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
