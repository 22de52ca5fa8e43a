"""The flow shift of every known scheduler class against the sigmas of the real diffusers scheduler; every other class or option refused by name."""

from __future__ import annotations

import inspect
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift, retrieve_timesteps
from pipelines import edit_json, tiny_sd3
from torch import Tensor

from fastgen.errors import UserError
from fastgen.families import schedules
from fastgen.families.components import read_component
from fastgen.families.schedules import teacher_shift
from fastgen.families.sd3 import SD3
from fastgen.timesteps import shifted

STEPS, TOKENS = 7, 1024
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SOLVERS = ("UniPCMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "SASolver")
MATCHING = ("FlowMatchEulerDiscrete", "FlowMatchLCM", "FlowMatchHeunDiscrete", "FlowMapEulerDiscrete")
DYNAMIC = {"use_dynamic_shifting": True}


def scheduler(name: str, **options: Any) -> Any:
    return getattr(diffusers, f"{name}Scheduler").from_config({**(FLOW if name in SOLVERS else {}), **options})


def stored(folder: Path, name: str, **options: Any) -> Path:
    """A pipeline's folder with nothing but this scheduler's configuration, as an older version or another class may have written it."""
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", f"{name}Scheduler"]}))
    config = {"_class_name": f"{name}Scheduler", **(FLOW if name in SOLVERS else {}), **options}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def stock_sigmas(scheduler: Any) -> Tensor:
    """Sigmas (STEPS,) fp64 as StableDiffusion3Pipeline.__call__ sets them, without the last, which is no evaluation."""
    config, mu = scheduler.config, {}
    if config.get("use_dynamic_shifting", None):
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        mu = {"mu": calculate_shift(TOKENS, low, high, config.get("base_shift", 0.5), config.get("max_shift", 1.16))}
    retrieve_timesteps(scheduler, STEPS, "cpu", sigmas=None, **mu)
    sigmas = scheduler.sigmas.double()
    return sigmas[:-1] if len(sigmas) == STEPS + 1 else torch.cat([sigmas[:1], sigmas[1:-1:2]])  # Heun evaluates twice at all but the first


def unshifted(name: str, shift: float, *, twice: bool) -> Tensor:
    """What the class's set_timesteps shifts by `shift`; twice: its lower end, 1/1000, has been shifted in the constructor already."""
    if name == "FlowMapEulerDiscrete":
        return torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)[:-1]
    if name == "UniPCMultistep":
        return torch.linspace(1, 0.001, STEPS + 1, dtype=torch.float64)[:-1]
    if name in SOLVERS:
        return torch.linspace(0.999, 0, STEPS + 1, dtype=torch.float64)[:-1]
    lowest = torch.tensor(0.001, dtype=torch.float64)
    return torch.linspace(1, shifted(lowest, shift).item() if twice else 0.001, STEPS, dtype=torch.float64)


def assert_is_the_stock_schedule(name: str, shift: float, sigmas: Tensor, *, twice: bool) -> None:
    torch.testing.assert_close(shifted(unshifted(name, shift, twice=twice), shift), sigmas, rtol=0, atol=3e-6)
    other = shifted(unshifted(name, 1.05 * shift, twice=twice), 1.05 * shift)
    assert (other - sigmas).abs().max() > 1e-3, "the shift must matter for this test to mean anything"


@pytest.mark.parametrize("shift", [0.7, 1.0, 3.0, 7.5])
@pytest.mark.parametrize("name", [*MATCHING, *SOLVERS])
def test_a_constant_shift_is_the_one_the_stock_scheduler_steps_by(tmp_path: Path, name: str, shift: float) -> None:
    key, other = ("flow_shift", "shift") if name in SOLVERS else ("shift", "flow_shift")
    stock = scheduler(name, **{key: shift})
    found = teacher_shift(stored(tmp_path, name, **{key: shift, other: 5.0}), TOKENS, SD3.mu)
    assert found == shift
    assert teacher_shift(SimpleNamespace(scheduler=stock), TOKENS, SD3.mu) == shift
    assert_is_the_stock_schedule(name, found, stock_sigmas(stock), twice=True)


@pytest.mark.parametrize("name", [*MATCHING, *SOLVERS])
def test_without_a_shift_the_class_has_its_own_default(tmp_path: Path, name: str) -> None:
    found = teacher_shift(stored(tmp_path, name), TOKENS, SD3.mu)
    assert_is_the_stock_schedule(name, found, stock_sigmas(scheduler(name)), twice=True)


