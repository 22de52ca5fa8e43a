"""The passes through networks that a training step makes, each as it was made, so that it can be made again alone.

A pass is a call of a role's module, which is the only code that touches parameters, or of the decoder. What it costs is decided by what is
kept of it: the sizes of what goes in, whether a graph is built and for what, which inputs carry a tangent, and what a backward pass reached.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from fastgen import jvp
from fastgen.denoiser import Denoiser
from fastgen.jvp.lost import float_tensors
from fastgen.roles import Roles

T = TypeVar("T")
_ADDITIONS = ("heads", "inputs", "log_variance")


@dataclass(eq=False)
class Pass:
    """network: the role, or `decoder`. leaves: everything that went in, tensors without graph and tangent, and spec, how it was nested;
    moving: which of them required gradients; tangents: of those that had one; learning: the role's parameters that required gradients;
    graph: whether one was built; gradients: of the outputs that a backward pass reached, in the order of `float_tensors`."""

    network: str
    module: nn.Module
    leaves: list[Any]
    spec: Any
    moving: frozenset[int]
    tangents: dict[int, Tensor]
    learning: frozenset[str]
    graph: bool
    autocast: torch.dtype | None
    gradients: dict[int, Tensor] = field(default_factory=dict)

    @property
    def key(self) -> Hashable:
        """Equal for passes that do the same work."""
        given = tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves)
        return (
            self.network, given, self.moving, frozenset(self.tangents), self.learning, self.graph, self.autocast, frozenset(self.gradients),
        )  # fmt: skip

    @property
    def batch(self) -> int:
        return next(len(leaf) for leaf in self.leaves if isinstance(leaf, Tensor))

    @property
    def kind(self) -> str:
        """In words: `forward`, `tangent`, `forward, backward to weights and input`, ... and the dtype where it is not the role's own."""
        if self.tangents:
            return "tangent"
        parts = [name.partition(".")[0] for name in self.learning]
        to = [*dict.fromkeys(sorted(part if part in _ADDITIONS else "weights" for part in parts)), *["input"] * bool(self.moving)]
        graph = f", backward to {' and '.join(to)}" if self.gradients else f", graph to {' and '.join(to)}" if self.graph else ""
        return f"forward{graph}{' in fp32' if self.autocast is None and _has_autocast(self.module) else ''}"

    def run(self) -> tuple[list[Tensor], list[Any]]:
        """Make it again: its outputs (of a tangent: value and tangent), and what went in, with gradients where a backward pass made some."""
        with torch.set_grad_enabled(self.graph), _computing_in(self.module, self.autocast):
            if self.tangents:
                return list(self._tangent()), self.leaves
            leaves = [leaf.detach().requires_grad_() if i in self.moving else leaf for i, leaf in enumerate(self.leaves)]
            outputs = self._call(leaves)
        if self.gradients:
            torch.autograd.backward([outputs[i] for i in self.gradients], list(self.gradients.values()))
        return outputs, leaves

    def _tangent(self) -> tuple[Tensor, Tensor]:
        def network(*primals: Tensor) -> Tensor:
            given = dict(zip(self.tangents, primals, strict=True))
            return self._call([given.get(i, leaf) for i, leaf in enumerate(self.leaves)])[0]

        return jvp.tangent(network, [self.leaves[i] for i in self.tangents], list(self.tangents.values()))

    def _call(self, leaves: Sequence[Any]) -> list[Tensor]:
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return list(float_tensors(self.module(*args, **kwargs)))


def _has_autocast(module: nn.Module) -> bool:
    return isinstance(module, Denoiser) and module.autocast is not None


@contextmanager
def _computing_in(module: nn.Module, autocast: torch.dtype | None) -> Iterator[None]:
    """Some methods compute differences in the weights' own precision."""
    if not isinstance(module, Denoiser):
        yield
        return
    before, module.autocast = module.autocast, autocast
    try:
        yield
    finally:
        module.autocast = before


def recorded(step: Callable[[], T], roles: Roles, others: Mapping[str, nn.Module]) -> tuple[list[Pass], T]:
    """The passes of `step()` in their order, and its result; others: networks that are no roles, such as a decoder, by name."""
    made: list[Pass] = []
    with ExitStack() as hooks:
        for name, role in roles.items():
            note = partial(_note, made, name, role.parameters)
            hooks.callback(role.module.register_forward_hook(note, with_kwargs=True).remove)
        for name, module in others.items():
            hooks.callback(module.register_forward_hook(partial(_note, made, name, dict), with_kwargs=True).remove)
        result = step()
    return made, result


def _note(
    made: list[Pass], network: str, parameters: Callable[[], Mapping[str, nn.Parameter]], module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    """A forward hook: what went in, and on the outputs that are in a graph a hook that a backward pass sets off."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    duals = {i: forward_ad.unpack_dual(leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()}
    outputs = list(float_tensors(output))
    graph = any(x.requires_grad for x in outputs)
    one = Pass(
        network,
        module,
        [duals[i].primal.detach() if i in duals else leaf for i, leaf in enumerate(leaves)],
        spec,
        frozenset(i for i, dual in duals.items() if graph and dual.primal.requires_grad),
        {i: dual.tangent.detach() for i, dual in duals.items() if dual.tangent is not None},
        frozenset(name for name, parameter in parameters().items() if parameter.requires_grad) if graph else frozenset(),
        graph,
        module.autocast if isinstance(module, Denoiser) else None,
    )
    made.append(one)
    for i, x in enumerate(outputs):
        if x.requires_grad:
            x.register_hook(partial(one.gradients.__setitem__, i))


def grouped(made: Iterable[Pass]) -> list[tuple[Pass, int]]:
    """The first of each kind, and how often it was made."""
    kinds: dict[Hashable, list[Pass]] = {}
    for one in made:
        kinds.setdefault(one.key, []).append(one)
    return [(some[0], len(some)) for some in kinds.values()]


def arrange(one: Pass, roles: Roles) -> None:
    """Let exactly those parameters require gradients that did in this pass, and forget all gradients."""
    for name, role in roles.trained.items():
        for key, parameter in role.parameters().items():
            parameter.requires_grad_(name == one.network and key in one.learning)
            parameter.grad = None
