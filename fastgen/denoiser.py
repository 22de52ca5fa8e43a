"""The network as the rest of fastgen sees it: one module that owns the parameters, and predictors of any kind on any path."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgen import across, conditioning
from fastgen.conditioning import Conditioning
from fastgen.families.base import Family
from fastgen.guidance import GuidanceRule, linear
from fastgen.path import Kind, Path
from fastgen.sampling import Predict
from fastgen.surgery import lora, moe, second_time
from fastgen.surgery.heads import Heads
from fastgen.surgery.log_variance import LogVariance
from fastgen.surgery.second_time import ScalarInputs


class Auxiliary(NamedTuple):
    """What a network adds to any loss that trains it. value: scalar fp32, already weighted; logs: detached scalars."""

    value: Tensor
    logs: dict[str, Tensor]


class Output(NamedTuple):
    """prediction (B, ...) fp32 of the family's kind; features: one tensor a tap, or one for each stream of a tap; log_variance (B,) of a network
    that learns its loss's; logits (B, num_taps) of a network with discriminator heads, when they were asked for; auxiliary: of a network with
    experts, in passes with gradients."""

    prediction: Tensor
    features: tuple[Tensor, ...] = ()
    log_variance: Tensor | None = None
    logits: Tensor | None = None
    auxiliary: Auxiliary | None = None


class Denoiser(nn.Module):
    """A backbone and the family that knows how to call it. forward() is the only code that touches parameters.

    adapter: the LoRA adapter this view of a shared backbone runs with; None runs the bare base weights.
    autocast: dtype of mixed-precision compute, or None for the weights' own.
    inputs: scalar inputs beside the time, with parameters of their own, for a family that names its `time_projection`.
    log_variance: a learned log-variance of the loss. heads: discriminator heads on features of its blocks. balance: weight of the balance loss
    of its experts, where it has any; bias_rate: how far each step moves their selection bias.
    """

    def __init__(
        self,
        backbone: nn.Module,
        family: Family,
        *,
        adapter: str | None = None,
        autocast: torch.dtype | None = None,
        inputs: ScalarInputs | None = None,
        log_variance: LogVariance | None = None,
        heads: Heads | None = None,
        balance: float = 0.0,
        bias_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.family = family
        self.adapter = adapter
        self.autocast = autocast
        self.inputs = inputs
        self.log_variance = log_variance
        self.heads = heads
        self.balance, self.bias_rate = balance, bias_rate
        self._loads: dict[str, Tensor] = {}

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        taps: Sequence[int] | None = (),
        *,
        judge: bool = False,
        streams: bool = False,
        active: float | None = None,
        whole: bool = False,
    ) -> Output:
        """Prediction at x (B, ...), t (B,) path time, fp32 or wider; taps: indices into the family's blocks, None for all; judge: also the heads'
        logits. streams: features of all streams of a tap, one after the other, not of the picture's alone. active: experts that a token uses in
        this pass, None for as many as the network has active. whole: no block is left out, where they are in groups.

        cond may hold values of scalar inputs (surgery/second_time.py), which stay out of every cast. ValueError for one that this
        network does not have.
        """
        assert not (judge and streams), "heads listen to the picture's stream alone"
        lora.activate(self.backbone, self.adapter)
        cond, values = second_time.split(cond)
        heads = self.heads if judge else None
        assert heads is not None or not judge, "this network has no discriminator heads"
        taps = range(len(self.family.blocks(self.backbone))) if taps is None else taps
        tapped = [*taps, *(heads.taps if heads else ())]
        with ExitStack() as stack:
            stack.enter_context(moe.using(self.backbone, active))
            stack.enter_context(moe.keeping_all(self.backbone) if whole else nullcontext())
            routings, choices = stack.enter_context(self._routed())
            features = stack.enter_context(self._tapped(tapped, streams=streams))
            stack.enter_context(self._with_inputs(t, values))
            stack.enter_context(self._autocast(x.device))
            prediction = self.family.call(self.backbone, x.to(self.dtype), t, conditioning.to(cond, dtype=self.dtype))
        prediction = prediction.float() if prediction.dtype != torch.float64 else prediction
        log_variance = self.log_variance(second_time.noise_fraction(self.family.path, t)) if self.log_variance else None
        logits = heads([features[i][-1] for i in heads.taps]) if heads else None
        choices, fraction = [] if whole else choices, second_time.noise_fraction(self.family.path, t)
        auxiliary = _auxiliary(routings, choices, self.balance, fraction) if routings or choices else None
        if auxiliary is not None and auxiliary.value.requires_grad and self.bias_rate:
            self._load(routings)
        return Output(prediction, tuple(stream for i in taps for stream in features[i]), log_variance, logits, auxiliary)

    @contextmanager
    def _routed(self) -> Iterator[tuple[list[moe.Routing], list[moe.Routing]]]:
        """What experts choose inside, and which blocks samples keep, in passes with gradients alone."""
        if not torch.is_grad_enabled():
            yield [], []
            return
        with moe.recording(self.backbone) as records, moe.recording_blocks(self.backbone) as choices:
            yield records, choices

    def _load(self, routings: Sequence[moe.Routing]) -> None:
        for name, count in moe.counts(routings).items():
            self._loads[name] = count + self._loads.get(name, torch.zeros_like(count))

    def forget_loads(self) -> None:
        """Those of passes that were no training."""
        self._loads = {}

    def after_step(self, total: Callable[[Tensor], Tensor]) -> None:
        """What follows an optimizer step: where `bias_rate` says so, experts' selection bias moves against their load in the passes of that step.
        total: over all processes, up to a factor."""
        if self.bias_rate:  # for all layers, for each process may have passed through others
            layers = moe.expert_layers(self.backbone)
            nothing = {layer.name: torch.zeros(layer.num_experts, device=layer.selection_bias.device) for layer in layers}
            loads = {name: total(load) for name, load in (nothing | self._loads).items()}
            self.forget_loads()
            moe.even_out(self.backbone, loads, self.bias_rate)

    @property
    def dtype(self) -> torch.dtype:
        """Of what the network is given beside the time: that of its parameters. Weights that layers hold narrow (surgery/held.py) are none,
        and are read in whatever dtype they meet."""
        dtypes = (p.dtype for name, p in self.backbone.named_parameters() if moe.part(name) != "experts")  # which may be narrower, and routers wider
        return next(dtypes, torch.float32)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()

    @contextmanager
    def _with_inputs(self, t: Tensor, values: dict[str, Tensor]) -> Iterator[None]:
        """The time embedding with the scalar inputs' part added; its own dtype stays."""
        if self.inputs is None:
            if values:
                raise ValueError(f"this network has no scalar inputs, but {', '.join(values)} was given")
            yield
            return
        added = self.inputs(second_time.noise_fraction(self.family.path, t), values)
        handle = self._time_projection().register_forward_hook(lambda _module, _inputs, output: output + added.to(output.dtype))
        try:
            yield
        finally:
            handle.remove()

    def _time_projection(self) -> nn.Module:
        assert self.family.time_projection is not None, f"{type(self.family).__name__} has no place for scalar inputs"
        return self.backbone.get_submodule(self.family.time_projection)

    @torch.no_grad()
    def fold_inputs(self, times: Tensor) -> None:
        """Make the plain architecture again, which at `times` (N,) path times predicts what the scalar inputs' defaults gave there.

        Between those times it is no longer the network that was trained, unless the only input was a guidance scale. UserError
        where that cannot be exact.
        """
        if self.inputs is None:
            return
        layer = self._time_projection()
        assert isinstance(layer, nn.Linear), "adapters are merged before inputs are folded"
        times = times.to(layer.weight.device)
        added = self.inputs(second_time.noise_fraction(self.family.path, times), {})
        second_time.fold(layer, self.family.time_features(self.backbone, times), added)
        self.inputs = None

    @contextmanager
    def _tapped(self, taps: Sequence[int], *, streams: bool) -> Iterator[dict[int, tuple[Tensor, ...]]]:
        features: dict[int, tuple[Tensor, ...]] = {}
        blocks = self.family.blocks(self.backbone) if taps else []

        def keep(tap: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                features[tap] = self.family.block_streams(output) if streams else (self.family.block_feature(output),)

            return hook

        handles = [blocks[tap].register_forward_hook(keep(tap)) for tap in dict.fromkeys(taps)]
        try:
            yield features
        finally:
            for handle in handles:
                handle.remove()


def _auxiliary(routings: Sequence[moe.Routing], choices: Sequence[moe.Routing], weight: float, fraction: Tensor) -> Auxiliary:
    """The weighted balance losses of one pass, and what its routers do. Means over layers: `balance` of the loss itself, 1 where even; `entropy` of
    a token's probabilities over that of a router without opinion; `idle` of the share of experts that nobody chose; `dropped` of tokens
    without a routed expert; `busiest`: the largest load of any expert over an even one. Behind `blocks_` the same of groups of blocks, in choices,
    where nothing is dropped; behind each quarter of the noise range (`moe.by_time`), which samples at noise `fraction` (B,) are in."""
    routings, choices = _over_processes(routings), _over_processes(choices)
    experts = {} if not routings else _told_of(routings) | moe.by_time(routings, fraction)
    blocks = {} if not choices else {f"blocks_{name}": value for name, value in _told_of(choices).items() if name != "dropped"}
    value = torch.stack([moe.balance_loss(each) for each in (routings, choices) if each]).sum()
    return Auxiliary(weight * value, experts | blocks)


def _over_processes(routings: Sequence[moe.Routing]) -> list[moe.Routing]:
    """The same with what all processes chose."""
    if not routings:
        return []
    totals = across.batch_total(torch.cat([routing.counts for routing in routings])).split([len(routing.counts) for routing in routings])
    return [routing._replace(counts=counts) for routing, counts in zip(routings, totals, strict=True)]


@torch.no_grad()
def _told_of(routings: Sequence[moe.Routing]) -> dict[str, Tensor]:
    counts = moe.counts(routings)
    each = [count * len(count) / count.sum().clamp(min=1) for count in counts.values()]
    return {
        "balance": moe.balance_loss(routings),
        "entropy": torch.stack([routing.entropy / math.log(max(2, routing.probabilities.shape[-1])) for routing in routings]).mean(),
        "idle": torch.stack([(count == 0).float().mean() for count in counts.values()]).mean(),
        "dropped": torch.stack([routing.dropped for routing in routings]).mean(),
        "busiest": torch.stack([load.max() for load in each]).max(),
    }


@contextmanager
def full_precision(module: nn.Module) -> Iterator[bool]:
    """Every Denoiser in `module`, wrapped or not, computes in its weights' own dtype inside; yields whether one did not before."""
    denoisers = [found for found in module.modules() if isinstance(found, Denoiser)]
    before = [denoiser.autocast for denoiser in denoisers]
    try:
        for denoiser in denoisers:
            denoiser.autocast = None
        yield any(autocast is not None for autocast in before)
    finally:
        for denoiser, autocast in zip(denoisers, before, strict=True):
            denoiser.autocast = autocast


class _Place:
    """A sample x (B, ...) at t (B,) of `path` (None: `own`) as it is on the path `own`, where a network predicts."""

    def __init__(self, own: Path, x: Tensor, t: Tensor, path: Path | None) -> None:
        self.own, self.path, self.asked = own, own if path is None else path, t
        self.x, self.t = (x, t) if self.path == own else self.path.retime(x, t, own)

    def told(self, prediction: Tensor, src: Kind, dst: Kind) -> Tensor:
        """A prediction of kind `src` made there, as the kind `dst` at the sample that was asked for."""
        if self.path == self.own or dst in ("x0", "eps"):
            return self.own.convert(prediction, self.x, self.t, src, dst)
        return self.path.predict(*self.own.solve(prediction, self.x, self.t, src), self.asked, dst)


class Predictor:
    """Predictions of any kind, at samples on any path, from a denoiser that has one kind on one path."""

    def __init__(self, denoiser: Callable[..., Output], family: Family) -> None:
        self.denoiser = denoiser
        self.family = family
        self._told: dict[str, Any] = {}
        self._auxiliaries: list[Auxiliary] = []

    @property
    def path(self) -> Path:
        return self.family.path

    @property
    def kind(self) -> Kind:
        """The network's own prediction kind."""
        return self.family.kind

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "x0", path: Path | None = None) -> Tensor:
        """Prediction of `kind` at x (B, ...), t (B,) on `path` (default: the network's own); fp32 or wider, differentiable."""
        return self.output(x, t, cond, kind, path).prediction

    def output(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "x0", path: Path | None = None) -> Output:
        """The same with all else that the network gives."""
        at = _Place(self.family.path, x, t, path)
        out = self._evaluated(at.x, at.t, cond)
        return out._replace(prediction=at.told(out.prediction, self.family.kind, kind))

    def features(self, x: Tensor, t: Tensor, cond: Conditioning, taps: Sequence[int] | None) -> Output:
        """The network's own prediction at x (B, ...), t (B,) on its own path, with features of all streams of the tapped blocks; None: of all."""
        return self._evaluated(x, t, cond, taps=taps, streams=True)

    def using(self, active: float | None = None, *, whole: bool = False) -> Predictor:
        """The same network with so many experts active for a token, and, where whole, with all of its blocks."""
        other = copy.copy(self)
        other._told = {**self._told, "active": active, "whole": whole}
        return other

    def take_auxiliary(self) -> Auxiliary | None:
        """What the network asks to have added to a loss, the mean over passes that a gradient goes through, since the last call; None for nothing."""
        found = [*self._auxiliaries]
        self._auxiliaries.clear()
        if not found:
            return None
        logs = {name: torch.stack([each.logs[name] for each in found]).nanmean() for name in found[0].logs}
        return Auxiliary(torch.stack([each.value for each in found]).mean(), logs)

    def _evaluated(self, x: Tensor, t: Tensor, cond: Conditioning, **asked: Any) -> Output:
        out = self.denoiser(x, t, cond, **self._told, **asked)
        if out.auxiliary is not None and out.auxiliary.value.requires_grad:
            self._auxiliaries.append(out.auxiliary)
        return out

    def logits(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Logits (B, num_taps) of the discriminator heads at x (B, ...), t (B,) on the network's own path; differentiable in x."""
        logits = self._evaluated(x, t, cond, judge=True).logits
        assert logits is not None
        return logits


def both_ways(
    predict: Predict, x: Tensor, t: Tensor, cond: Conditioning, negative: Conditioning, kind: Kind = "x0", path: Path | None = None
) -> tuple[Tensor, Tensor]:
    """Predictions (B, ...) with the conditioning and with that of one negative sample, in one evaluation of twice the batch."""
    repeated = conditioning.repeat(negative, len(x))
    both = predict(torch.cat([x, x]), torch.cat([t, t]), conditioning.cat([repeated, cond]), kind, path)
    unconditional, conditional = both.chunk(2)
    return conditional, unconditional


class _Guided:
    def __init__(self, predict: Predict, scale: float | Tensor, negative: Conditioning, rule: GuidanceRule, acts_on: Kind | None) -> None:
        self.predict, self.scale, self.negative, self.rule = predict, scale, negative, rule
        self.acts_on: Kind | None = acts_on

    @property
    def path(self) -> Path:
        return self.predict.path

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "x0", path: Path | None = None) -> Tensor:
        if self.acts_on is None:
            return self.rule(*both_ways(self.predict, x, t, cond, self.negative, kind, path), self.scale)
        at = _Place(self.path, x, t, path)
        return at.told(self.rule(*both_ways(self.predict, at.x, at.t, cond, self.negative, self.acts_on), self.scale), self.acts_on, kind)


def guided(predict: Predict, scale: float | Tensor, negative: Conditioning, rule: GuidanceRule = linear, acts_on: Kind | None = None) -> Predict:
    """`predict` with classifier-free guidance; negative: conditioning of one sample. scale: one number, or one a sample (B,) for
    calls on just these samples. The number 1 returns `predict` itself.

    A linear rule with weights summing to one commutes with every conversion of kinds, so guiding x0 equals guiding the velocity. acts_on:
    the kind, on the predictor's own path, that another rule is for.
    """
    return predict if not isinstance(scale, Tensor) and scale == 1 else _Guided(predict, scale, negative, rule, acts_on)
