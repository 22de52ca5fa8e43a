"""Exponential moving average of a role's parameters, in fp32 whatever the parameters' dtype (a bf16 average never moves), and of their parts
where processes hold parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen import shards


class EMA:
    """shadow <- d shadow + (1 - d) parameter, with d = min(decay, (1 + n)/(10 + n)) after n updates; decay in [0, 1). device: where the
    shadow lies, the CPU, or `same` for its parameter's."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, device: Literal["same", "cpu"] = "same") -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self._parameters = dict(parameters)
        # clone, not deepcopy: a sharded parameter gives its own shard
        self.shadow = {name: _apart(parameter, device) for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self._parameters.items():
            shadow = shards.own(self.shadow[name])
            shadow.lerp_(shards.own(parameter).to(shadow), 1 - decay)
        self.updates += 1

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Run with the averaged weights in place of the parameters; the parameters come back, bit for bit, also after an error."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                shards.assign(parameter, self.shadow[name])
            yield
        finally:
            for name, parameter in self._parameters.items():
                shards.assign(parameter, kept[name])

    @torch.no_grad()
    def settle(self) -> None:
        """Make the average the parameters' own value, for good."""
        for name, parameter in self._parameters.items():
            shards.assign(parameter, self.shadow[name])

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.shadow, "updates": torch.tensor(self.updates)}

    def check_shapes(self, shapes: Mapping[str, torch.Size]) -> None:
        """ValueError unless a state of these shapes is one of exactly these parameters."""
        differing = shapes.keys() ^ {*self.shadow, "updates"}
        differing |= {name for name in self.shadow.keys() & shapes.keys() if self.shadow[name].shape != shapes[name]}
        if differing:
            raise ValueError(f"averaged weights do not match: {sorted(differing)[:4]} …")

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Strict, as `check_shapes` is."""
        self.check_shapes({name: value.shape for name, value in state.items()})
        self.updates = int(state["updates"])
        for name, shadow in self.shadow.items():
            shards.assign(shadow, state[name])


def _apart(parameter: nn.Parameter, device: Literal["same", "cpu"]) -> Tensor:
    """A copy in fp32."""
    copy = parameter.detach().clone()
    return shards.moved(copy, shards.own(copy).device if device == "same" else device, torch.float32)


class Averages(dict[str, EMA]):
    """The averages of a run by role."""

    def settle(self) -> None:
        """Make every average its role's weights, for good."""
        for average in self.values():
            average.settle()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run with every averaged role's average in place of its weights."""
        with ExitStack() as stack:
            for average in self.values():
                stack.enter_context(average.applied())
            yield
