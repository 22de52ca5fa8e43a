"""The plan's figure of memory is the sum of the tensors that the built run then holds; encoders and decoder take what training takes at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow import needs_bitsandbytes
from pipelines import sd3_folder as sd3_folder
from test_plan import recipe as recipe
from torch import Tensor

from fastgen.config import Recipe, validate
from fastgen.data.rows import Held
from fastgen.families.sd3 import SD3
from fastgen.outlook import describe
from fastgen.plan import plan
from fastgen.run import Progress, build
from fastgen.run.building import Run

ROLES = ("student", "fake_score")


def toy(method: str = "dmd2", optimizer: str = "adamw", **changes: Any) -> Recipe:
    return validate(
        Recipe,
        {
            "teacher": {"pretrained": "toy:mixture", "guidance": 2.0},
            "student": {"steps": 1},
            "distiller": {"name": method},
            "data": {"prompts": str(changes.pop("prompts"))},
            "optimizer": {"student": {"lr": 1e-3, "name": optimizer}, "fake_score": {"lr": 1e-3}},
            "train": {"steps": 1, "batch_size": 4, "device": "cpu"},
            **changes,
        },
    )


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def held(run: Run) -> tuple[int, int]:
    """Bytes of networks with what trains them, gradients at their most, and of the encoded data, after one step."""
    trainer = run.trainer
    gradients: list[int] = []
    trained = [parameter for parameters in trainer.parameters.values() for parameter in parameters]
    for optimizer in trainer.optimizers.values():
        optimizer.register_step_pre_hook(lambda *_: gradients.append(size(p.grad for p in trained if p.grad is not None)))
    modules = [role.denoiser for role in run.roles.values()]
    trainer.train_step()
    networks = size(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    states = size(
        value
        for optimizer in trainer.optimizers.values()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    averages = size(tensor for average in trainer.ema.values() for tensor in average.shadow.values())
    (data,) = run.data.parts
    rows = [tensor for table in (data.cond, data.latents) if isinstance(table, Held) for tensor in table.tensors.values()]
    tables = [data.cumulative, *(t for pair in data.captions or [] for t in pair)]
    return networks + states + averages + max(gradients), size([*rows, *trainer.distiller.setting.negative.values(), *tables])


def compare(given: Recipe) -> None:
    planned = plan(given, only="train")
    outcome = describe(planned)
    networks, data = held(build(planned, Progress()))
    assert (outcome["network_bytes"], outcome["data_bytes"]) == (networks, data)
    assert outcome["bytes"] == networks + data


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", pytest.param("adamw8bit", marks=needs_bitsandbytes)])
def test_a_closed_form_run_takes_what_the_plan_says(optimizer: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("0\n1\n2\n")
    compare(toy(optimizer=optimizer, prompts=tmp_path / "prompts.txt"))


@pytest.mark.parametrize(
    "changes",
    [{}, {"student": {"tune": {"lora": {"rank": 2}}}}, {"train": {"precision": "bf16"}}],
    ids=["full", "lora", "bf16"],
)
def test_a_pipeline_takes_what_the_plan_says(changes: dict[str, Any], recipe: Callable[..., Recipe]) -> None:
    compare(recipe(**changes))


@pytest.mark.parametrize("tune", ["full", {"lora": {"rank": 2}}], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kept", [{"dtype": "bf16"}, {"dtype": "fp32"}, {"quantise": "fp8"}, {"dtype": "bf16", "quantise": "int8"}], ids=str)
def test_a_held_teacher_takes_what_the_plan_says(kept: dict[str, str], precision: str, tune: Any, recipe: Callable[..., Recipe]) -> None:
    given = recipe(teacher=kept, student={"tune": tune}, train={"precision": precision})
    compare(given)
    whole = recipe(teacher={"dtype": "fp32"}, student={"tune": tune}, train={"precision": precision})
    before, now = (describe(plan(each, only="train")) for each in (whole, given))
    assert now["parameters"] == before["parameters"]
    if kept != {"dtype": "fp32"}:
        assert now["network_bytes"] < before["network_bytes"]


def test_what_lies_on_the_cpu_does_not_count(recipe: Callable[..., Recipe]) -> None:
    def taken(**keys: Any) -> int:
        return describe(plan(recipe(**keys), only="train"))["network_bytes"]

    run = build(plan(recipe(), only="train"), Progress())
    run.trainer.train_step()
    teacher = run.roles["teacher"].denoiser
    student, critic = (size(value for state in run.trainer.optimizers[name].state.values() for value in state.values()) for name in ROLES)
    assert taken() - taken(teacher={"offload": True}) == size([*teacher.parameters(), *teacher.buffers()])
    assert taken() - taken(train={"ema_device": "cpu"}) == size(run.trainer.ema["student"].shadow.values())
    assert student == critic and taken() - taken(train={"offload_optimizers": True}) == student, "one of the two at a time"


def test_images_and_a_discriminator_count_too() -> None:
    keys = ["distiller.gan={}", "data={images: 'fastgen:digits'}", "optimizer.discriminator.lr=0.001", "train.batch_size=2", "train.device=cpu"]
    compare(Recipe.load("digits_dmd2_1step", keys))


def test_encoders_and_decoder_take_what_training_takes_at_once(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def noting(method: str) -> None:
        before = getattr(SD3, method)
        monkeypatch.setattr(SD3, method, lambda self, batch: taken.append(len(batch)) or before(self, batch))

    noting("encode_texts")
    noting("encode_latents")
    planned = plan(recipe(train={"batch_size": 4, "micro_batch": 2}))
    run = build(planned, Progress())
    assert max(taken) == 2
    encoded = run.data.conditioning(run.data.prompts)
    assert encoded["pooled_projections"].shape[0] == 3
    assert describe(planned)["micro_batch"] == 2
    reference = torch.cat([planned.family.encode_prompts([text])["encoder_hidden_states"] for text in run.data.prompts])
    torch.testing.assert_close(encoded["encoder_hidden_states"], reference, rtol=1e-5, atol=1e-5)
