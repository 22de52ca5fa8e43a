"""What a training step holds for a moment: activations, gradients and whatever else comes and goes, measured without memory and without weights.

The step is really taken, by the method's own terms, on tensors that have shapes and no content (PyTorch's fake tensors), while every storage that
is made is counted until it is freed. Only noise, times and conditioning have numbers, so that what is decided by them is decided as in training.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgen.conditioning import Conditioning
from fastgen.data.training import Batch, PairBatch
from fastgen.distillers.base import MethodConfig
from fastgen.plan import Plan
from fastgen.rng import SampleRng
from fastgen.roles import Roles, build_roles
from fastgen.surgery.precision import narrow
from fastgen.surgery.second_time import Defaults


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are made inside, while they live; `peak` is the most at one time. there: tensors that are no news."""

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.now += (size := storage.nbytes())
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, size)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def step_bytes(planned: Plan, step: int) -> int:
    """The most that a student step holds at one time beside what it holds all along: of its updates, the one that needs most, at the largest of
    several sizes. Gradients are among it, but where processes keep parts of networks: there a block's are gone, but for this process's part, when
    the next block's come."""
    recipe, place, cut = planned.recipe, planned.largest, planned.cut
    family, size = planned.families[place], planned.at_once
    micro_batches = -(-recipe.train.batch_size // planned.processes // size)
    cond = _filled(family.meta_conditioning(size))
    setting = planned.setting({key: value[:1] for key, value in cond.items()}, place=place)
    defaults = Defaults.on(setting.path, setting.grid, setting.guidance)
    network = family.load_backbone(meta=True)
    kept_narrow = planned.storage.dtype == "bf16" or planned.storage.quantise is not None
    if planned.tuning is not None and planned.autocast is not None and kept_narrow:
        narrow(network, torch.bfloat16)  # of which a graph keeps no copies, as of weights that layers hold (surgery/held.py)
    roles = build_roles(
        planned.roles,
        family,
        network,
        **planned.student,
        autocast=planned.autocast,
        defaults=defaults,
        recompute=recipe.train.checkpointing,
    )
    if cut is not None and cut.compute is not None:  # as they are gathered, and a graph keeps no other copies of them
        for role in roles.values():
            narrow(role.denoiser.backbone, cut.compute)
    there = _without_content(roles)
    if cut is not None:
        for role in roles.values():
            for parameter in role.parameters().values():
                parameter.register_post_accumulate_grad_hook(_dropped)
    distiller: Any = planned.method(_without_pixels(planned.method_config), setting)
    distiller._checked = True  # its check of tangents on the network itself
    models, noise = roles.predictors(), torch.randn(size, *family.latent.shape)
    batch = Batch(size, cond, noise, ("",) * size, PairBatch(noise, noise, cond))
    most = 0
    for index, update in enumerate(distiller.updates(step)):
        rng = SampleRng(0, (step, index), range(size))
        with Live(there) as live, roles.training(update.trains, update.only):
            for _ in range(min(micro_batches, 2)):  # from the second on with gradients beside
                for term in update.terms:
                    value = term(models, batch, rng.at(term.__name__), step).value
                    sum((own.value for name in update.trains if (own := models[name].take_auxiliary()) is not None), value).backward()
        most = max(most, live.peak)
        for role in roles.values():
            for parameter in role.parameters().values():
                parameter.grad = None
    return most


def _dropped(parameter: Tensor) -> None:
    parameter.grad = None


def _without_pixels(config: MethodConfig) -> MethodConfig:
    """Without what needs a decoder's weights: rewards, and distances of pictures. The decoder's own activations are not counted."""
    changed: dict[str, Any] = {}
    if getattr(config, "reward", None) is not None:
        changed["reward"] = None
    regression: Any = getattr(config, "regression", None)
    if regression is not None and regression.metric == "lpips":
        changed["regression"] = regression.model_copy(update={"metric": "latent"})
    if getattr(config, "perceptual", None) is not None:
        changed["perceptual"] = None
    return config.model_copy(update=changed)


def _filled(cond: Conditioning) -> Conditioning:
    """Conditioning with numbers: texts as long as there is room for."""
    return {
        key: torch.full(value.shape, cond["text"].shape[1]) if key == "length" else torch.ones(value.shape, dtype=value.dtype)
        for key, value in cond.items()
    }


def _without_content(roles: Roles) -> list[Tensor]:
    """Put tensors that have shapes alone in place of all parameters and buffers, which are on the meta device, and return them; what roles share
    stays shared."""
    mode, made = FakeTensorMode(allow_non_fake_inputs=True), dict[int, tuple[Tensor, Tensor]]()

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            found = nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            made[id(tensor)] = found, tensor  # which keeps the number its own
        return made[id(tensor)][0]

    for role in roles.values():
        for module in role.denoiser.modules():
            for tensors in (module._parameters, module._buffers):
                _replace(tensors, fake)
    return [tensor for tensor, _ in made.values()]


def _replace(tensors: Mapping[str, Any], fake: Any) -> None:
    own: Any = tensors
    for name, tensor in list(own.items()):
        if tensor is not None:
            own[name] = fake(tensor)
