"""The stock schedulers with which a student on a discrete schedule draws: what they are made with, and the path times that they step at.

Measured on the exact eps of a Gaussian in fp32, Stable Diffusion's betas, N = 1 to 8 steps, against `sampling.few_step` here:

| scheduler of diffusers 0.42 | off by at most |
|---|---|
| `trailing_solver`, against euler | 5e-6, which is rounding times 1/alpha(1); `timesteps=` too |
| `consistency_sampler`, against stochastic | 5e-6, where each sample's own generator goes on drawing |
| DDIM, trailing, against euler | the same where N divides the training steps; N = 6: .08 |
| EulerDiscrete, trailing, against euler | 4e-3: it starts at sigma/sqrt(sigma^2 + 1) times the noise |
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from fastgen.errors import UserError
from fastgen.families.betas import KINDS
from fastgen.path import DiscreteVP, Kind


def trailing_solver(path: DiscreteVP, kind: Kind) -> Any:
    """The DPMSolverMultistepScheduler whose steps are Euler's here (DDIM), from the last training step on (`trailing_times`), to data.

    Where the path ends in pure noise diffusers steps from alpha-bar 2^-24 with `rescale_betas_zero_snr`, and from NaN with a beta of 1:
    there the last beta is the largest fp32 below 1, an alpha of about 1e-7.
    """
    from diffusers import DPMSolverMultistepScheduler

    options: dict[str, Any] = {"timestep_spacing": "trailing", "final_sigmas_type": "zero", "prediction_type": _prediction(kind)}
    solvable = DiscreteVP((*path.betas[:-1], 1 - 2**-24)) if path.zero_snr else path
    return DPMSolverMultistepScheduler(**beta_options(solvable), solver_order=1, algorithm_type="dpmsolver++", **options)


def consistency_sampler(path: DiscreteVP, kind: Kind, num_steps: int) -> Any:
    """The LCMScheduler whose steps are the stochastic ones here, for `num_steps` at `consistency_times`.

    Its mix of the sample into the last x0 (c_skip) is scaled away but for training step 0, at which it returns the sample itself.
    """
    from diffusers import LCMScheduler

    _check(path, num_steps)
    options: dict[str, Any] = {"original_inference_steps": num_steps, "timestep_scaling": 1e4, "prediction_type": _prediction(kind)}
    return LCMScheduler(**beta_options(path), clip_sample=False, **options)


def trailing_times(path: DiscreteVP, num_steps: int) -> Tensor:
    """Path times (num_steps,) fp64, descending: those of `trailing_solver` after set_timesteps(num_steps)."""
    _check(path, num_steps)
    return _times(trailing_solver(path, "v"), path, num_steps)


def consistency_times(path: DiscreteVP, num_steps: int) -> Tensor:
    """The same of `consistency_sampler`: multiples of a whole number of training steps, so below t_max where num_steps divides them not."""
    return _times(consistency_sampler(path, "v", num_steps), path, num_steps)


def _times(scheduler: Any, path: DiscreteVP, num_steps: int) -> Tensor:
    """As the scheduler itself rounds to training steps."""
    scheduler.set_timesteps(num_steps)
    if len(scheduler.timesteps) != num_steps:  # rounding in diffusers' range of times can make one more
        raise UserError(f"recipe key student.steps: {num_steps} of {path.num_steps} training steps are {len(scheduler.timesteps)} to diffusers")
    return (scheduler.timesteps.double() + 1) / path.num_steps


def training_steps(path: DiscreteVP, times: Sequence[float]) -> list[int]:
    """What a stock call's `timesteps` must be to step at these path times; UserError for one that is no training step's."""
    steps = []
    for time in times:
        position = time * path.num_steps
        step = round(position)
        if abs(position - step) > 1e-6 * path.num_steps or not 0 < step <= path.num_steps:
            near = sorted({min(max(int(position) + i, 1), path.num_steps) / path.num_steps for i in (0, 1)})
            raise UserError(
                f"recipe key student.grid: {time:g} is the time of none of the teacher's {path.num_steps} training steps, which is all "
                f"that the stock scheduler takes; near it: {', '.join(f'{value:g}' for value in near)}"
            )
        steps.append(step - 1)
    return steps


def beta_options(path: DiscreteVP) -> dict[str, Any]:
    """The options that give a stock scheduler this path's betas to the bit: by name and ends where a named schedule has them, else listed."""
    first, last = (float(f"{beta:.6g}") for beta in (path.betas[0], path.betas[-1]))
    for name, make in (("linear", DiscreteVP.linear), ("scaled_linear", DiscreteVP.scaled_linear)):
        with suppress(ValueError):  # the ends of another schedule may make none of this one
            if make(path.num_steps, first, last) == path:
                return {"num_train_timesteps": path.num_steps, "beta_schedule": name, "beta_start": first, "beta_end": last}
    if DiscreteVP.cosine(path.num_steps) == path:
        return {"num_train_timesteps": path.num_steps, "beta_schedule": "squaredcos_cap_v2"}
    return {"num_train_timesteps": path.num_steps, "trained_betas": list(path.betas)}


def _prediction(kind: Kind) -> str:
    return next(name for name, ours in KINDS.items() if ours == kind)


def _check(path: DiscreteVP, num_steps: int) -> None:
    if not 1 <= num_steps <= path.num_steps:
        raise UserError(f"recipe key student.steps: {num_steps} is not from 1 to the teacher's {path.num_steps} training steps")
