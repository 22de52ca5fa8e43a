"""The flow shift of a teacher's schedule: times t' = s t / (1 + (s - 1) t) (`timesteps.shifted`), read by the keys of its scheduler's own class.

| class of diffusers | constant shift | dynamic shifting: exp(mu), or mu where linear |
|---|---|---|
| FlowMatchEulerDiscrete, FlowMatchLCM | `shift` | exponential, linear |
| FlowMatchHeunDiscrete, FlowMapEulerDiscrete | `shift` | none |
| UniPCMultistep | `flow_shift` | exponential, linear |
| DPMSolverMultistep, DPMSolverSinglestep, DEISMultistep | `flow_shift` | exponential (they refuse linear) |
| SASolver | `flow_shift` | none |

The last two rows and UniPC must have `use_flow_sigmas: true` and `prediction_type: flow_prediction`: their own defaults make them samplers of
another process. mu is linear in the number of tokens and is the pipeline's to compute: it reads `base_image_seq_len`, `max_image_seq_len`,
`base_shift` and `max_shift` from the scheduler's configuration, where some classes have no such options; then its own fallbacks hold.

Refused by name: every other option of the class that is not at its default, unless it is known not to move a time of a flow schedule
(`_HARMLESS`), or by the family to move the ends of its grid alone (`Pipelined.grid_ends`: Qwen-Image's `shift_terminal`). So are
`use_beta_sigmas`, `use_karras_sigmas`, `use_exponential_sigmas`, `use_lu_lambdas`, `shift_terminal`, `invert_sigmas`, `scale_factors` (they
bend or rescale the grid), `stochastic_sampling`, `sde-` algorithms and `thresholding` (no longer the teacher's ODE), `num_train_timesteps`
(another scale of the network's time), and what a later diffusers adds. Keys that the class does not have do not act there and do not count
here. Refused are also all other classes: Helios, HeliosDMD, Piflow, MiniMaxH3, LTXEulerAncestralRF, DPMSolverMultistepInverse and
RFD4Proteina have grids of another form or none of their own, the rest no flow. The recipe key `teacher.shift` goes before all of this.

What is taken is the shift, which says where the teacher's times lie densest, not the class's sampler: teachers here take Euler's steps. With the
shift s the stock grids differ in their ends, all as `shifted(u, s)` for N steps: FlowMap u = 1 - i/N, as here; UniPC from 1 - 1e-6 with 1/1000 in
place of 0 (and its network times are cut to integers); DPM, DEIS and SA from .999; the last two repeat their last time instead of ending at 0,
and `final_sigmas_type: sigma_min` ends the others above it. FlowMatchEuler, LCM and Heun shift an already shifted lower end once more when
their pipeline passes no sigmas (diffusers#13243), a fault of the grid and not a statement about the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from fastgen import records
from fastgen.errors import UserError
from fastgen.families.components import Component, defaults, read_component

REMEDY = "give the recipe key teacher.shift, the flow shift to go by instead"

# How to step from time to time, and the betas of the other process: nothing of a flow schedule's times depends on these.
_HARMLESS = {
    *("solver_order", "solver_type", "solver_p", "predict_x0", "lower_order_final", "euler_at_final", "disable_corrector"),
    *("predictor_order", "corrector_order", "tau_func", "variance_type", "final_sigmas_type", "upscale_mode"),
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "lambda_min_clipped"),
    *("timestep_spacing", "steps_offset", "sigma_min", "sigma_max"),
    *("dynamic_thresholding_ratio", "sample_max_value"),  # of `thresholding`
}
LARGEST_MU = 80.0  # whose exponential, and that of which a call makes times, is a number of single precision
_OF_MU = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")


@dataclass(frozen=True)
class _Reading:
    """shift: key of the constant shift; dynamic: values of `time_shift_type` that it can be replaced under; allowed: what else must be so."""

    shift: str
    dynamic: tuple[str, ...] = ()
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def _solver(*dynamic: str) -> _Reading:
    algorithms = ("dpmsolver", "dpmsolver++", "deis", "data_prediction", "noise_prediction")
    return _Reading("flow_shift", dynamic, {"use_flow_sigmas": (True,), "prediction_type": ("flow_prediction",), "algorithm_type": algorithms})


_CLASSES = {
    "FlowMatchEulerDiscreteScheduler": _Reading("shift", ("exponential", "linear")),
    "FlowMatchLCMScheduler": _Reading("shift", ("exponential", "linear")),
    "FlowMatchHeunDiscreteScheduler": _Reading("shift"),
    "FlowMapEulerDiscreteScheduler": _Reading("shift"),
    "UniPCMultistepScheduler": _solver("exponential", "linear"),
    "DPMSolverMultistepScheduler": _solver("exponential"),
    "DPMSolverSinglestepScheduler": _solver("exponential"),
    "DEISMultistepScheduler": _solver("exponential"),
    "SASolverScheduler": _solver(),
}


def stated(shift: Any) -> float:
    """The recipe's own `teacher.shift`; UserError unless it is a number above 0."""
    if not _is_number(shift) or shift <= 0:
        raise UserError(f"recipe key teacher.shift: {shift!r} is not a number above 0")
    return float(shift)


