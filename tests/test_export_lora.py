"""A LoRA file is one network, whichever of diffusers' ways loads it, with or without its header, whole or at half its weight."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from pipelines import adapter_tuning, in_a_run, student_info, student_role
from pipelines import same_interpreter as same_interpreter
from pipelines import sd3_folder as sd3_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen.export import Expert, export_lora, verify
from fastgen.families.sd3 import SD3
from fastgen.generator import ADAPTER_FILE, load_student, noise_from_seeds
from fastgen.roles import LoraTuning, Role, build_roles, student
from fastgen.surgery import lora

SEEDS = [0, 1]
PROMPTS = ["a red cat", "two boats at sea"]
Network = Callable[..., Any]
Way = Callable[[Any, Path], Network | None]  # loads a folder's adapter on a pipeline; returns what to call, None for its network


@pytest.fixture(scope="module")
def family(sd3_folder: Path) -> SD3:
    return SD3(sd3_folder, max_sequence_length=16)


@pytest.fixture(scope="module")
def teacher(sd3_folder: Path) -> Any:
    return StableDiffusion3Pipeline.from_pretrained(sd3_folder)


@pytest.fixture
def pipeline(teacher: Any) -> Any:
    """The plain teacher, with a network of its own."""
    return StableDiffusion3Pipeline(**{**teacher.components, "transformer": copy.deepcopy(teacher.transformer)})


def trained_role(family: SD3, alpha: float, *, weight: float = 1.0, rank: int = 4) -> Role:
    """A student whose adapter's whole effect is large; weight: of that effect."""
    role = student_role(family, tuning=LoraTuning(rank=rank, alpha=alpha, targets=SD3.lora_targets), noise=0.3)
    with torch.no_grad():
        for name, parameter in role.parameters().items():
            parameter.mul_(weight if "lora_B" in name else 1.0)
    return role


@torch.no_grad()
def output(family: SD3, network: Any) -> Tensor:
    """A network's own prediction on two samples."""
    x, t = noise_from_seeds(SEEDS, family.latent.shape), torch.tensor([0.9, 0.4])
    return family.call(network, x, t, family.encode_prompts(PROMPTS))


def role_output(family: SD3, role: Role) -> Tensor:
    lora.activate(role.denoiser.backbone, role.denoiser.adapter)
    return output(family, role.denoiser.backbone)


