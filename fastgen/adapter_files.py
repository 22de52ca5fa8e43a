"""The adapters in a LoRA student's folder: its own, and those of its teacher, on which alone it is right."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fastgen.card import TEACHER_LORA, teacher_adapter
from fastgen.families import adapters
from fastgen.families.base import Family
from fastgen.roles import Role
from fastgen.surgery import lora


def save(pipeline_class: Any, family: Family, role: Role, folder: Path) -> None:
    """`pytorch_lora_weights.safetensors` in diffusers' key format; its header holds the rank, and says nothing that changes the network."""
    assert role.denoiser.adapter is not None
    layers, config = lora.exported(role.denoiser.backbone, role.denoiser.adapter)
    layers = {key: value.contiguous() for key, value in layers.items()}
    pipeline_class.save_lora_weights(
        folder, **{f"{family.component}_lora_layers": layers, f"{family.component}_lora_adapter_metadata": _plain(config)}
    )


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, list, set, dict, type(None)))


def save_teachers(family: Family, folder: Path) -> None:
    """Copies of the files that the teacher is tuned with, as they are."""
    for place, adapter in enumerate(adapters.of(family)):
        (folder / TEACHER_LORA).mkdir(exist_ok=True)
        shutil.copyfile(adapter.file, folder / _file(place))


def with_files(teacher: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of the teacher, with where `save_teachers` puts its adapters."""
    lora = teacher.get("lora", [])
    return teacher | ({"lora": [adapter | {"file": _file(place)} for place, adapter in enumerate(lora)]} if lora else {})


def _file(place: int) -> str:
    return f"{TEACHER_LORA}/{teacher_adapter(place)}.safetensors"
