"""The path of every known discrete scheduler against the real class's own table; every other class, option or form of betas refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_dit
import tiny_pixart
import tiny_sd15
import tiny_sdxl
import torch

from fastgen.errors import UserError
from fastgen.families import betas
from fastgen.families.betas import KINDS, teacher_path
from fastgen.families.components import defaults
from fastgen.path import DiscreteVP

CLASSES = sorted(name.removesuffix("Scheduler") for name in betas._CLASSES)
CLIPPING = ("DDIM", "DDPM")  # by their own default
ZERO_SNR = ("DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM", "TCD")
AT_2_24 = ("EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep")
TRAINED = [0.001, 0.004, 0.002, 0.03, 0.2]


def options_of(name: str, **options: Any) -> dict[str, Any]:
    return {**({"clip_sample": False} if name in CLIPPING else {}), **options}


def stock(name: str, **options: Any) -> Any:
    return getattr(diffusers, f"{name}Scheduler").from_config(options_of(name, **options))


def stored(folder: Path, name: str, **options: Any) -> Path:
    """A pipeline's folder with nothing but this scheduler's configuration, as an older version or another class may have written it."""
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", f"{name}Scheduler"]}))
    config = {"_class_name": f"{name}Scheduler", **options_of(name, **options)}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def assert_is_the_table(path: DiscreteVP, scheduler: Any, skip: int = 0) -> None:
    """To the bit, but for the last `skip` steps."""
    count = len(scheduler.betas)
    alpha, _ = path.coeffs(torch.arange(1, count + 1, dtype=torch.float64) / count)
    assert path.num_steps == scheduler.config.num_train_timesteps == count
    assert list(path.betas) == scheduler.betas.tolist()
    assert ((alpha**2)[: count - skip] - scheduler.alphas_cumprod[: count - skip].double()).abs().max() <= 1e-15


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_start": 0.0003, "beta_end": 0.017, "num_train_timesteps": 600},
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "linear", "beta_end": 0.03},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
        {"trained_betas": TRAINED, "num_train_timesteps": 5},
    ],
    ids=["defaults", "numbers", "scaled_linear", "linear", "cosine", "trained"],
)
@pytest.mark.parametrize("name", CLASSES)
def test_betas_are_those_of_the_class(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    scheduler = stock(name, **options)
    path, kind = teacher_path(stored(tmp_path, name, **options))
    assert kind == "eps"
    assert_is_the_table(path, scheduler)
    assert teacher_path(SimpleNamespace(scheduler=scheduler)) == (path, "eps")


def test_defaults_differ_between_classes(tmp_path: Path) -> None:
    found = {teacher_path(stored(tmp_path, name))[0] for name in CLASSES}
    expected = {DiscreteVP.linear(1000, 0.0001, 0.02), DiscreteVP.scaled_linear(1000, 0.00085, 0.012), DiscreteVP.linear(1000, 0.00085, 0.012)}
    assert found == expected


@pytest.mark.parametrize("name", CLASSES)
def test_kinds_are_those_that_the_class_steps_by(tmp_path: Path, name: str) -> None:
    """The kinds refused are those with which the class's own first step raises."""
    for prediction, kind in KINDS.items():
        scheduler = stock(name, prediction_type=prediction, num_train_timesteps=50)
        scheduler.set_timesteps(4)
        x, out = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 0.3)
        if prediction in betas._CLASSES[f"{name}Scheduler"]:
            assert teacher_path(stored(tmp_path, name, prediction_type=prediction))[1] == kind
            assert torch.isfinite(scheduler.step(out, scheduler.timesteps[0], x).prev_sample).all()
            continue
        with pytest.raises(UserError, match=rf"{name}Scheduler has prediction_type: \"{prediction}\".*it follows epsilon, v_prediction of"):
            teacher_path(stored(tmp_path, name, prediction_type=prediction))
        with pytest.raises((NotImplementedError, ValueError)):
            scheduler.step(out, scheduler.timesteps[0], x)


