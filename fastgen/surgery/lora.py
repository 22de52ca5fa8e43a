"""LoRA adapters (Hu et al. 2022) on one shared, frozen backbone, through peft.

Switching an adapter must not touch `requires_grad`: peft's own `set_adapter` freezes the adapters it deactivates, and a graph
that still has to run backward then drops their gradients without an error. Here every trained adapter keeps `requires_grad`
and only the activation changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.rng import seeded
from fastgen.surgery.moe.inside import stand_ins


def add_adapter(
    backbone: nn.Module, name: str, *, rank: int, alpha: float, targets: Sequence[str], seed: int = 0, device: torch.device | None = None
) -> None:
    """Add adapter `name` (A random from the seed, B = 0, so it starts as the identity) to every linear layer whose name ends in one
    of `targets`, or that is attention's part of a layer of that name of which experts took the rest. Adapters of one seed start with the same A, so
    that averages of their factors are near averages of their products. device: where it is made on layers that have no weights yet; by default it
    has none either."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [key for key, module in backbone.named_modules() if isinstance(module, (nn.Linear, BaseTunerLayer))]
    ends = [*targets, *(f"{target}.attention" for target in targets)]
    if not any(f".{key}".endswith(f".{end}") for key in layers for end in ends):
        raise UserError(
            f"recipe key student.tune.lora.targets: {list(targets)} matches no linear layer; give auto, or ends of names such as {layers[-1]!r}"
        )
    scale: Any = alpha  # peft takes fractions too, whatever its annotation says
    parts = {key: part for key, part in stand_ins(backbone).items() if any(f".{key}".endswith(f".{target}") for target in targets)}
    names, left = [*targets, *(part for part in parts.values() if part)], list(parts) or None
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=names, exclude_modules=left, lora_dropout=0.0)
    with warnings.catch_warnings(), seeded(seed, "adapter"), _stand_ins(backbone, device):
        # Several adapters on one backbone are the design; peft warns from the second on.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, backbone, adapter_name=name)
    for parameter in parameters(backbone, name).values():  # peft takes the base's dtype, which may be half precision
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


@contextmanager
def _stand_ins(backbone: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Where peft looks for the device and dtype of weights that are not there, some of no size worth mentioning lie on `device` meanwhile."""
    missing = [(module, module.weight) for module in backbone.modules() if isinstance(module, nn.Linear) and module.weight.is_meta]
    if device is None or device.type == "meta":
        missing = []
    for module, weight in missing:
        module.weight = nn.Parameter(torch.zeros((), dtype=weight.dtype, device=device).expand(weight.shape), requires_grad=False)
    try:
        yield
    finally:
        for module, weight in missing:
            module.weight = weight


def remove_adapter(backbone: nn.Module, name: str) -> None:
    """Delete adapter `name`; the others stay as they are."""
    for layer in _lora_layers(backbone):
        layer._active_adapter = []  # peft would activate another one in its place, which freezes the rest
        layer.delete_adapter(name)
    backbone.peft_config.pop(name)  # type: ignore[union-attr, operator]


def activate(backbone: nn.Module, name: str | None) -> None:
    """Run with adapter `name`, or with the bare base weights for None; does nothing to a backbone without adapters."""
    for layer in _lora_layers(backbone):
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]


def remembered(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """What opens a context in which `module`, a part of a network, runs as it does at this call, whatever adapter has been activated since."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    then = [(layer._disable_adapters, layer._active_adapter) for layer in layers]

    @contextmanager
    def again() -> Iterator[None]:
        now = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
        try:
            _set(layers, then)
            yield
        finally:
            _set(layers, now)

    return again


def _set(layers: Sequence[Any], states: Sequence[tuple[bool, Any]]) -> None:
    for layer, (disabled, active) in zip(layers, states, strict=True):
        layer._disable_adapters, layer._active_adapter = disabled, active


def parameters(backbone: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's own parameters by their full names."""
    return {key: value for key, value in backbone.named_parameters() if f".{name}." in key and is_factor(key)}


def is_factor(key: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return "lora_" in key


def base_name(key: str) -> str:
    """The name that a parameter of a backbone has without adapters."""
    return key.replace(".base_layer.", ".")


def own_name(key: str, name: str | None) -> str:
    """The name of a parameter without its adapter's, the same for the same place in every adapter."""
    return key if name is None else key.replace(f".{name}.", ".")


def exported(backbone: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter's factors in peft's key format and its config, as diffusers' `save_lora_weights` takes them: copies, scaled so that
    alpha equals the rank.

    A file keeps alpha in its header alone, which is lost on whoever loads its tensors; the scale 1 of alpha = rank is what every
    reader assumes of a file that says nothing. So alpha / rank goes into B, with one rounding, or none for a power of two.
    """
    from peft import get_peft_model_state_dict

    network: Any = backbone
    config = network.peft_config[name]
    assert not (config.use_rslora or config.use_dora or config.rank_pattern or config.alpha_pattern), "the scale is not alpha / rank"
    factors = get_peft_model_state_dict(backbone, adapter_name=name)
    scaled = {key: (value.double() * (config.lora_alpha / config.r if "lora_B" in key else 1.0)).to(value.dtype) for key, value in factors.items()}
    return scaled, config.to_dict() | {"lora_alpha": config.r}


def merge(backbone: nn.Module, name: str) -> None:
    """Fold adapter `name` into the base weights and remove every adapter, leaving the plain architecture."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in _lora_layers(backbone):
        layer.merge(adapter_names=[name])
    for key, module in list(backbone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent = backbone.get_submodule(key.rpartition(".")[0])
            setattr(parent, key.rpartition(".")[2], module.get_base_layer())
    if hasattr(backbone, "peft_config"):  # peft leaves its mark on the module; without adapters it is no longer true
        del backbone.peft_config


def merge_into(network: nn.Module, backbone: nn.Module, name: str) -> None:
    """Add adapter `name` of `backbone` to the weights of `network`, the plain architecture from which it was made; `backbone` stays as it is."""
    adapted = _lora_layers(backbone)
    for key, layer in backbone.named_modules():
        if layer in adapted:
            weight = network.get_submodule(key).weight
            assert isinstance(weight, nn.Parameter)
            weight.data += layer.get_delta_weight(name).to(weight)  # type: ignore[operator, union-attr]


def _lora_layers(backbone: nn.Module) -> list:
    if not hasattr(backbone, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]
