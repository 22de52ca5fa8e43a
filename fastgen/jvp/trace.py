"""At which layer does a tangent go wrong? Every submodule's inputs and results, exact and by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.jvp.differences import Network, Tangents, moved
from fastgen.jvp.lost import describe, float_tensors
from fastgen.tf32 import no_tf32

# Derivatives below this share of value / step are not resolved by fp32 differences; a derivative of zero is never larger.
RESOLUTION = 1e-5


def relative(exact: Tensor, reference: Tensor, floor: float) -> float:
    """|exact - reference| over the larger norm: 1 where one of them is zero, unless the other is below the floor."""
    difference = float((exact.double() - reference.double()).norm())
    size = max(float(exact.double().norm()), float(reference.double().norm()), floor)
    return difference / size if math.isfinite(difference) and size > 0 else 0.0 if size == 0 else math.inf


class Trace:
    """The tensors that enter and leave every submodule call, in order of execution: at which layer does the tangent go wrong?"""

    def __init__(self, module: nn.Module | None) -> None:
        self.modules = {} if module is None else dict(module.named_modules())
        self.running: list[str] = []  # submodules under execution, innermost last
        self.events: list[tuple[str | None, list[Tensor]]] = []  # which submodule made these tensors, up to 2,048 elements of each

    @contextmanager
    def recording(self, read: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Record `read` of every tensor; None stands for zeros."""
        self.running, self.events = [], []
        with ExitStack() as hooks:
            for name, module in self.modules.items():
                hooks.callback(module.register_forward_pre_hook(partial(self._enter, name, read), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(partial(self._leave, name, read)).remove)
            yield

    def _enter(self, name: str, read: Callable, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self._keep(self.running[-1] if self.running else None, (args, kwargs), read)
        self.running.append(name)

    def _leave(self, name: str, read: Callable, _module: nn.Module, _inputs: Any, out: Any) -> None:
        self._keep(name, out, read)
        self.running.pop()

    def _keep(self, maker: str | None, values: Any, read: Callable[[Tensor], Tensor | None]) -> None:
        read_values = [(x, read(x)) for x in float_tensors(values) if not x.is_complex()]
        samples = [(torch.zeros_like(x) if value is None else value).detach().flatten() for x, value in read_values]
        self.events.append((maker, [sample[:: max(1, len(sample) // 1024)].double().cpu() for sample in samples]))

    def first_wrong(self, fn: Network, primals: Sequence[Tensor], tangents: Tangents, steps: Sequence[float]) -> str | None:
        """The submodule that made the first tensor whose recorded tangent is off by 5 % of its finite difference at every step."""
        exact, passes = self.events, []
        for step in steps:
            for signed in (step, -step):
                with torch.no_grad(), no_tf32(), self.recording(lambda x: x):
                    fn(*moved(primals, tangents, signed))
                passes.append(self.events)
        for i, (maker, values) in enumerate(exact):
            for j, value in enumerate(values):
                pairs = [(step, passes[2 * k][i][1][j], passes[2 * k + 1][i][1][j]) for k, step in enumerate(steps)]
                floor = RESOLUTION * float(pairs[-1][1].norm()) / steps[-1]
                if min(relative(value, (up - down) / (2 * step), floor) for step, up, down in pairs) > 0.05:
                    return maker
        return None

    def layer(self, name: str) -> str:
        return describe(self.modules[""], self.modules[name])
