"""What a family's pipeline cannot do is refused in the plan, by the recipe key that asks for it."""

from __future__ import annotations

from typing import Any

import pytest

from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.families import family_class, family_names
from fastgen.families.sd3 import SD3
from fastgen.plan import plan

LORA = ["student.tune={lora: {rank: 2}}", "export.weights=lora"]


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    load = SD3.load_backbone
    monkeypatch.setattr(SD3, "load_backbone", lambda self, *, meta=False: load(self, meta=True) if meta else pytest.fail("weights were read"))


def planned(*overrides: str) -> Any:
    return plan(Recipe.load("digits_dmd2_1step", overrides))


def test_lora_files_where_the_pipeline_loads_none(monkeypatch: pytest.MonkeyPatch) -> None:
    planned(*LORA)
    monkeypatch.setattr(SD3, "loads_lora", False)
    said = r"export\.weights: StableDiffusion3Pipeline loads no LoRA files; `export\.weights: full` merges it"
    with pytest.raises(UserError, match=f"^recipe key {said}"):
        planned(*LORA)
    assert planned(LORA[0]).tuning.rank == 2  # an adapter can still be trained, and merged


def test_every_family_says_whether_its_pipeline_loads_lora_files() -> None:
    import diffusers

    for family in map(family_class, family_names()):
        for name in family.pipeline_classes:
            assert family.loads_lora == hasattr(getattr(diffusers, name), "load_lora_weights"), name


def test_explicit_times_where_the_call_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned("student.grid=[0.9]").setting({}).grid.tolist() == [0.9]
    monkeypatch.setattr(SD3, "grid_argument", None)
    with pytest.raises(UserError, match=r"^recipe key student\.grid: the call of StableDiffusion3Pipeline takes no explicit times; remove it, or"):
        planned("student.grid=[0.9]")
    assert planned().setting({}).grid.tolist() == [1.0]
