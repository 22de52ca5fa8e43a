"""Noising paths x_t = alpha(t) x0 + sigma(t) eps, and the one conversion that serves every prediction kind.

A prediction kind is a row (a, b) with pred = a x0 + b eps; together with (alpha, sigma) it is a 2x2 system that gives x0 and
eps, hence every other kind. x0 and eps themselves do not depend on the path, so kinds convert across paths through them.

Kinds: `x0`; `eps`; `v` = alpha eps - sigma x0 (Salimans & Ho 2022, eq. 10); `velocity` = dx_t/dt (flow matching: eps - x0);
`score` = -eps / sigma (as conditional means: grad log p_t, Song et al. 2021).
Times and coefficients are fp32 or wider; a conversion returns the wider of the coefficients' and the inputs' dtypes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Kind = Literal["x0", "eps", "v", "velocity", "score"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def expand_time(value: Tensor, x: Tensor) -> Tensor:
    """Shape per-sample (B,) or per-frame (B, T) values so that they broadcast against x: (B, ...) or (B, C, T, H, W)."""
    if value.ndim == 2 and x.ndim == 5:
        return value[:, None, :, None, None]
    if value.ndim > 1:
        raise ValueError(f"times must be (B,), or (B, T) for 5-D samples; got {tuple(value.shape)} for samples {tuple(x.shape)}")
    # Scalars too get x's dimensions: a 0-dim fp32 tensor would not widen an fp16 one.
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _refuse_zero(value: Tensor, message: str) -> None:
    if bool((value == 0).any()):
        raise ValueError(message)


@dataclass(frozen=True)
class Path(ABC):
    """A noising path; `t` is path time, fp32 or wider, (B,) or (B, T) per frame, and decreases towards data. No state."""

    t_max: ClassVar[float]

    @property
    def t_min(self) -> float:
        """The smallest time that networks are trained at."""
        return 0.0

    @abstractmethod
    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t), sigma(t), each shaped like t."""

    @abstractmethod
    def velocity_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """d alpha/dt, d sigma/dt in closed form, each shaped like t."""

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """Path time at which sigma/alpha equals `ratio` (0 = data; inf = pure noise where the path reaches it)."""

    def ratio(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio sigma/alpha; inf where alpha = 0."""
        alpha, sigma = self.coeffs(t)
        return sigma / alpha

    def prior_scale(self, t: Tensor) -> Tensor:
        """Standard deviation of the pure noise that sampling starts from at time t (1 on every path but VE)."""
        return torch.ones_like(_wide(t))

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps."""
        alpha, sigma = (expand_time(c, x0) for c in self.coeffs(t))
        return alpha * x0 + sigma * eps

    def bridge(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t|s, sigma_t|s) of p(x_t | x_s) = N(alpha_t|s x_s, sigma_t|s^2 I), each shaped like t; s <= t, alpha(s) > 0
        (Kingma et al. 2021, appendix A). It carries p_s to p_t, so x_s may come from any law and x0 need not be known."""
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.coeffs(s), self.coeffs(t)
        alpha = alpha_t / alpha_s
        return alpha, (sigma_t**2 - alpha**2 * sigma_s**2).clamp(min=0).sqrt()

    def bridge_target(self, x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
        """(x_t, target): x_s (B, ...) carried from s to t with unit noise eps, and what a network of `kind` should learn there.

        The target's mean given x_t is the exact prediction for the law of x_t: -eps / sigma_t|s has the score as its mean, and every
        kind is the same affine function of it as of the score (Phased DMD, arXiv:2510.27684, section 3.3). At s = 0 it is the ordinary
        target; it grows without bound as t -> s, with the same mean.
        """
        alpha_s, sigma_s, alpha_t, sigma_t = (expand_time(c, x_s) for c in (*self.coeffs(s), *self.coeffs(t)))
        alpha, sigma = (expand_time(c, x_s) for c in self.bridge(s, t))
        x0 = x_s / alpha_s - alpha_t * sigma_s**2 / (alpha_s**2 * sigma) * eps
        return alpha * x_s + sigma * eps, self.predict(x0, sigma_t / sigma * eps, t, kind)

    def predict(self, x0: Tensor, eps: Tensor, t: Tensor, kind: Kind) -> Tensor:
        """The prediction of `kind` that corresponds to (x0, eps) at time t. `score` at sigma = 0 raises ValueError."""
        if kind == "score":
            return -eps / expand_time(self._sigma_nonzero(t), eps)
        a, b = (expand_time(c, x0) for c in self._row(kind, t))
        return a * x0 + b * eps

    def solve(self, pred: Tensor, x: Tensor, t: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
        """(x0, eps) from a prediction of `kind` at x_t. Raises where that kind does not determine both: see `convert`."""
        alpha, sigma = (expand_time(c, x) for c in self.coeffs(t))
        if kind == "score":
            pred, kind = -sigma * pred, "eps"
        a, b = (expand_time(c, x) for c in self._row(kind, t))
        det = alpha * b - sigma * a
        _refuse_zero(det, f"{kind!r} does not determine x0 and eps at a singular end of {self} (t = {_span(t)})")
        return (b * x - sigma * pred) / det, (alpha * pred - a * x) / det

    def through(self, x_s: Tensor, x_e: Tensor, s: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """The constant pair (x0, eps) of the line alpha x0 + sigma eps that passes x_s (B, ...) at time s and x_e at time e, each (B,): the
        prediction whose DDIM step leads from one to the other (Salimans & Ho 2022, algorithm 2). ValueError where both have one noise ratio,
        as at s = e. At e = 0 x0 is x_e. On another path the same two samples (`retime`) have the same pair."""
        (alpha_s, sigma_s), (alpha_e, sigma_e) = self.coeffs(s), self.coeffs(e)
        det = alpha_s * sigma_e - alpha_e * sigma_s
        _refuse_zero(det, f"one noise level of {self} determines no x0 and eps (t = {_span(s)} and {_span(e)})")
        alpha_s, sigma_s, alpha_e, sigma_e, det = (expand_time(c, x_s) for c in (alpha_s, sigma_s, alpha_e, sigma_e, det))
        return (sigma_e * x_s - sigma_s * x_e) / det, (alpha_s * x_e - alpha_e * x_s) / det

    def convert(self, pred: Tensor, x: Tensor, t: Tensor, src: Kind, dst: Kind) -> Tensor:
        """Turn a prediction of kind `src` at x_t into kind `dst`; x: (B, ...), t: (B,) or (B, T).

        Singular ends, all ValueError: eps or score -> others at alpha = 0 (x0 is not determined); x0 -> eps, velocity, v at
        sigma = 0 (eps is not determined); anything -> score at sigma = 0. Kinds convert to themselves everywhere. The one
        limit taken: score -> eps at sigma = 0 gives 0 = -sigma score, which is E[eps | x] for any smooth density.
        """
        for kind in (src, dst):
            if kind not in KINDS:
                raise ValueError(f"unknown prediction kind {kind!r}; allowed: {', '.join(KINDS)}")
        if src == dst:
            return pred.to(torch.promote_types(pred.dtype, _wide(t).dtype))
        if {src, dst} == {"eps", "score"}:
            sigma = self.coeffs(t)[1] if src == "score" else 1 / self._sigma_nonzero(t)
            return -expand_time(sigma, x) * pred
        if dst == "score":
            self._sigma_nonzero(t)
        x0, eps = self.solve(pred, x, t, src)
        return self.predict(x0, eps, t, dst)

    def retime(self, x: Tensor, t: Tensor, other: Path) -> tuple[Tensor, Tensor]:
        """The same noisy sample seen on `other`: (x', t') at equal sigma/alpha. ValueError where `other` does not reach it."""
        t_other = other.time(self.ratio(t))
        if not bool(torch.isfinite(t_other).all()):
            raise ValueError(f"{other} does not reach the noise level of {self} at t = {_span(t)}")
        scale = torch.hypot(*other.coeffs(t_other)) / torch.hypot(*self.coeffs(t))
        return expand_time(scale, x) * x, t_other

    def _row(self, kind: Kind, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) with pred = a x0 + b eps, for every kind but `score`."""
        alpha, sigma = self.coeffs(t)
        if kind == "x0":
            return torch.ones_like(alpha), torch.zeros_like(alpha)
        if kind == "eps":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        return (-sigma, alpha) if kind == "v" else self.velocity_coeffs(t)

    def _sigma_nonzero(self, t: Tensor) -> Tensor:
        sigma = self.coeffs(t)[1]
        _refuse_zero(sigma, f"the score is singular at sigma = 0 on {self} (t = {_span(t)})")
        return sigma


def _still(t: Tensor) -> Tensor:
    """The value alone: no tangent, on purpose, and no gradient."""
    return forward_ad.unpack_dual(t).primal.detach()


def _span(t: Tensor) -> str:
    return f"{t.min().item():.4g} to {t.max().item():.4g}"


@dataclass(frozen=True)
class Flow(Path):
    """Rectified flow / flow matching (Liu et al. 2022; Lipman et al. 2022): alpha = 1 - t, sigma = t, t in [0, 1]."""

    t_max: ClassVar[float] = 1.0

    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = _wide(t)
        return 1 - t, t

    def velocity_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(_wide(t)), torch.ones_like(_wide(t))

    def time(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / _wide(ratio))


@dataclass(frozen=True)
class TrigFlow(Path):
    """TrigFlow (Lu & Song 2025, eq. 3) for unit-variance data: alpha = cos t, sigma = sin t, t in [0, pi/2]."""

    t_max: ClassVar[float] = math.pi / 2

    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = _wide(t)
        # cos t, but exactly 0 at t_max, where cos of the rounded pi/2 is -4e-8 in fp32
        return torch.sin(math.pi / 2 - t), torch.sin(t)

    def velocity_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coeffs(t)
        return -sigma, alpha

    def time(self, ratio: Tensor) -> Tensor:
        return torch.atan(_wide(ratio))


@dataclass(frozen=True)
class VariancePreserving(Path):
    """Continuous VP path with linear beta (Song et al. 2021, eq. 33): log alpha = -t^2 (b1 - b0)/4 - t b0/2, t in [0, 1].

    alpha > 0 everywhere; d sigma/dt is infinite at t = 0, where `velocity` is therefore singular (ValueError).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_max: ClassVar[float] = 1.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(_wide(t))
        return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))

    def velocity_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = _wide(t)
        _refuse_zero(t, "the velocity of a variance-preserving path is infinite at t = 0")
        alpha, sigma = self.coeffs(t)
        beta = self.beta_min + t * (self.beta_max - self.beta_min)
        return -0.5 * beta * alpha, 0.5 * beta * alpha**2 / sigma

    def time(self, ratio: Tensor) -> Tensor:
        loss = 0.5 * torch.log1p(_wide(ratio) ** 2)  # = -log alpha
        half_beta = 0.5 * self.beta_min
        t = 2 * loss / (half_beta + torch.sqrt(half_beta**2 + (self.beta_max - self.beta_min) * loss))
        # Past t = 1 the path ends: it never reaches pure noise. Rounding at the end itself is forgiven.
        return torch.where(t <= 1 + 1e-5, t.clamp(max=1.0), torch.full_like(t, math.inf))


@dataclass(frozen=True, repr=False)
class DiscreteVP(Path):
    """The VP path of a discrete-time diffusion model (Ho et al. 2020) between its training steps: betas, one a step, as fp32 holds them.

    t = (k + 1)/N is training step k of N, t = 0 clean data; alpha^2 is the running product of 1 - beta in fp32, as diffusers' schedulers
    have it, and log alpha is linear in t between two steps. Where the last beta is 1 (zero terminal SNR, Lin et al. 2024) alpha is 0 at
    t_max and alpha itself is linear over the last step; eps and score determine no x0 there (ValueError). d sigma/dt is infinite at t = 0,
    where `velocity` is singular (ValueError). At a training step the slopes are those below it, the way that sampling goes.
    Interpolates in fp64 and returns the time's dtype. Times that round to a training step are that step.
    """

    betas: tuple[float, ...]
    _made: dict[torch.device, Tensor] = field(default_factory=dict, init=False, compare=False)
    t_max: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        products = [1.0, *self._products().tolist()]
        if not self.betas or not all(before > after > 0 for before, after in pairwise(products[:-1] if self.zero_snr else products)):
            raise ValueError("betas must lie between 0 and 1 (the last may be 1), far enough from both that fp32 tells their products apart")

    @classmethod
    def of(cls, betas: Sequence[float] | Tensor, *, zero_snr: bool = False) -> DiscreteVP:
        """betas: (N,), rounded to fp32. zero_snr: rescaled to end in pure noise, sqrt(alpha-bar) linearly (Lin et al. 2024, algorithm 1)."""
        betas = torch.as_tensor(betas, dtype=torch.float32, device="cpu")
        if zero_snr:
            root = torch.cumprod(1 - betas, 0).sqrt()
            first, last = root[0].clone(), root[-1].clone()
            # In the order in which diffusers rounds.
            product = ((root - last) * (first / (first - last))) ** 2
            betas = 1 - torch.cat([product[:1], product[1:] / product[:-1]])
        return cls(tuple(betas.tolist()))

    @classmethod
    def linear(cls, num_steps: int, beta_start: float, beta_end: float, *, zero_snr: bool = False) -> DiscreteVP:
        """Betas evenly spaced (Ho et al. 2020); diffusers' `linear`."""
        return cls.of(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float32, device="cpu"), zero_snr=zero_snr)

    @classmethod
    def scaled_linear(cls, num_steps: int, beta_start: float, beta_end: float, *, zero_snr: bool = False) -> DiscreteVP:
        """Roots of the betas evenly spaced (Rombach et al. 2022); diffusers' `scaled_linear`."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float32, device="cpu")
        return cls.of(roots**2, zero_snr=zero_snr)

    @classmethod
    def cosine(cls, num_steps: int, *, zero_snr: bool = False) -> DiscreteVP:
        """alpha-bar = cos^2((t + .008)/1.008 pi/2), betas at most .999 (Nichol & Dhariwal 2021, eq. 17); diffusers' `squaredcos_cap_v2`."""
        bars = [math.cos((k / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(num_steps + 1)]
        return cls.of([min(1 - after / before, 0.999) for before, after in pairwise(bars)], zero_snr=zero_snr)

    @property
    def num_steps(self) -> int:
        return len(self.betas)

    @property
    def t_min(self) -> float:
        return 1 / self.num_steps

    @property
    def zero_snr(self) -> bool:
        """Whether the path ends in pure noise."""
        return self.betas[-1:] == (1.0,)

    def step(self, t: Tensor) -> Tensor:
        """N t - 1, in fp64: the training step at time t, whole where t is one of them, -1 for clean data."""
        return self._position(t) - 1

    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma, _ = self._at(t)
        return alpha.to(_wide(t).dtype), sigma.to(_wide(t).dtype)

    def velocity_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        _refuse_zero(t, "the velocity of a variance-preserving path is infinite at t = 0")
        alpha, sigma, slope = self._at(t)
        return slope.to(_wide(t).dtype), (-alpha * slope / sigma).to(_wide(t).dtype)

    def time(self, ratio: Tensor) -> Tensor:
        loss, losses = torch.log1p(_wide(ratio).double() ** 2), self._losses(ratio.device)  # loss = -log alpha^2
        below = (torch.bucketize(_still(loss), losses) - 1).clamp(0, self.num_steps - 1)
        share = (loss.clamp(max=losses[-1]) - losses[below]) / (losses[below + 1] - losses[below])
        if self.zero_snr:
            share = torch.where(below == self.num_steps - 1, 1 - torch.exp((losses[-2] - loss) / 2), share)
            past = torch.zeros_like(below, dtype=torch.bool)
        else:
            past = loss > losses[-1] * (1 + 1e-5)  # rounding at the end itself is forgiven
        return torch.where(past, math.inf, (below + share) / self.num_steps).to(_wide(ratio).dtype)

    def _position(self, t: Tensor) -> Tensor:
        """N t in fp64."""
        position, nearest = self.num_steps * t.double(), (self.num_steps * _still(t).double()).round()
        near = (position - nearest).abs() <= torch.finfo(_wide(t).dtype).eps * nearest
        return position + torch.where(near, nearest - _still(position), 0.0)

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and d alpha/dt in fp64, each shaped like t."""
        position, losses = self._position(t), self._losses(t.device)
        below = (_still(position).ceil() - 1).clamp(0, self.num_steps - 1).long()
        share, slope = position - below, losses[below + 1] - losses[below]
        loss = losses[below] + share * slope
        alpha, sigma = torch.exp(-loss / 2), torch.sqrt(-torch.expm1(-loss))
        if not self.zero_snr:
            return alpha, sigma, -self.num_steps / 2 * slope * alpha
        last, start = below == self.num_steps - 1, torch.exp(-losses[-2] / 2)
        end = start * (1 - share)
        alpha, slope = torch.where(last, end, alpha), torch.where(last, -start, -slope / 2 * alpha)
        return alpha, torch.where(last, torch.sqrt(1 - end**2), sigma), self.num_steps * slope

    def _products(self) -> Tensor:
        """alpha^2 at the training steps, (N,), in diffusers' own arithmetic."""
        return torch.cumprod(1 - torch.tensor(self.betas, dtype=torch.float32, device="cpu"), 0)

    def _losses(self, device: torch.device) -> Tensor:
        """-log alpha^2 at t = 0, 1/N, ..., 1, (N + 1,) fp64; made once a device. At zero terminal SNR the last stands in for infinity."""
        if device not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                losses = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), -self._products().double().log()])
                if self.zero_snr:
                    losses[-1] = losses[-2] + 1
                self._made[device] = losses.to(device)
        return self._made[device]

    def __repr__(self) -> str:
        return f"DiscreteVP({self.num_steps} steps, beta {self.betas[0]:.4g} to {self.betas[-1]:.4g})"


@dataclass(frozen=True)
class VarianceExploding(Path):
    """VE / EDM (Karras et al. 2022): alpha = 1, sigma = t, t in [0, sigma_max]; pure noise is at infinite time."""

    t_max: ClassVar[float] = 80.0

    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = _wide(t)
        return torch.ones_like(t), t

    def velocity_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = _wide(t)
        return torch.zeros_like(t), torch.ones_like(t)

    def time(self, ratio: Tensor) -> Tensor:
        return _wide(ratio)

    def prior_scale(self, t: Tensor) -> Tensor:
        return _wide(t)


@dataclass(frozen=True)
class EDM(VarianceExploding):
    """VE whose samplers start from noise of deviation sqrt(t^2 + 1), as diffusers' EDMEulerScheduler does."""

    def prior_scale(self, t: Tensor) -> Tensor:
        return (_wide(t) ** 2 + 1).sqrt()
