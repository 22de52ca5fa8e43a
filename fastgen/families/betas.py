"""The discrete schedule of a teacher: betas and what its network predicts, read by the keys of its scheduler's own class.

Known classes: DDIM, DDPM, PNDM, EulerDiscrete, EulerAncestralDiscrete, DPMSolverMultistep, DPMSolverSinglestep, UniPCMultistep, LCM, HeunDiscrete,
DEISMultistep, KDPM2Discrete, KDPM2AncestralDiscrete, LMSDiscrete, TCD. A key that is missing has that class's own default (`beta_start` is .0001
or .00085, `beta_schedule` linear or scaled_linear), and a key that the class does not have does not act there and does not count here.

What is taken is the process: the betas, and the kind of prediction. How and where the class steps (spacing, Karras' sigmas, solver and order) is
its sampler's business, not the teacher's: teachers here take Euler's steps in x0, which is DDIM. Refused by name is what would make it another
process: `use_flow_sigmas` and its dynamic shift (a flow: see `schedules`), `clip_sample` and `thresholding` (no longer the network's prediction),
`timestep_type: continuous` (the network is told other times), other forms of betas (`sigmoid` and `laplace` of DDPM, `exp` of Heun), betas that
end in pure noise under an eps network, which says nothing there, and every option that a later diffusers adds. So are all other classes: EDM's
have no betas, Inverse's go the other way, the rest are flows.

With `rescale_betas_zero_snr` Euler, EulerAncestral, DPMSolverMultistep and UniPC step from alpha-bar 2^-24, where the path, DDIM, DDPM, LCM and TCD
have 0, which is what such a network was trained at.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from fastgen import records
from fastgen.errors import UserError
from fastgen.families.components import Component, defaults, read_component
from fastgen.path import DiscreteVP, Kind

KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

# Of an x0 network these classes raise at their first step.
_NO_X0 = ("epsilon", "v_prediction")
_CLASSES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("PNDMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), _NO_X0),
    **dict.fromkeys(("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"), tuple(KINDS)),
    **dict.fromkeys(("DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "LCMScheduler", "HeunDiscreteScheduler"), tuple(KINDS)),
    **dict.fromkeys(("DEISMultistepScheduler", "LMSDiscreteScheduler", "TCDScheduler"), tuple(KINDS)),
}
# Where and how the sampler steps, and what `clip_sample`, `thresholding` and `use_flow_sigmas`, which must be off, would go by.
_HARMLESS = {
    *("timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps", "final_sigmas_type", "sigma_min", "sigma_max"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "interpolation_type", "lambda_min_clipped"),
    *("solver_order", "solver_type", "solver_p", "predict_x0", "disable_corrector", "lower_order_final", "euler_at_final", "algorithm_type"),
    *("variance_type", "original_inference_steps", "timestep_scaling"),
    *("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type", "shift_terminal"),
}
_OFF = ("clip_sample", "thresholding", "use_flow_sigmas", "use_dynamic_shifting")  # whatever the class's default is

_Beta = Annotated[float, Field(gt=0, lt=1)]


class _Betas(records.Schema):
    """What the betas are made from; listed one by one, so bounded."""

    num_train_timesteps: int = Field(ge=1, le=100_000)
    beta_start: _Beta
    beta_end: _Beta
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
    trained_betas: list[float] | None
    rescale_betas_zero_snr: bool | None = None


def teacher_path(source: Any, passed: Collection[str] = ()) -> tuple[DiscreteVP, Kind]:
    """The path of a folder's (a Path) or a live pipeline's scheduler, and what its network predicts. passed: options that its family goes
    without, whatever they say. UserError for every other process."""
    return discrete_path(read_component(source, "scheduler"), passed)


def discrete_path(scheduler: Component, passed: Collection[str] = ()) -> tuple[DiscreteVP, Kind]:
    """The same of a scheduler's class and configuration."""
    name = _known_class(scheduler)
    own = defaults(name)
    options = own | {key: value for key, value in scheduler.given.items() if key in own}
    _check_options(name, own, options, passed)
    path = _path(name, options)
    if path.zero_snr and options["prediction_type"] == "epsilon":
        raise _refusal(f"{name} has betas that end in pure noise, where its prediction_type epsilon says nothing of the picture")
    return path, KINDS[options["prediction_type"]]


def _known_class(scheduler: Component) -> str:
    if not scheduler.classes:
        raise _refusal("names no class")
    name, *others = scheduler.classes
    if others:
        raise _refusal(f"is a {name} by model_index.json and a {others[0]} by scheduler_config.json")
    if name not in _CLASSES:
        raise _refusal(f"is {name}, whose betas fastgen does not know (it knows {', '.join(sorted(_CLASSES))})")
    return name


def _check_options(name: str, own: Mapping[str, Any], options: Mapping[str, Any], passed: Collection[str]) -> None:
    """UserError for the first option that would make it another process, in a way that neither betas nor the kind of prediction say."""
    for key, default in own.items():
        value, usual = options[key], None if key in _OFF else default
        if key not in _HARMLESS | set(passed) | _Betas.model_fields.keys() | {"prediction_type"} and (value or None) != (usual or None):
            raise _refusal(f"{name} has {key}: {records.shown(value)}, which fastgen does not follow")
    if options["prediction_type"] not in _CLASSES[name]:
        given, known = records.shown(options["prediction_type"]), ", ".join(_CLASSES[name])
        raise _refusal(f"{name} has prediction_type: {given}, which fastgen does not follow (it follows {known} of this class)")


def _path(name: str, options: Mapping[str, Any]) -> DiscreteVP:
    """The betas as the class makes them."""
    trained = options["trained_betas"]
    values = {key: options[key] for key in _Betas.model_fields if key in options}
    if trained is not None:
        listed = trained.tolist() if hasattr(trained, "tolist") else list(trained) if isinstance(trained, tuple) else trained
        values |= {"trained_betas": listed, "beta_schedule": "linear"}  # the class does not look at its name then
    try:
        betas = _Betas.model_validate(values)
    except ValueError as error:
        raise _refusal(f"{name}: {records.explained(error)}") from error  # type: ignore[arg-type]
    count, ends, zero_snr = betas.num_train_timesteps, (betas.beta_start, betas.beta_end), bool(betas.rescale_betas_zero_snr)
    if betas.trained_betas is not None and len(betas.trained_betas) != count:
        raise _refusal(f"{name} has {len(betas.trained_betas)} trained_betas for num_train_timesteps: {count}")
    try:
        if betas.trained_betas is not None:
            return DiscreteVP.of(betas.trained_betas, zero_snr=zero_snr)
        if betas.beta_schedule == "squaredcos_cap_v2":
            return DiscreteVP.cosine(count, zero_snr=zero_snr)
        make = DiscreteVP.linear if betas.beta_schedule == "linear" else DiscreteVP.scaled_linear
        return make(count, *ends, zero_snr=zero_snr)
    except ValueError as error:
        raise _refusal(f"{name}: {error}") from error


def _refusal(what: str) -> UserError:
    return UserError(f"recipe key teacher.pretrained: its scheduler {what}")