def teacher_shift(source: Any, tokens: int, fallbacks: Mapping[str, float], passed: Collection[str] = (), mu: float | None = None) -> float:
    """The flow shift of a folder's (a Path) or a live pipeline's scheduler at a picture of `tokens` tokens. fallbacks: the numbers of mu
    (`_OF_MU`) that the pipeline itself falls back on. passed: options that its family knows to move the ends of its grid alone. mu: where
    the pipeline makes it of something else. UserError for every other schedule that is not just a shift."""
    try:
        scheduler = read_component(source, "scheduler")
    except UserError as error:
        raise UserError(f"recipe key teacher.pretrained: {str(error).removeprefix('recipe key teacher.pretrained: ')}; {REMEDY}") from error
    return flow_shift(scheduler, tokens, fallbacks, passed, mu)


def flow_shift(scheduler: Component, tokens: int, fallbacks: Mapping[str, float], passed: Collection[str] = (), mu: float | None = None) -> float:
    """The same of a scheduler's class and configuration."""
    if not scheduler.classes:
        raise _refusal("its scheduler names no class")
    name, *others = scheduler.classes
    if others:
        raise _refusal(f"its scheduler is a {name} by model_index.json and a {others[0]} by scheduler_config.json")
    reading = _CLASSES.get(name)
    if reading is None:
        raise _refusal(f"its scheduler is {name}, whose schedule fastgen does not know (it knows {', '.join(sorted(_CLASSES))})")
    options = defaults(name) | dict(scheduler.given)
    _check_options(name, reading, options, passed)
    if not options.get("use_dynamic_shifting"):
        return _positive(name, reading.shift, _number(name, reading.shift, options[reading.shift]))
    mu = _mu(name, {**fallbacks, **options}, tokens) if mu is None else mu
    if options["time_shift_type"] == "linear":
        return _positive(name, "mu", mu)
    return _positive(name, "exp(mu)", math.exp(min(mu, LARGEST_MU)))


def _check_options(name: str, reading: _Reading, options: Mapping[str, Any], passed: Collection[str]) -> None:
    """UserError for the first option that would move the times, or change what is sampled, in a way that the shift does not say."""
    allowed = dict(reading.allowed)
    if options.get("use_dynamic_shifting"):  # asked for by the pipeline, so also where the class itself has no such option
        allowed |= {"time_shift_type": reading.dynamic} if reading.dynamic else {"use_dynamic_shifting": (False,)}
    passed = {reading.shift, "use_dynamic_shifting", "time_shift_type", *_OF_MU, *_HARMLESS, *passed}
    for key, default in {"use_dynamic_shifting": False, **defaults(name)}.items():
        value = options.get(key)
        off = key in passed or value == default or not (value or default)  # false, null and 0 mean the same
        if not (value in allowed[key] if key in allowed else off):
            raise _refusal(f"its scheduler {name} has {key}: {records.shown(value)}, which fastgen does not follow")


def dynamic(source: Any, fallbacks: Mapping[str, float]) -> dict[str, Any]:
    """How a scheduler of dynamic shifting makes a shift of the number of tokens, by the options of FlowMatchEulerDiscreteScheduler, which makes the
    same. source, fallbacks: as of `teacher_shift`, which has read it."""
    scheduler = read_component(source, "scheduler")
    options = {**fallbacks, **defaults(scheduler.classes[0]), **scheduler.given}
    return {**{key: options[key] for key in _OF_MU}, "time_shift_type": options.get("time_shift_type", "exponential")}


def linear_mu(options: Mapping[str, Any], tokens: int) -> float:
    """Linear in the number of tokens through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift)."""
    low, high, base, top = (options[key] for key in _OF_MU)
    return base + (tokens - low) * (top - base) / (high - low)


def _mu(name: str, options: Mapping[str, Any], tokens: int) -> float:
    """`linear_mu` of options that somebody may have written."""
    numbers = {key: _number(name, key, options[key]) for key in _OF_MU}
    if (low := numbers["base_image_seq_len"]) == numbers["max_image_seq_len"]:
        raise _refusal(f"its scheduler {name} has base_image_seq_len and max_image_seq_len both {low:g}, between which no shift can be found")
    return linear_mu(numbers, tokens)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _number(name: str, key: str, value: Any) -> float:
    if not _is_number(value):
        raise _refusal(f"its scheduler {name} has {key}: {records.shown(value)}, which is not a number")
    return float(value)


def _positive(name: str, what: str, shift: float) -> float:
    if not 0 < shift < math.inf:
        raise _refusal(f"its scheduler {name} has {what}: {shift:g}, but a shift is above 0 and finite")
    return shift


def _refusal(what: str) -> UserError:
    return UserError(f"recipe key teacher.pretrained: {what}; {REMEDY}")
