"""The network as the rest of fastgen sees it: one module that owns the parameters, and predictors of any kind on any path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgen import conditioning
from fastgen.conditioning import Conditioning
from fastgen.families.base import Family
from fastgen.path import Kind, Path
from fastgen.sampling import Predict
from fastgen.surgery import lora


class Output(NamedTuple):
    """prediction (B, ...) fp32 of the family's kind; features: one tensor a tap."""

    prediction: Tensor
    features: tuple[Tensor, ...] = ()


class Denoiser(nn.Module):
    """A backbone and the family that knows how to call it. forward() is the only code that touches parameters.

    adapter: the LoRA adapter this view of a shared backbone runs with; None runs the bare base weights.
    autocast: dtype of mixed-precision compute, or None for the weights' own.
    """

    def __init__(self, backbone: nn.Module, family: Family, *, adapter: str | None = None, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.family = family
        self.adapter = adapter
        self.autocast = autocast

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, taps: Sequence[int] = ()) -> Output:
        """Prediction at x (B, ...), t (B,) path time, fp32 or wider; taps: indices into the family's blocks."""
        lora.activate(self.backbone, self.adapter)
        dtype = next(self.backbone.parameters()).dtype
        with self._tapped(taps) as features, self._autocast(x.device):
            prediction = self.family.call(self.backbone, x.to(dtype), t, conditioning.to(cond, dtype=dtype))
        return Output(prediction.float() if prediction.dtype != torch.float64 else prediction, tuple(features[i] for i in taps))

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()

    @contextmanager
    def _tapped(self, taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        features: dict[int, Tensor] = {}
        blocks = self.family.blocks(self.backbone) if taps else []

        def keep(tap: int) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _module, _inputs, output: features.__setitem__(tap, self.family.block_feature(output))

        handles = [blocks[tap].register_forward_hook(keep(tap)) for tap in taps]
        try:
            yield features
        finally:
            for handle in handles:
                handle.remove()


class Predictor:
    """Predictions of any kind, at samples on any path, from a denoiser that has one kind on one path."""

    def __init__(self, denoiser: Callable[..., Output], family: Family) -> None:
        self.denoiser = denoiser
        self.family = family

    @property
    def path(self) -> Path:
        return self.family.path

    @property
    def kind(self) -> Kind:
        """The network's own prediction kind."""
        return self.family.kind

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "x0", path: Path | None = None) -> Tensor:
        """Prediction of `kind` at x (B, ...), t (B,) on `path` (default: the network's own); fp32 or wider, differentiable."""
        own = self.family.path
        if path is None or path == own:
            return own.convert(self.denoiser(x, t, cond).prediction, x, t, self.family.kind, kind)
        x_own, t_own = path.retime(x, t, own)
        pred = self.denoiser(x_own, t_own, cond).prediction
        if kind in ("x0", "eps"):
            return own.convert(pred, x_own, t_own, self.family.kind, kind)
        return path.predict(*own.solve(pred, x_own, t_own, self.family.kind), t, kind)


GuidanceRule = Callable[[Tensor, Tensor, float], Tensor]


def linear(cond: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance n + w (c - n), diffusers' convention: w = 1 is no guidance (Ho & Salimans 2022)."""
    return negative + scale * (cond - negative)


class _Guided:
    def __init__(self, predict: Predict, scale: float, negative: Conditioning, rule: GuidanceRule) -> None:
        self.predict, self.scale, self.negative, self.rule = predict, scale, negative, rule

    @property
    def path(self) -> Path:
        return self.predict.path

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "x0", path: Path | None = None) -> Tensor:
        negative = conditioning.repeat(self.negative, len(x))
        both = self.predict(torch.cat([x, x]), torch.cat([t, t]), conditioning.cat([negative, cond]), kind, path)
        unconditional, conditional = both.chunk(2)
        return self.rule(conditional, unconditional, self.scale)


def guided(predict: Predict, scale: float, negative: Conditioning, rule: GuidanceRule = linear) -> Predict:
    """`predict` with classifier-free guidance; negative: conditioning of one sample. Scale 1 returns `predict` itself.

    A linear rule with weights summing to one commutes with every conversion of kinds, so guiding x0 equals guiding the velocity.
    """
    return predict if scale == 1 else _Guided(predict, scale, negative, rule)
