"""One method on one family: a few steps, what they moved, and the exported student in plain diffusers. Cells of README's matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pipelines import verifying_here

from fastgen import run
from fastgen.config import Recipe, validate
from fastgen.export import export_lora, export_student, verify
from fastgen.families.base import Family
from fastgen.plan import plan

METHODS: dict[str, dict[str, Any]] = {
    "dmd2": {"critic_updates": 1},
    "scm": {"warmup": 1},
    "lcm": {"guidance": [1.0, 2.5], "num_times": 8, "skip": 2},
    "tbcm": {"trajectory": {"evaluations": 4}, "warmup": 1},
}
_FROM_IMAGES = ("scm", "lcm")
PROMPTS = ["a red cat", "two boats at sea"]


def in_full_or_adapters(method: str, *, lora: bool) -> pytest.MarkDecorator:
    """Every method with full weights and with adapters, as `method` and `lora`; all but the given one are slow."""
    cases = [(name, tuned) for name in METHODS for tuned in (False, True)]
    marks = {case: () if case == (method, lora) else (pytest.mark.slow,) for case in cases}
    return pytest.mark.parametrize(("method", "lora"), [pytest.param(*case, marks=marks[case]) for case in cases])


def check_cell(source: Path, method: str, folder: Path, *, lora: bool = False, prompts: list[str] = PROMPTS, **teacher: Any) -> None:
    """Train for two steps in `folder`, with all that stock's output depends on moving; export; draw in plain diffusers what we draw.

    source: a saved pipeline. lora: adapters, which are exported as such where the method has no scalar input. teacher: of the recipe's block.
    """
    planned = plan(_recipe(source, method, folder, lora=lora, prompts=prompts, teacher=teacher))
    running = run.build(planned, run.Progress())
    student = running.roles["student"]
    before = {name: parameter.detach().clone() for name, parameter in student.parameters().items()}
    for _ in range(2):
        running.trainer.train_step()
    moved = {name for name, parameter in student.parameters().items() if not torch.equal(parameter, before[name])}
    assert before.keys() - _idle(planned.family, prompts, before) <= moved
    assert all(parameter.isfinite().all() for parameter in student.parameters().values())
    as_adapter = lora and not student.spec.inputs
    output = folder / "student"
    (export_lora if as_adapter else export_student)(running.averaged(), planned.family, running.info(), output)
    with verifying_here():
        result = verify(output, seeds=(0, 1), teacher_dir=source if as_adapter else None)
    assert result.passed, result


def _recipe(source: Path, method: str, folder: Path, *, lora: bool, prompts: list[str], teacher: Mapping[str, Any]) -> Recipe:
    texts = folder / "prompts.txt"
    texts.write_text("\n".join(prompts) + "\n")
    optimizer = {"lr": 1e-3, "weight_decay": 0.0}
    return validate(
        Recipe,
        {
            "teacher": {"pretrained": str(source), "guidance": 2.0, **teacher},
            "student": {"steps": 2, "tune": {"lora": {"rank": 2, "alpha": 3}} if lora else "full"},
            "distiller": {"name": method, **METHODS[method]},
            "data": {"images": str(_images(folder, prompts))} if method in _FROM_IMAGES else {"prompts": str(texts)},
            "optimizer": {"student": optimizer, **({"fake_score": optimizer} if method == "dmd2" else {})},
            "train": {"steps": 2, "batch_size": 2, "ema": 0.0, "device": "cpu"},
        },
    )


def _images(folder: Path, prompts: list[str]) -> Path:
    """Smooth pictures with captions."""
    pictures = folder / "images"
    pictures.mkdir()
    for i, prompt in enumerate(prompts):
        Image.linear_gradient("L").rotate(90 * i).convert("RGB").save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(prompt)
    return pictures


def _idle(family: Family, prompts: list[str], trained: Iterable[str]) -> set[str]:
    """Of trained parameters those on which stock's output does not depend: of its network, and adapters of its layers."""
    network = family.load_backbone()
    cond = family.encode_prompts(prompts)
    x = torch.randn(len(prompts), *family.latent.shape, generator=torch.Generator().manual_seed(0))
    out = family.call(network, x, torch.full((len(prompts),), 0.6 * family.path.t_max), cond)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    idle = {name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    return {name for name in trained if name in idle or f"{name.partition('.lora_')[0]}.weight" in idle}
