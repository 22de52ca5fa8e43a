"""A family's own guidance rule acts on the kind and the path that its pipeline has, wherever guidance is used; and what a negative prompt is."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from pipelines import NEGATIVE, PROMPTS, draw, student_info, student_role
from pipelines import sd3_folder as sd3_folder
from torch import Tensor

from fastgen.config import Recipe
from fastgen.denoiser import Denoiser, Predictor, guided
from fastgen.distillers.base import Setting
from fastgen.errors import UserError
from fastgen.export import export_student
from fastgen.families.sd3 import SD3
from fastgen.families.toy import Toy
from fastgen.generator import ImageGenerator, read_manifest
from fastgen.guidance import linear
from fastgen.path import Flow, Kind, Path, TrigFlow, VariancePreserving, expand_time
from fastgen.plan import plan

KINDS: tuple[Kind, ...] = ("x0", "eps", "v", "velocity", "score")


def rescaled(cond: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
    """The guided prediction at the length of the conditional one, sample by sample (as Qwen-Image does token by token)."""
    strong = linear(cond, negative, scale)
    return strong * expand_time(cond.flatten(1).norm(dim=1) / strong.flatten(1).norm(dim=1), strong)


class Rescaled(Toy):
    guidance_kind = "velocity"

    def guidance_rule(self, cond: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
        return rescaled(cond, negative, scale)


def predictor(family: Toy) -> Predictor:
    return Predictor(Denoiser(family.load_backbone().double(), family), family)


@pytest.fixture
def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((5, 2), generator=generator, dtype=torch.float64), torch.linspace(0.2, 0.9, 5, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [None, Flow(), TrigFlow(), VariancePreserving()], ids=str)
def test_a_rule_acts_on_its_own_kind_and_path_whatever_is_asked_for(kind: Kind, path: Path | None, samples: tuple[Tensor, Tensor]) -> None:
    family = Rescaled("toy:mixture")
    predict, (x, t) = predictor(family), samples
    cond, negative = family.encode_texts(list("01201")), family.encode_negative(None)
    own_x, own_t = (x, t) if path in (None, Flow()) else path.retime(x, t, Flow())
    given, without = (predict(own_x, own_t, each, "velocity") for each in (cond, {"component": torch.full((5,), -1)}))
    x0, eps = Flow().solve(rescaled(given, without, 3.0), own_x, own_t, "velocity")
    expected = (path or Flow()).predict(x0, eps, t, kind)
    strong = guided(predict, 3.0, negative, family.guidance_rule, family.guidance_kind)
    torch.testing.assert_close(strong(x, t, cond, kind, path), expected, rtol=1e-10, atol=1e-10)
    plain = guided(predict, 3.0, negative)
    assert (plain(x, t, cond, kind, path) - expected).abs().max() > 1e-3


def test_methods_and_pictures_use_the_familys_rule(samples: tuple[Tensor, Tensor]) -> None:
    family, (x, t) = Rescaled("toy:mixture"), samples
    predict, cond = predictor(family), family.encode_texts(list("01201"))
    expected = guided(predict, 3.0, family.encode_negative("2"), rescaled, "velocity")
    setting = Setting(family.path, (2,), family.grid(2), 3.0, family.encode_negative("2"), 1.0, rule=family.guidance_rule, rule_kind="velocity")
    assert torch.equal(setting.guide(predict)(x, t, cond), expected(x, t, cond))
    scale = torch.tensor([1.5, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    each = guided(predict, scale, family.encode_negative("2"), rescaled, "velocity")
    assert torch.equal(setting.guide(predict, scale)(x, t, cond), each(x, t, cond))
    generator = ImageGenerator(family, predict, steps=2, guidance=3.0, negative_prompt="2")
    assert torch.equal(generator.predict(x, t, cond), expected(x, t, cond))


def test_what_needs_a_linear_rule_is_refused_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.load("digits_dmd2_1step", ["distiller.decoupled={}"])
    plan(recipe)
    monkeypatch.setattr(SD3, "guidance_kind", "velocity")
    with pytest.raises(UserError, match=r"recipe key distiller\.decoupled: this teacher's pipeline rescales"):
        plan(recipe)
    assert plan(Recipe.load("digits_dmd2_1step")).setting({}).rule_kind == "velocity"


class Zeroed(SD3):
    """Given no negative prompt, its pipeline takes zeros, as SDXL's does; its call has another name for guidance."""

    def encode_negative(self, text: str | None) -> dict[str, Tensor]:
        found = super().encode_negative(text)
        return found if text is not None else {key: torch.zeros_like(value) for key, value in found.items()}

    def negative_arguments(self, text: str | None, guidance: float) -> dict[str, Any]:
        return {"negative_prompt": text or ""} if guidance > 1 else {}


def test_no_negative_prompt_is_the_pipelines_own(sd3_folder: FilePath) -> None:
    family = Zeroed(sd3_folder, max_sequence_length=16)
    predict = Predictor(Denoiser(family.load_backbone(), family), family)
    pipeline = family.load_pipeline(None, family.export_scheduler())
    zeros = {f"negative_{name}": torch.zeros(3, *shape) for name, shape in (("prompt_embeds", (40, 40)), ("pooled_prompt_embeds", (20,)))}
    for text, more in (("", zeros), (NEGATIVE, {"negative_prompt": [NEGATIVE] * 3})):
        pictures = ImageGenerator(family, predict, steps=2, guidance=5.0, negative_prompt=text)(PROMPTS, [3, 4, 5])
        call = family.call_arguments(2, 5.0)
        assert (pictures - draw(pipeline, PROMPTS, [3, 4, 5], **call, **more)).abs().max() <= 1e-5


@pytest.mark.parametrize(("negative", "guidance", "expected"), [("", 1.0, None), ("", 2.0, ""), ("blurry", 2.0, "blurry"), ("blurry", 1.0, None)])
def test_the_call_of_an_export_has_the_familys_words_for_it(
    sd3_folder: FilePath, tmp_path: FilePath, negative: str, guidance: float, expected: str | None
) -> None:
    family = Zeroed(sd3_folder, max_sequence_length=16)
    teacher = {"pretrained": str(sd3_folder), "guidance": 4.0, "negative_prompt": negative}
    info = student_info(sd3_folder, steps=2, guidance=guidance, teacher=teacher)
    folder = export_student(student_role(family), family, info, tmp_path / "student")
    assert read_manifest(folder)["call"].get("negative_prompt") == expected