@pytest.mark.parametrize("numbers", [{}, {"base_shift": 0.3, "max_shift": 1.7, "base_image_seq_len": 100, "max_image_seq_len": 2000}])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("FlowMatchEulerDiscrete", "FlowMatchLCM", "UniPCMultistep") for kind in ("exponential", "linear")),
        *((name, "exponential") for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep")),
    ],
)
def test_a_dynamic_shift_is_the_one_the_stock_pipeline_passes(tmp_path: Path, name: str, kind: str, numbers: dict[str, float]) -> None:
    """Numbers that the configuration leaves out are the class's own where it has them (1.15), the pipeline's elsewhere (1.16)."""
    key = "flow_shift" if name in SOLVERS else "shift"
    options = {"use_dynamic_shifting": True, "time_shift_type": kind, key: 9.0, **numbers}
    found = teacher_shift(stored(tmp_path, name, **options), TOKENS, SD3.mu)
    stock = scheduler(name, **options)
    assert_is_the_stock_schedule(name, found, stock_sigmas(stock), twice=False)
    assert teacher_shift(SimpleNamespace(scheduler=stock), TOKENS, SD3.mu) == found
    low, high, base, top = (numbers.get(key, 1.15 if key == "max_shift" and name not in SOLVERS else SD3.mu[key]) for key in SD3.mu)
    mu = base + (TOKENS - low) * (top - base) / (high - low)
    assert found == pytest.approx(mu if kind == "linear" else math.exp(mu), rel=1e-12)


def test_a_shift_set_on_a_live_scheduler_is_the_one_that_counts() -> None:
    for name in ("FlowMatchEulerDiscrete", "FlowMatchLCM"):
        live = scheduler(name, shift=3.0)
        live.set_shift(5.0)
        assert live.config.shift == 3
        assert teacher_shift(SimpleNamespace(scheduler=live), TOKENS, SD3.mu) == 5
    live = scheduler("FlowMatchLCM", shift=3.0)
    live.set_scale_factors([0.5, 1.0], "bicubic")
    with pytest.raises(UserError, match=r"has scale_factors: \[0\.5, 1\.0\]"):
        teacher_shift(SimpleNamespace(scheduler=live), TOKENS, SD3.mu)
    live = scheduler("UniPCMultistep", flow_shift=3.0)
    live.config.flow_shift = 5.0  # as DPMSolver's own set_timesteps does
    assert_is_the_stock_schedule("UniPCMultistep", teacher_shift(SimpleNamespace(scheduler=live), TOKENS, SD3.mu), stock_sigmas(live), twice=True)


# ---- what is refused

OTHER_VALUES: dict[str, Any] = {
    "solver_order": 1, "solver_type": None, "predict_x0": False, "lower_order_final": None, "euler_at_final": True, "disable_corrector": [0],
    "predictor_order": 1, "corrector_order": 1, "variance_type": "learned", "dynamic_thresholding_ratio": 0.5, "sample_max_value": 2.0,
    "final_sigmas_type": "sigma_min", "beta_start": 0.001, "beta_end": 0.03, "beta_schedule": "scaled_linear",
    "trained_betas": [0.01] * 1000, "rescale_betas_zero_snr": True, "lambda_min_clipped": -5.0, "timestep_spacing": "trailing",
    "steps_offset": 1, "sigma_min": 0.1, "sigma_max": 0.5, "upscale_mode": "nearest", "solver_p": None, "tau_func": None,
}  # fmt: skip


@pytest.mark.parametrize("name", [*MATCHING, *SOLVERS])
def test_options_that_are_let_pass_move_no_time_of_the_stock_scheduler(tmp_path: Path, name: str) -> None:
    plain = stock_sigmas(scheduler(name))
    options = set(inspect.signature(getattr(diffusers, f"{name}Scheduler").__init__).parameters) & schedules._HARMLESS
    assert options <= OTHER_VALUES.keys()
    for key in sorted(options):
        value = OTHER_VALUES[key]
        if value is not None:
            torch.testing.assert_close(stock_sigmas(scheduler(name, **{key: value})), plain, rtol=0, atol=0)
            assert teacher_shift(stored(tmp_path, name, **{key: value}), TOKENS, SD3.mu) == 1