@pytest.fixture(scope="module", params=[7.0, 2.0], ids=["alpha 7", "alpha 2"])
def adapter(request: Any, family: SD3, sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A folder with an adapter of rank 4, and its alpha."""
    folder = tmp_path_factory.mktemp("adapter") / "student"
    export_lora(trained_role(family, request.param), family, student_info(sd3_folder), folder)
    return in_a_run(folder, sd3_folder), request.param


def by_folder(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(str(folder))


def by_file(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(str(folder / ADAPTER_FILE))


def by_weight_name(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(folder, weight_name=ADAPTER_FILE)


def by_subfolder(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(folder.parent, subfolder=folder.name, weight_name=ADAPTER_FILE)


def by_state_dict(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(load_file(folder / ADAPTER_FILE))


def by_diffusers_state_dict(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_into_transformer(pipeline.lora_state_dict(str(folder)), pipeline.transformer)


def by_name(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(str(folder), adapter_name="fast")
    assert pipeline.get_active_adapters() == ["fast"]


def by_name_from_a_state_dict(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(load_file(folder / ADAPTER_FILE), adapter_name="fast")


def on_the_network(pipeline: Any, folder: Path) -> None:
    pipeline.transformer.load_lora_adapter(folder, weight_name=ADAPTER_FILE)


def on_the_network_from_a_state_dict(pipeline: Any, folder: Path) -> None:
    pipeline.transformer.load_lora_adapter(load_file(folder / ADAPTER_FILE), prefix="transformer")


def without_its_header(pipeline: Any, folder: Path) -> None:
    """As tools leave it that rewrite files."""
    save_file(load_file(folder / ADAPTER_FILE), stripped := folder.parent / "stripped.safetensors")
    pipeline.load_lora_weights(str(stripped))


def hotswapped(pipeline: Any, folder: Path) -> None:
    """Over an adapter of the same layers that does nothing."""
    pipeline.load_lora_weights({key: torch.zeros_like(value) for key, value in load_file(folder / ADAPTER_FILE).items()}, adapter_name="fast")
    pipeline.load_lora_weights(str(folder), adapter_name="fast", hotswap=True)


def hotswapped_from_a_state_dict(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights({key: torch.zeros_like(value) for key, value in load_file(folder / ADAPTER_FILE).items()}, adapter_name="fast")
    pipeline.load_lora_weights(load_file(folder / ADAPTER_FILE), adapter_name="fast", hotswap=True)


def fused(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(load_file(folder / ADAPTER_FILE))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


LOADS = (by_folder, by_file, by_weight_name, by_subfolder, by_state_dict, by_diffusers_state_dict, by_name, by_name_from_a_state_dict, on_the_network)
LOADS += (on_the_network_from_a_state_dict, without_its_header, hotswapped, hotswapped_from_a_state_dict, fused)


def named(functions: Sequence[Any]) -> list[Any]:
    return [pytest.param(function, id=function.__name__) for function in functions]


@pytest.mark.parametrize("load", named(LOADS))
def test_every_way_to_load_an_adapter_gives_the_network_that_was_trained(load: Way, adapter: tuple[Path, float], family: SD3, pipeline: Any) -> None:
    folder, alpha = adapter
    expected, plain = role_output(family, trained_role(family, alpha)), output(family, pipeline.transformer)
    load(pipeline, folder)
    drawn = output(family, pipeline.transformer)
    assert (plain - expected).abs().max() > 0.1, "the adapter must show"
    assert (drawn - expected).abs().max() <= 1e-5


def set_to_half(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(load_file(folder / ADAPTER_FILE), adapter_name="fast")
    pipeline.set_adapters("fast", 0.5)


def folder_set_to_half(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(str(folder), adapter_name="fast")
    pipeline.set_adapters(["fast"], adapter_weights=[0.5])


def half_fused(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(load_file(folder / ADAPTER_FILE))
    pipeline.fuse_lora(lora_scale=0.5)


def folder_half_fused(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(str(folder))
    pipeline.fuse_lora(lora_scale=0.5)


def called_at_half(pipeline: Any, folder: Path) -> Network:
    pipeline.load_lora_weights(load_file(folder / ADAPTER_FILE))
    return lambda **inputs: pipeline.transformer(**inputs, joint_attention_kwargs={"scale": 0.5})


def folder_called_at_half(pipeline: Any, folder: Path) -> Network:
    pipeline.load_lora_weights(str(folder))
    return lambda **inputs: pipeline.transformer(**inputs, joint_attention_kwargs={"scale": 0.5})


HALVES = (set_to_half, folder_set_to_half, half_fused, folder_half_fused, called_at_half, folder_called_at_half)


@pytest.mark.parametrize("load", named(HALVES))
def test_half_a_weight_is_the_base_and_half_of_the_adapter(load: Way, adapter: tuple[Path, float], family: SD3, pipeline: Any) -> None:
    folder, alpha = adapter
    expected = role_output(family, trained_role(family, alpha, weight=0.5))
    network = load(pipeline, folder) or pipeline.transformer
    drawn = output(family, network)
    assert (role_output(family, trained_role(family, alpha)) - expected).abs().max() > 0.1
    assert (drawn - expected).abs().max() <= 1e-5


def test_a_pipeline_call_at_half_weight_draws_the_half_adapters_pictures(
    adapter: tuple[Path, float], family: SD3, pipeline: Any, sd3_folder: Path, tmp_path: Path
) -> None:
    folder, alpha = adapter
    half = export_lora(trained_role(family, alpha, weight=0.5), family, student_info(sd3_folder), tmp_path / "half")
    student = load_student(half, teacher_dir=sd3_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = family.export_scheduler()
    by_state_dict(pipeline, folder)
    call = json.loads((half / "fastgen.json").read_text())["call"] | {"joint_attention_kwargs": {"scale": 0.5}}
    images = pipeline(PROMPTS, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], output_type="np", **call).images
    assert (torch.from_numpy(images).permute(0, 3, 1, 2) - student(PROMPTS, SEEDS)).abs().max() <= 1e-5


def test_the_file_says_scale_one_in_every_convention(adapter: tuple[Path, float], family: SD3) -> None:
    from diffusers.utils import convert_state_dict_to_kohya

    folder, alpha = adapter
    role = trained_role(family, alpha)
    state, own = load_file(folder / ADAPTER_FILE), {lora.own_name(key, "student"): value for key, value in role.parameters().items()}
    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert header["transformer.lora_alpha"] == header["transformer.r"] == 4
    assert not header["transformer.use_rslora"] and not header["transformer.alpha_pattern"] and not header["transformer.rank_pattern"]
    kohya = convert_state_dict_to_kohya(dict(state))  # Automatic1111, ComfyUI and others read these
    assert len(kohya) == 3 * len(own) / 2
    for key, up in own.items():
        if "lora_B" not in key:
            continue
        down = own[key.replace("lora_B", "lora_A")]
        effect = alpha / 4 * up.double() @ down.double()
        a, b = (state[f"transformer.{name}"].double() for name in (key.replace("lora_B", "lora_A"), key))
        assert (b @ a - effect).abs().max() <= 1e-6 * effect.abs().max()
        name = f"transformer.{key.removesuffix('.lora_B.weight')}".replace(".", "_")
        names = [found for found in kohya if found.replace(".", "_").startswith(f"{name}_")]
        a, b, rank_alpha = (next(kohya[found] for found in names if end in found) for end in ("down", "up", "alpha"))
        assert (rank_alpha / len(a) * b.double() @ a.double() - effect).abs().max() <= 1e-6 * effect.abs().max()


def as_before(backbone: Any, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What earlier versions wrote: the factors as they were trained, and alpha in the header alone."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(backbone, adapter_name=name), backbone.peft_config[name].to_dict()


@pytest.mark.usefixtures("same_interpreter")
def test_folders_of_earlier_versions_still_load(
    family: SD3, pipeline: Any, sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    role, info = trained_role(family, 7.0), student_info(sd3_folder)
    now = export_lora(role, family, info, tmp_path / "now")
    monkeypatch.setattr(lora, "exported", as_before)
    before = in_a_run(export_lora(role, family, info, tmp_path / "before"), sd3_folder)
    own, scaled = load_file(before / ADAPTER_FILE), load_file(now / ADAPTER_FILE)
    assert any((value - scaled[key]).abs().max() > 0.1 for key, value in own.items())
    assert (load_student(before)(PROMPTS, SEEDS) - load_student(now)(PROMPTS, SEEDS)).abs().max() <= 1e-5
    assert verify(before).passed
    by_folder(pipeline, before)
    assert (output(family, pipeline.transformer) - role_output(family, role)).abs().max() <= 1e-5


def test_each_expert_is_one_network_too(family: SD3, pipeline: Any, sd3_folder: Path, tmp_path: Path) -> None:
    roles = build_roles(dict.fromkeys(["student", "student_2"], student()), family, family.load_backbone(), tuning=adapter_tuning())
    noises = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for role in roles.values():
            for parameter in role.parameters().values():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=noises))
    folder = export_lora([Expert(roles["student"], 0.75), Expert(roles["student_2"])], family, student_info(sd3_folder), tmp_path / "student")
    for k in (1, 2):
        pipeline.load_lora_weights(load_file(folder / f"expert_{k}" / ADAPTER_FILE), adapter_name=f"expert_{k}")
    outputs = [role_output(family, role) for role in roles.values()]
    assert (outputs[0] - outputs[1]).abs().max() > 0.1
    for k, expected in enumerate(outputs, 1):
        pipeline.set_adapters(f"expert_{k}")
        assert (output(family, pipeline.transformer) - expected).abs().max() <= 1e-5


@pytest.mark.usefixtures("same_interpreter")
def test_a_scaled_adapter_verifies(adapter: tuple[Path, float]) -> None:
    assert verify(adapter[0]).passed
