"""Perceptual distances of pictures by what a network sees in them: LPIPS, or features of any network of the user's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import perceptual
from fastgen.assets import DIGITS_FEATURES, SCENES_FEATURES
from fastgen.assets.classifier import Classifier, load_classifier, load_scene_classifier
from fastgen.errors import UserError
from fastgen.own_code import Named
from fastgen.perceptual import Distance

KEY = "recipe key distiller.perceptual.metric"
_SIZES = {"digits": 8, "scenes": 16}


def load_distance(name: str, device: torch.device | str = "cpu") -> Distance:
    """(a, b), pixels (B, 3, H, W) in [0, 1] -> their distances (B,), fp32, with gradients to both.

    name: `lpips`, or features (pixels -> one tensor (B, ...) or several) behind `fastgen:digits`, `fastgen:scenes`, `module:function` or
    `path/to/file.py:function`, compared by their mean squared difference, the mean over several. UserError for what cannot be had.
    """
    if name == "lpips":
        return perceptual.load_lpips(device=device, key=KEY)
    named = _named(name)
    own = named.own()
    features = named.load() if own is None else _bundled(own, str(device))

    def distance(a: Tensor, b: Tensor) -> Tensor:
        of_a, of_b = _checked(features(a.float()), name, len(a)), _checked(features(b.float()), name, len(b))
        return torch.stack([(x - y).float().square().flatten(1).mean(1) for x, y in zip(of_a, of_b, strict=True)]).mean(0)

    return distance


def check(name: str, picture: Sequence[int] | None) -> None:
    """UserError where `load_distance` surely fails, or does not compare pictures of this shape (None: not known); runs nothing of the user's."""
    if picture is not None and len(picture) != 3:
        raise UserError(
            f"{KEY}: {name} compares pictures (3, H, W), the teacher's samples are {tuple(picture)}; without distiller.perceptual none are"
        )
    if name == "lpips":
        perceptual.load_lpips(key=KEY)
        return
    named = _named(name)
    named.check()
    own = named.own()
    if own is not None and picture is not None and tuple(picture) != (3, _SIZES[own], _SIZES[own]):
        raise UserError(f"{KEY}: {name} looks at pictures {(3, _SIZES[own], _SIZES[own])}, the teacher's are {tuple(picture)}")


def content(name: str) -> str:
    """What a metric is, wherever it lies."""
    return name if name == "lpips" else _named(name).content()


def _named(name: str) -> Named:
    return Named(KEY, name, "features", ("pixels",), tuple(_SIZES))


def _checked(given: Any, name: str, count: int) -> list[Tensor]:
    features = list(given) if isinstance(given, (tuple, list)) else [given]
    if not features or not all(isinstance(each, Tensor) and each.ndim > 1 and len(each) == count for each in features):
        what = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in features]
        raise UserError(f"{KEY}: {name!r} returned {what} for {count} pictures; tensors ({count}, ...) are needed")
    return features


@functools.cache
def _bundled(name: str, device: str) -> Callable[[Tensor], list[Tensor]]:
    """A classifier that was trained with another seed than the one that judges, so that no student is trained on its judge."""
    network: Classifier = load_classifier(DIGITS_FEATURES) if name == "digits" else load_scene_classifier(SCENES_FEATURES)
    network.requires_grad_(False).to(device)
    return lambda pixels: unit_activations(network, 2 * pixels - 1)


def unit_activations(network: Classifier, images: Tensor) -> list[Tensor]:
    """Activations of every layer of images (B, 3, H, W) in [-1, 1], each position's channels scaled to a mean square of 1: so the mean of their
    squared differences is the sum over channels of those of unit vectors, as in LPIPS (Zhang et al. 2018, eq. 1), without its learned weights."""
    x, found = network.seen(images), list[Tensor]()
    for module in network.trunk:
        x = module(x)
        if isinstance(module, nn.ReLU):
            unit = x / (x.square().mean(1, keepdim=True) + 1e-10).sqrt()
            found.append(unit.unflatten(0, (len(images), -1)))
    return found
