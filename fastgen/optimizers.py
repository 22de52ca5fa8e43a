"""One optimizer a role: how it is made, how its states are written and read again, and where they are between steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastgen import shards
from fastgen.config import OptimizerBlock
from fastgen.optional import check_package

# Of bitsandbytes' 8-bit states: tables that every parameter shares, and that making the states makes again.
_TABLES = ("qmap1", "qmap2")


def make_optimizer(block: OptimizerBlock, parameters: Sequence[torch.nn.Parameter]) -> Optimizer:
    """The optimizer of one role. Parameters of which processes hold parts have a group of their own, before those that are whole everywhere: one
    fused kernel does not take both, and a role's own order is the same."""
    groups = [part for sharded in (True, False) if (part := [p for p in parameters if shards.is_sharded(p) == sharded])]
    assert [id(p) for part in groups for p in part] == [id(p) for p in parameters], "a role's network comes before its additions"
    if block.name == "sgd":
        return torch.optim.SGD(_grouped(groups), lr=block.lr, momentum=block.betas[0], weight_decay=block.weight_decay)
    settings: dict[str, Any] = {"lr": block.lr, "betas": block.betas, "eps": block.eps, "weight_decay": block.weight_decay}
    if block.name == "adamw8bit":
        import bitsandbytes  # type: ignore[import-not-found]

        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[block.name]
    return kind(_grouped(groups), **settings, fused=True)


def _grouped(groups: Sequence[Sequence[torch.nn.Parameter]]) -> list[dict[str, Any]]:
    return [{"params": list(group)} for group in groups]


def check_optimizer(block: OptimizerBlock, key: str) -> None:
    """UserError where an optimizer needs a package that is not here; key: the recipe's, of its block."""
    if block.name == "adamw8bit":
        check_package("bitsandbytes", f"recipe key {key}.name: adamw8bit")


@contextmanager
def states_on(optimizer: Optimizer, device: torch.device) -> Iterator[None]:
    """States that are kept on the CPU are on `device` inside."""
    move_states(optimizer, device)
    try:
        yield
    finally:
        move_states(optimizer, torch.device("cpu"))


def move_states(optimizer: Optimizer, device: torch.device) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = shards.moved(value, device)


def state_tensors(optimizer: Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """Flat names `parameter/state`; names: of the parameters, in the optimizer's order. Numbers become tensors. States stand in one order, that of
    their names, for which process writes what depends on it: a loaded optimizer has them in another than a new one."""
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in zip(names, _parameters(optimizer), strict=True)}
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, state in states.items()
        for key, value in sorted(state.items())
        if value is not None and key not in _TABLES
    }


def load_states(role: str, optimizer: Optimizer, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """What `state_tensors` gave. Strict, as `Optimizer.load_state_dict` is not: ValueError, which says the role, unless every tensor is a number
    or shaped like its parameter (of 8-bit states: as that optimizer makes them), and every parameter that has any has the same kinds (an
    unused one has none)."""
    parameters, indices = _parameters(optimizer), {name: index for index, name in enumerate(names)}
    states: dict[int, dict[str, Tensor]] = {}
    for flat, value in tensors.items():
        name, _, key = flat.rpartition("/")
        if name not in indices:
            raise _mismatch(role, f"{flat} is {tuple(value.shape)}")
        states.setdefault(indices[name], {})[key] = value
    if type(optimizer).__module__.startswith("bitsandbytes."):
        _load_8bit(role, optimizer, states, names)
        return
    kinds = {key for state in states.values() for key in state}
    for index, state in states.items():
        _check_shapes(role, names[index], state, dict.fromkeys(kinds, parameters[index].shape))
    optimizer.load_state_dict({"state": dict(sorted(states.items())), "param_groups": optimizer.state_dict()["param_groups"]})


def _load_8bit(role: str, optimizer: Any, states: Mapping[int, Mapping[str, Tensor]], names: Sequence[str]) -> None:
    """Into states as the optimizer itself makes them."""
    for index, parameter in enumerate(_parameters(optimizer)):
        optimizer.state.pop(parameter, None)
        if (saved := states.get(index)) is not None:
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
            own = optimizer.state[parameter]
            _check_shapes(role, names[index], saved, {key: torch.as_tensor(value).shape for key, value in own.items() if key not in _TABLES})
            for key, value in saved.items():
                own[key] = own[key].copy_(value) if isinstance(own[key], Tensor) else value.item()


def _check_shapes(role: str, name: str, state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    if state.keys() != shapes.keys():
        raise _mismatch(role, f"parameter {name} lacks or has {sorted(state.keys() ^ shapes.keys())}")
    for key, value in state.items():
        if value.ndim and value.shape != shapes[key]:
            raise _mismatch(role, f"{name}/{key} is {tuple(value.shape)}")


def _mismatch(role: str, what: str) -> ValueError:
    return ValueError(f"optimizer of role {role!r} does not match: {what}")


def _parameters(optimizer: Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