REFUSED = [
    *((name, key, True) for name in MATCHING[:2] for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")),
    *((name, "shift_terminal", 0.1) for name in (*MATCHING[:2], "UniPCMultistep")),
    *((name, key, True) for name in SOLVERS for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")),
    *((name, "use_flow_sigmas", False) for name in SOLVERS),
    ("DPMSolverMultistep", "use_lu_lambdas", True),
]


@pytest.mark.parametrize(("name", "key", "value"), REFUSED)
def test_an_option_that_bends_the_grid_is_refused_by_name(tmp_path: Path, name: str, key: str, value: Any) -> None:
    if "beta_sigmas" not in key or diffusers.utils.is_scipy_available():
        bent = stock_sigmas(scheduler(name, **{key: value}))
        assert (bent - stock_sigmas(scheduler(name))).abs().max() > 1e-3, "it must matter for this test to mean anything"
    said = rf"teacher\.pretrained: its scheduler {name}Scheduler has {key}: {json.dumps(value)}, which .* does not follow; give .* teacher\.shift"
    with pytest.raises(UserError, match=said):
        teacher_shift(stored(tmp_path, name, **{key: value}), TOKENS, SD3.mu)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        *((name, {"num_train_timesteps": 500}, "num_train_timesteps: 500") for name in (*MATCHING, *SOLVERS)),
        *((name, {"prediction_type": kind}, f'prediction_type: "{kind}"') for name in SOLVERS for kind in ("epsilon", "v_prediction", "sample")),
        *((name, {"thresholding": True}, "thresholding: true") for name in SOLVERS),
        *((name, {**DYNAMIC, "time_shift_type": "linear"}, 'time_shift_type: "linear"') for name in SOLVERS[1:4]),
        *((name, {**DYNAMIC, "time_shift_type": "cubic"}, 'time_shift_type: "cubic"') for name in ("FlowMatchEulerDiscrete", "UniPCMultistep")),
        *((name, DYNAMIC, "use_dynamic_shifting: true") for name in ("FlowMatchHeunDiscrete", "FlowMapEulerDiscrete", "SASolver")),
        ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, "stochastic_sampling: true"),
        ("FlowMatchLCM", {"scale_factors": [0.5, 1.0]}, r"scale_factors: \[0\.5, 1\.0\]"),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, r'algorithm_type: "sde-dpmsolver\+\+"'),
        *(
            ("FlowMatchEulerDiscrete", {"shift": bad}, f"shift: {re.escape(json.dumps(bad))}, which is not a number")
            for bad in ("3", None, True, [3])
        ),
        ("FlowMatchEulerDiscrete", {"shift": math.nan}, "shift: NaN, which is not a number"),
        *(("UniPCMultistep", {"flow_shift": bad}, f"flow_shift: {bad}, but a shift is above 0") for bad in (0, -3)),
        ("FlowMatchEulerDiscrete", {**DYNAMIC, "base_shift": None}, "base_shift: null, which is not a number"),
        ("FlowMatchEulerDiscrete", {**DYNAMIC, "max_image_seq_len": 256}, "both 256"),
        ("UniPCMultistep", {**DYNAMIC, "time_shift_type": "linear", "base_shift": -2}, r"mu: -1\.368, but a shift is above 0"),
    ],
)
def test_a_schedule_that_is_no_plain_shift_is_refused_by_name(tmp_path: Path, name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"^recipe key teacher\.pretrained: its scheduler {name}Scheduler has .*{said}.*; give .* teacher\.shift"):
        teacher_shift(stored(tmp_path, name, **options), TOKENS, SD3.mu)


@pytest.mark.parametrize("name", [*MATCHING, *SOLVERS])
def test_options_that_are_off_are_at_home_in_every_spelling(tmp_path: Path, name: str) -> None:
    off = {"use_karras_sigmas": None, "use_beta_sigmas": 0, "shift_terminal": 0.0, "invert_sigmas": None, "use_dynamic_shifting": None}
    assert teacher_shift(stored(tmp_path, name, **off), TOKENS, SD3.mu) == 1


@pytest.mark.parametrize("name", [*MATCHING, *SOLVERS])
def test_an_option_that_a_later_diffusers_adds_is_refused_when_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = schedules.defaults
    monkeypatch.setattr(schedules, "defaults", lambda cls: {**real(cls), "use_gamma_sigmas": False})
    assert teacher_shift(stored(tmp_path, name, use_gamma_sigmas=False), TOKENS, SD3.mu) == 1
    with pytest.raises(UserError, match="has use_gamma_sigmas: true"):
        teacher_shift(stored(tmp_path, name, use_gamma_sigmas=True), TOKENS, SD3.mu)


