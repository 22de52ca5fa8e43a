"""Compiled blocks: the same numbers but for rounding, the same names, and tangents that still are exact."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from fastgen import checkpoint, doctor, run
from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.plan import plan
from fastgen.surgery import compiled
from fastgen.trainer import Metrics, Trainer

LACK = compiled.missing(torch.device("cpu"))
needs_compiler = pytest.mark.skipif(LACK is not None, reason=f"torch.compile does not work here: {LACK}")
LORA = "student.tune={lora: {rank: 4}}"
KEYS = ("train.batch_size=4", "train.steps=3", "train.sample_every=0", "train.device=cpu", "evaluate.protocol=null")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another run compiled for another ATEN_CPU_CAPABILITY is found in torch's cache all the same, and does not compile for this one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are traced and guarded as when they are compiled, but then run as they were traced: a tenth of the time."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))


def built(recipe: str, *overrides: str) -> Trainer:
    """In fp64."""
    planned = plan(Recipe.load(recipe, [*KEYS, *overrides]), only="train")
    load = planned.family.load_backbone
    planned.family.load_backbone = lambda **asked: load(**asked).double()  # type: ignore[method-assign]
    return run.build(planned, run.Progress()).trainer


def trained(trainer: Trainer) -> list[Metrics]:
    rows: list[Metrics] = []
    trainer.run([lambda _step, metrics: rows.append({k: v for k, v in metrics.items() if k not in ("seconds", "samples_per_second")})])
    return rows


def assert_rounding(recipe: str, *overrides: str) -> Trainer:
    """A compiled run, which differs from the plain one by nothing else."""
    plain, fast = built(recipe, *overrides), built(recipe, *overrides, "train.compile=blocks")
    assert num_compiled(plain) == 0 < num_compiled(fast)
    names = {name: list(role.parameters()) for name, role in plain.roles.items()}
    assert names == {name: list(role.parameters()) for name, role in fast.roles.items()}
    torch._dynamo.utils.counters.clear()
    expected, found = trained(plain), trained(fast)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0 == len(torch._dynamo.utils.counters["graph_break"])
    for want, row in zip(expected, found, strict=True):
        assert row == pytest.approx(want, rel=1e-9, abs=1e-12)
    return fast


def num_compiled(trainer: Trainer) -> int:
    return sum(part._compiled_call_impl is not None for role in trainer.roles.values() for part in role.denoiser.modules())


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), (LORA, "train.checkpointing=true")], ids=["full", "adapters, recomputed"])
def test_traced_blocks_change_nothing(traced: None, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    trainer = assert_rounding("digits_dmd2_1step", *overrides)
    path = checkpoint.save(tmp_path, trainer, {}, keep=1)
    plain = built("digits_dmd2_1step", *overrides)
    checkpoint.load(path, plain)  # names of parameters, averages and moments
    assert plain.step == 3


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [("digits_dmd2_1step", ()), ("digits_dmd2_1step", (LORA, "train.checkpointing=true")), ("digits_scm_2step", (LORA,))],
    ids=["full", "adapters, recomputed", "tangents"],
)
def test_compiled_blocks_change_numbers_by_rounding(recipe: str, overrides: tuple[str, ...]) -> None:
    assert_rounding(recipe, *overrides)


@pytest.mark.slow
def test_tangents_run_uncompiled_and_say_so_once(traced: None) -> None:
    with pytest.warns(UserWarning, match="exact tangents run through compiled blocks uncompiled") as said:
        assert_rounding("digits_scm_2step")
    assert len({str(warning.message) for warning in said if "tangents" in str(warning.message)}) == 1
    assert sum("tangents" in str(warning.message) for warning in said) == 1


@needs_compiler
def test_a_compiled_block_of_its_own(tmp_path: Path) -> None:
    """The smallest block through the real compiler: values, gradients, names, copies."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, names = torch.randn(5, 3, dtype=torch.float64), list(block.state_dict())
    want = block(x)
    want.sum().backward()
    gradients = [parameter.grad.clone() for parameter in block.parameters() if parameter.grad is not None]
    block.zero_grad()
    compiled.compile_blocks([block, block])
    found = block(x)
    found.sum().backward()
    assert torch.allclose(found, want, rtol=1e-12, atol=0) and list(block.state_dict()) == names
    for parameter, gradient in zip(block.parameters(), gradients, strict=True):
        assert parameter.grad is not None and torch.allclose(parameter.grad, gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("teacher.offload=true",), r"its blocks come to the device one at a time \(teacher\.offload\)"),
        (("student.moe.experts=4",), r"which experts a token uses is not known beforehand \(student\.moe\)"),
    ],
)
def test_what_cannot_be_compiled_is_refused(overrides: tuple[str, ...], said: str) -> None:
    recipe = "digits_dense2moe" if "moe" in overrides[0] else "digits_dmd2_1step"
    with pytest.raises(UserError, match=rf"^recipe key train\.compile: blocks cannot be compiled: {said}; remove it$"):
        plan(Recipe.load(recipe, [*overrides, "train.compile=blocks"]))


def test_without_a_compiler_the_plan_refuses_and_the_doctor_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    lack = r"the compiler 'g\+\+' is not installed"
    with pytest.raises(UserError, match=rf"^recipe key train\.compile: blocks cannot be compiled: {lack} [^\n]*; remove it$"):
        plan(Recipe.load("digits_dmd2_1step", ["train.compile=blocks", "train.device=cpu"]))
    assert dict(doctor.doctor_report())["compile, cpu"].startswith("not possible: the compiler 'g++' is not installed")
    plan(Recipe.load("digits_dmd2_1step", ["train.device=cpu"]))


def test_another_name_of_the_key_is_refused() -> None:
    with pytest.raises(UserError, match=r"recipe key train\.compile"):
        Recipe.load("digits_dmd2_1step", ["train.compile=all"])
