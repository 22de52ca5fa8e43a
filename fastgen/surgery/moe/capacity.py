"""Experts whose number a token uses follows the time: the capacity schedule of expert choice (arXiv:2604.01622) for continuous time.

    k(t) = at_data + (at_noise - at_data) (s - data) / (noise - data),   s: the time as the network itself is told it

which is linear between its two ends. The paper's own, of masked text, is largest where least is masked; which end of an image's gains is to be
measured on each network. A network reads its own time, so that whoever calls it needs to know nothing of this.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.surgery.moe.layer import expert_layers

KEY = "recipe key student.moe.capacity"
ARGUMENTS = ("timestep", "timesteps", "t")  # as diffusers' networks call their time


@dataclass(frozen=True)
class Capacity:
    """at_noise, at_data: experts that a token uses on average at either end. argument: the network's argument that says the time; noise, data:
    what it is at either end."""

    at_noise: float
    at_data: float
    argument: str
    noise: float
    data: float

    def active(self, time: Tensor) -> float | list[float]:
        """Of samples at times (B,), or (B, ...) where a sample has several, of which the mean counts; one number where all have the same.

        Rounded, so that a time of another precision comes to the same number of tokens.
        """
        times = time.detach().double().reshape(len(time), -1).mean(1) if time.ndim else time.detach().double()[None]
        share = [(value - self.data) / (self.noise - self.data) for value in times.tolist()]
        each = [round(self.at_data + (self.at_noise - self.at_data) * min(1.0, max(0.0, s)), 4) for s in share]
        return each[0] if len(set(each)) == 1 else each


class _Seen(Exception):
    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def told(network: nn.Module, call: Callable[[Tensor], Any], ends: tuple[float, float]) -> tuple[str, float, float]:
    """By which argument a network is told the time, and what that is at the path times `ends`; call: calls the network at a path time (1,), fp64,
    no further than to its own forward, so a network of the meta device will do. UserError for one that is not told."""

    def see(module: Any, args: Any, kwargs: Any) -> None:
        raise _Seen(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    found: list[tuple[str, float]] = []
    for end in ends:
        handle = network.register_forward_pre_hook(see, with_kwargs=True, prepend=True)
        try:
            call(torch.tensor([end], dtype=torch.float64))
        except _Seen as seen:
            named = [(name, value) for name in ARGUMENTS if isinstance(value := seen.arguments.get(name), Tensor)]
            found += [(name, float(value.double().mean())) for name, value in named[:1]]
        finally:
            handle.remove()
    if len(found) < 2 or found[0][1] == found[1][1] or not all(math.isfinite(value) for _, value in found):
        raise UserError(f"{KEY}: {type(network).__name__} is not told the time by any of {', '.join(ARGUMENTS)}; remove it")
    return found[0][0], found[0][1], found[1][1]


def follow(network: nn.Module, capacity: Capacity) -> None:
    """Have a network's experts take as many tokens as its time says, from now on, copies of the network too. `set_active` and `using` end it."""
    for layer in expert_layers(network):
        layer.capacity = capacity
    network.register_forward_pre_hook(_before, with_kwargs=True)
    network.register_forward_hook(_after, always_call=True)


def capacity_of(network: nn.Module) -> Capacity | None:
    """What a network's experts follow, if anything."""
    return next((layer.capacity for layer in expert_layers(network)), None)


def _before(network: Any, args: Any, kwargs: Any) -> None:
    """Waits for the device, once a pass."""
    capacity = capacity_of(network)
    if capacity is None:
        return
    time = inspect.signature(network.forward).bind(*args, **kwargs).arguments[capacity.argument]
    active = None if time.is_meta else capacity.active(time)  # on meta, where costs are counted, the mean
    for layer in expert_layers(network):
        layer.now = active


def _after(network: Any, _args: Any, _output: Any) -> None:
    for layer in expert_layers(network):
        layer.now = None
