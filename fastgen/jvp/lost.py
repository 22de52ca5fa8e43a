"""Tangents that an operator drops without a word: `detach()`, `.data`, a `torch.library.custom_op`, a way through NumPy.

What such an operator returns is followed to the network's output. Only there is it an error: a detached copy for a log is none. Derivatives
that are zero (comparisons, integers, `zeros_like`, `round`) are no losses. Not followed are numbers (`item()`, `tolist()`) and memory that is
filled outside PyTorch by its address; `check_tangent` finds those.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

from fastgen.errors import UserError

ADVICE = (
    "It runs an operator that forward AD cannot follow: replace that by PyTorch operators, or set recipe key distiller.tangent to finite_difference"
)

# Results without a tangent whose derivative is zero. (PyTorch itself gives `round`, `sign` and their like a tangent of zeros.)
_CONSTANT = {f"{name}_like" for name in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")}
_CONSTANT |= {f"new_{name}" for name in ("zeros", "ones", "full", "empty", "empty_strided")} | {"empty_strided", "histc", "copysign"}
# Explicit work on duals, which is not ours to judge; and several results, each of which depends on one input.
_CONSTANT |= {"_unpack_dual", "_make_dual", "broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d"}
# Of which arguments the values count, where others give no more than dtype, device or shape.
_VALUES = dict.fromkeys(("to", "type_as", "expand_as", "view_as", "reshape_as"), slice(1)) | {"new_tensor": slice(1, None)}
_LEAVES_PYTORCH = {"numpy", "__array__"}

# Outermost modules that have been watched through a whole pass: looking at every operator of every pass would take a third more time.
_innocent: WeakSet[nn.Module] = WeakSet()


class Loss(NamedTuple):
    """operator: its name; running: the modules under execution, outermost first."""

    operator: str
    running: tuple[nn.Module, ...]

    def __str__(self) -> str:
        if not self.running:
            return f"{self.operator} in the function drops a tangent"
        return f"{self.operator} drops a tangent in {describe(self.running[0], self.running[-1])}"


def describe(network: nn.Module, layer: nn.Module) -> str:
    name = next((name for name, module in network.named_modules() if module is layer), "")
    return f"layer {name or '(the whole network)'} of type {type(layer).__name__}"


class LostTangents:
    """One pass. looking: whether the next operator is of interest."""

    def __init__(self, *, always: bool) -> None:
        self.always, self.looking = always, True
        self.running: list[nn.Module] = []
        self.watched: list[nn.Module] = []
        self.lost = WeakTensorKeyDictionary()  # tensors that depend on a lost tangent, and which
        self.left: Loss | None = None  # what went where it cannot be followed

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, look at operators outside modules and at those of outermost modules that no whole pass has been watched of."""
        handles = register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        _innocent.update(self.watched)

    def _enter(self, module: nn.Module, _inputs: Any) -> None:
        if not self.running:
            self.looking = self.always or module not in _innocent
            if module not in _innocent and any(part._compiled_call_impl is not None for part in module.modules()):
                warnings.warn("exact tangents run through compiled blocks uncompiled, which takes longer", stacklevel=2)
        self.running.append(module)

    def _leave(self, module: nn.Module, _inputs: Any, _out: Any) -> None:
        if not self.running or self.running[-1] is not module:  # another hook raised before _enter
            return
        self.running.pop()
        if not self.running:
            self.watched.append(module)
            self.looking = True

    def look(self, func: Any, inputs: Any, out: Any) -> None:
        """Mark what `func` returned or wrote, if its inputs moved or were marked and it did not pass the tangent on."""
        name = getattr(func, "__name__", "")
        if name in _CONSTANT:
            return
        given = list(float_tensors(inputs[0][_VALUES[name]] if name in _VALUES else inputs))
        loss = next((self.lost[x] for x in given if x in self.lost), None)
        if name in _LEAVES_PYTORCH and (loss or any(map(_moves, given))):
            self.left = self.left or loss or self._loss(func)
        for x in float_tensors(inputs[0][:1] if name == "__setitem__" else out):
            if loss is not None:
                self.lost[x] = loss
            elif not _moves(x) and any(map(_moves, given)):
                self.lost[x] = self._loss(func)

    def _loss(self, func: Any) -> Loss:
        return Loss(resolve_name(func) or getattr(func, "__name__", str(func)), tuple(self.running))

    def refuse(self, out: Tensor) -> None:
        """UserError where `out` depends on a lost tangent; it names the operator and the layer."""
        loss = self.left or self.lost.get(out)
        if loss is not None:
            raise UserError(f"no exact tangent: {loss}. {ADVICE}")


def _moves(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def float_tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.is_floating_point() or values.is_complex():
            yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from float_tensors(value)
    elif isinstance(values, dict):
        yield from float_tensors(list(values.values()))