@pytest.mark.parametrize("name", CLASSES)
def test_zero_terminal_snr(tmp_path: Path, name: str) -> None:
    options = {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    scheduler = stock(name, **options)
    path, kind = teacher_path(stored(tmp_path, name, **options))
    assert kind == "v" and path.zero_snr == (name in ZERO_SNR)  # elsewhere the key does not act
    assert_is_the_table(path, scheduler, skip=name in AT_2_24)
    assert (scheduler.alphas_cumprod[-1].item() == 2**-24) == (name in AT_2_24)
    if path.zero_snr:
        end = rf"{name}Scheduler has betas that end in pure noise, where its prediction_type epsilon says nothing of the picture"
        with pytest.raises(UserError, match=f"recipe key teacher.pretrained: its scheduler {end}"):
            teacher_path(stored(tmp_path, name, **options | {"prediction_type": "epsilon"}))


@pytest.mark.parametrize("name", CLASSES)
def test_how_and_where_the_class_steps_changes_nothing(tmp_path: Path, name: str) -> None:
    own = defaults(f"{name}Scheduler")
    others = {
        "timestep_spacing": "trailing", "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True, "final_sigmas_type": "sigma_min",
        "use_karras_sigmas": True, "solver_order": 1, "lower_order_final": False, "euler_at_final": True, "algorithm_type": "dpmsolver++",
        "variance_type": "learned_range", "original_inference_steps": 4, "timestep_scaling": 5.0, "solver_type": "midpoint", "sigma_min": 0.1,
    }  # fmt: skip
    given = {key: value for key, value in others.items() if key in own}
    assert teacher_path(stored(tmp_path, name, **given)) == teacher_path(stored(tmp_path, name))


@pytest.mark.parametrize("name", CLASSES)
def test_options_that_make_it_another_process_are_refused(tmp_path: Path, name: str) -> None:
    own = defaults(f"{name}Scheduler")
    for key, value in {"use_flow_sigmas": True, "use_dynamic_shifting": True, "thresholding": True, "timestep_type": "continuous"}.items():
        if key in own:
            with pytest.raises(UserError, match=rf"teacher.pretrained: its scheduler {name}Scheduler has {key}: {json.dumps(value)}, which"):
                teacher_path(stored(tmp_path, name, **{key: value}))
        else:
            teacher_path(stored(tmp_path, name, **{key: value}))
    if "clip_sample" in own:
        with pytest.raises(UserError, match=rf"{name}Scheduler has clip_sample: true, which fastgen does not follow"):
            teacher_path(stored(tmp_path, name, clip_sample=True))


def test_a_missing_clip_sample_is_the_classs_default(tmp_path: Path) -> None:
    folder = stored(tmp_path, "DDIM")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(UserError, match="DDIMScheduler has clip_sample: true"):
        teacher_path(folder)


def test_options_of_a_later_diffusers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(betas, "defaults", lambda name: {**defaults(name), "bend_betas": False})
    teacher_path(stored(tmp_path, "DDIM"))
    with pytest.raises(UserError, match="DDIMScheduler has bend_betas: true, which fastgen does not follow"):
        teacher_path(stored(tmp_path, "DDIM", bend_betas=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "sigmoid"}, r'key beta_schedule: must be \'linear\', \'scaled_linear\' or \'squaredcos_cap_v2\', not "sigmoid"'),
        ({"beta_schedule": "exp"}, r'key beta_schedule: must be .*, not "exp"'),
        ({"beta_start": -0.1}, r"key beta_start: must be greater than 0, not -0.1"),
        ({"beta_end": 1.5}, r"key beta_end: must be less than 1, not 1.5"),
        ({"beta_start": "small"}, r'key beta_start: must be a number, not "small"'),
        ({"num_train_timesteps": 0}, r"key num_train_timesteps: must be greater than or equal to 1, not 0"),
        ({"num_train_timesteps": 10**9}, r"key num_train_timesteps: must be less than or equal to 100000"),
        ({"num_train_timesteps": 1000.5}, r"key num_train_timesteps: must be a whole number, not 1000.5"),
        ({"trained_betas": TRAINED}, r"has 5 trained_betas for num_train_timesteps: 1000"),
        ({"trained_betas": "many"}, r'key trained_betas: must be a list, not "many"'),
        ({"trained_betas": [0.1, "x"], "num_train_timesteps": 2}, r'key trained_betas.1: must be a number, not "x"'),
        ({"trained_betas": [0.1, 1.2], "num_train_timesteps": 2}, r"betas must lie between 0 and 1"),
        ({"beta_end": 0.9999}, r"betas must lie between 0 and 1.*fp32"),
        ({"prediction_type": "flow_prediction"}, r'has prediction_type: "flow_prediction", which fastgen does not follow'),
        ({"prediction_type": None}, r"has prediction_type: null"),
    ],
)
def test_betas_that_are_none_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    for name in ("DDPM", "LCM"):
        with pytest.raises(UserError, match=rf"recipe key teacher.pretrained: its scheduler {name}Scheduler.*{message}") as caught:
            teacher_path(stored(tmp_path, name, **options))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "EDMEuler", "EDMDPMSolverMultistep", "CosineDPMSolverMultistep", "DDIMInverse", "SCM"])
def test_other_classes_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"teacher.pretrained: its scheduler is {name}Scheduler, whose betas fastgen does not know")):
        teacher_path(stored(tmp_path, name))


def test_a_scheduler_of_two_classes_or_none_is_refused(tmp_path: Path) -> None:
    folder = stored(tmp_path, "DDIM")
    (folder / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", "PNDMScheduler"]}))
    with pytest.raises(UserError, match=r"its scheduler is a PNDMScheduler by model_index.json and a DDIMScheduler by scheduler_config.json"):
        teacher_path(folder)
    (folder / "model_index.json").write_text(json.dumps({"scheduler": [None, None]}))
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(UserError, match="its scheduler names no class"):
        teacher_path(folder)


def test_a_live_schedulers_array_of_betas(tmp_path: Path) -> None:
    scheduler = stock("DDIM", trained_betas=np.array(TRAINED, dtype=np.float32), num_train_timesteps=5)
    path, _ = teacher_path(SimpleNamespace(scheduler=scheduler))
    assert_is_the_table(path, scheduler)


def test_the_tiny_pipelines_and_their_folders(tmp_path: Path) -> None:
    built = {
        "sd15": (tiny_sd15.tiny_sd15(), DiscreteVP.scaled_linear(900, 0.0011, 0.013), "eps"),
        "sd21": (tiny_sd15.tiny_sd15(prediction_type="v_prediction"), DiscreteVP.scaled_linear(900, 0.0011, 0.013), "v"),
        "sdxl": (tiny_sdxl.tiny_sdxl(), DiscreteVP.scaled_linear(1000, 0.0009, 0.0125), "eps"),
        "pixart": (tiny_pixart.tiny_pixart(), DiscreteVP.linear(800, 0.0002, 0.025), "eps"),
        "dit": (tiny_dit.tiny_dit(), DiscreteVP.linear(700, 0.0003, 0.03), "eps"),
    }
    for name, (pipeline, *expected) in built.items():
        pipeline.save_config(tmp_path / name)
        pipeline.scheduler.save_pretrained(tmp_path / name / "scheduler")
        assert [*teacher_path(pipeline)] == [*teacher_path(tmp_path / name)] == expected