def test_every_other_class_of_diffusers_is_refused_by_name(tmp_path: Path) -> None:
    known = {f"{name}Scheduler" for name in (*MATCHING, *SOLVERS)}
    others = {name for name in dir(diffusers) if name.endswith("Scheduler")} - known
    assert {"EulerDiscreteScheduler", "HeliosScheduler", "DPMSolverMultistepInverseScheduler", "PiflowScheduler", "SCMScheduler"} <= others
    for name in (*sorted(others), "NoSuchScheduler"):
        with pytest.raises(UserError, match=rf"its scheduler is {name}, whose schedule .*; give .* teacher\.shift"):
            teacher_shift(stored(tmp_path, name.removesuffix("Scheduler"), shift=3.0, flow_shift=3.0, **FLOW), TOKENS, SD3.mu)


def test_classes_with_code_of_their_own_are_refused_by_name(tmp_path: Path) -> None:
    class FlowMatchEulerDiscreteScheduler(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            raise NotImplementedError

    with pytest.raises(UserError, match=r"its scheduler is \w*test_schedules\.FlowMatchEulerDiscreteScheduler, whose schedule"):
        teacher_shift(SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)), TOKENS, SD3.mu)
    stored(tmp_path, "FlowMatchEulerDiscrete", shift=3.0)
    edit_json(tmp_path / "model_index.json", scheduler=["my_schedules", "FlowMatchEulerDiscreteScheduler"])
    for own in ("FlowMatchEulerDiscreteScheduler", ["my_schedules", "FlowMatchEulerDiscreteScheduler"], None):
        edit_json(tmp_path / "scheduler" / "scheduler_config.json", _class_name=own)
        with pytest.raises(UserError, match=r"its scheduler is my_schedules\.FlowMatchEulerDiscreteScheduler, whose schedule"):
            teacher_shift(tmp_path, TOKENS, SD3.mu)


def test_the_class_is_found_wherever_the_folder_says_it(tmp_path: Path) -> None:
    stored(tmp_path, "UniPCMultistep", flow_shift=3.0)
    index, config = tmp_path / "model_index.json", tmp_path / "scheduler" / "scheduler_config.json"
    for entry in ([None, None], None, "UniPCMultistepScheduler", 3):
        edit_json(index, scheduler=entry)
        assert teacher_shift(tmp_path, TOKENS, SD3.mu) == 3
    edit_json(config, _class_name=["diffusers", "UniPCMultistepScheduler"])
    assert teacher_shift(tmp_path, TOKENS, SD3.mu) == 3
    edit_json(config, _class_name=None)
    with pytest.raises(UserError, match=r"its scheduler names no class; give .* teacher\.shift"):
        teacher_shift(tmp_path, TOKENS, SD3.mu)
    edit_json(index, scheduler=["diffusers", "UniPCMultistepScheduler"])
    assert teacher_shift(tmp_path, TOKENS, SD3.mu) == 3
    edit_json(config, _class_name="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(UserError, match=r"is a UniPCMultistepScheduler by model_index\.json and a FlowMatchEulerDiscreteScheduler by"):
        teacher_shift(tmp_path, TOKENS, SD3.mu)


@pytest.mark.parametrize("content", [None, "{", "[]", "3", '{"shift": 3', b"\xff\xfe{"])
def test_a_scheduler_that_cannot_be_read_is_one_clear_line(tmp_path: Path, content: str | bytes | None) -> None:
    config = stored(tmp_path, "FlowMatchEulerDiscrete") / "scheduler" / "scheduler_config.json"
    config.unlink()
    if content is not None:
        config.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"teacher\.pretrained: cannot read '.*scheduler_config\.json': [^\n]*; give .* teacher\.shift[^\n]*$"):
        teacher_shift(tmp_path, TOKENS, SD3.mu)
    with pytest.raises(UserError, match=r"teacher\.pretrained: the live SimpleNamespace has no scheduler; give .* teacher\.shift"):
        teacher_shift(SimpleNamespace(scheduler=None), TOKENS, SD3.mu)


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, True, "3", [3]])
def test_a_stated_shift_is_a_number_above_zero(bad: Any) -> None:
    with pytest.raises(UserError, match=r"recipe key teacher\.shift: .* is not a number above 0"):
        schedules.stated(bad)
    assert schedules.stated(np.float64(2.5)) == 2.5


def test_options_left_out_have_their_classes_own_defaults() -> None:
    live = tiny_sd3()
    for name in ("transformer", "vae"):
        component, part = read_component(live, name), getattr(live, name)
        assert component.classes == (type(part).__name__,)
        bare = type(component)(name, component.classes, {})
        default = {key: p.default for key, p in inspect.signature(type(part).__init__).parameters.items() if p.default is not p.empty}
        for key in ("sample_size", "patch_size") if name == "transformer" else ("block_out_channels", "scaling_factor"):
            assert bare.option(key) == default[key]
            assert component.option(key) == part.config[key]
