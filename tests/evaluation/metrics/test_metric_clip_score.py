"""CLIP score's presets against a direct computation with tiny networks under the names of the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from scipy import stats
from tiny_clips import by_hand, call, image_embeddings, measured, pictures, put, resources, sample_set, text_embeddings, tiny_clip
from torch import Tensor

from fastgen.config import validate
from fastgen.errors import UserError
from fastgen.evaluation.extraction import Extractors
from fastgen.evaluation.extractors.base import Pictures, feature
from fastgen.evaluation.metrics.base import Unavailable
from fastgen.evaluation.metrics.clip_score import PRESETS, ClipScore
from fastgen.evaluation.metrics.cmmd import Cmmd
from fastgen.evaluation.preparation import prepared
from fastgen.evaluation.protocol import PrepareBlock, protocol_from
from fastgen.evaluation.results import provenance

PROMPTS = ("a red cat", "two boats at sea", "a small house", "", "snow", " ".join(["snow"] * 100))
# Of each preset: the file of its weights, whether its network is of OpenAI's kind, the prefix, and the mean of cosines (N,).
DIRECT: dict[str, tuple[str, bool, str, Callable[[Tensor], Tensor]]] = {
    "dmd2": ("CLIP-ViT-g-14-laion2B-s12B-b42K", False, "A photo depicts ", lambda cosines: cosines.mean()),
    "sana-mjhq": ("vit_large_patch14_clip_224.openai", True, "", lambda cosines: (100 * cosines).mean()),
    "torchmetrics": ("vit_large_patch14_clip_224.openai", True, "", lambda cosines: (100 * cosines).mean().clamp(min=0)),
    "original": ("vit_base_patch32_clip_224.openai", True, "A photo depicts ", lambda cosines: (2.5 * cosines.clamp(min=0)).mean()),
}


def score(weights: Path | None = None, **options: Any) -> ClipScore:
    return ClipScore(validate(ClipScore.Config, options, "metrics.clip_score"), ["all"], resources(weights))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, quick_gelu, prefix, mean = DIRECT[preset]
    call(monkeypatch, "ViT-g-14", "ViT-L-14", "ViT-B-32")
    module = tiny_clip(quick_gelu=quick_gelu, seed=2)
    put(module, tmp_path / file / "open_clip_model.safetensors")
    metric, pixels, samples = score(tmp_path, preset=preset), pictures(6), sample_set(PROMPTS)
    cosines = (image_embeddings(module, pixels) * text_embeddings(module, [prefix + prompt for prompt in PROMPTS])).sum(1).double()
    assert cosines.min() < 0 < cosines.max()  # so that clamping shows
    seen = measured(metric, pixels, samples)
    (value,) = metric.measure(seen)
    assert (value.name, value.n, value.std_over) == ("clip_score", 6, "images")
    assert value.value == pytest.approx(float(mean(cosines)), rel=0, abs=metric.config.scale * 1e-6)
    assert value.value == pytest.approx(max(float(metric.scores(seen)["clip_score"].mean()), 0 if preset == "torchmetrics" else -1), abs=1e-12)


def test_a_square_is_of_the_pictures_as_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DMD2 resizes to 256 for the CLIP score where it resizes to 512 for the FID."""
    call(monkeypatch, "ViT-g-14")
    module = tiny_clip(seed=2)
    put(module, tmp_path / "CLIP-ViT-g-14-laion2B-s12B-b42K" / "open_clip_model.safetensors")
    metric, drawn = score(tmp_path, preset="dmd2", square=24), pictures(2)
    image, text = metric.needs().generated["all"]
    assert image.options == text.options
    extractors = Extractors(metric.resources)
    given = Pictures(prepared(drawn, PrepareBlock(resize=16)), PROMPTS[:2], raw=list(drawn))
    squares = [Image.fromarray(each.permute(1, 2, 0).numpy()).crop((8, 0, 48, 40)).resize((24, 24), Image.Resampling.LANCZOS) for each in drawn]
    expected = image_embeddings(module, torch.from_numpy(np.stack([np.asarray(each) for each in squares])).permute(0, 3, 1, 2))
    torch.testing.assert_close(extractors(given, [image])[extractors.name(image)], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "caption", ["a red cat", "it's  a &amp; CAT", "", " ".join(["snow"] * 72), " ".join(["snow"] * 73), " ".join(["snow"] * 200)]
)
def test_the_prefix_is_what_dmd2_puts_between_tokens(caption: str) -> None:
    """Its evaluator puts the three tokens of the prefix after the start of a caption that is cut to 77 tokens, cuts again, and makes the last
    token the end unless it is padding (main/coco_eval/coco_evaluator.py)."""
    tokens, prefix = open_clip.tokenize([caption]), open_clip.tokenize(["A photo depicts "])[:, 1:4]
    joined = torch.cat([tokens[:, :1], prefix, tokens[:, 1:]], 1)[:, :77]
    joined[:, 76] = torch.where(joined[:, 76] > 0, 49407, 0)
    assert torch.equal(open_clip.tokenize([PRESETS["dmd2"]["prefix"] + caption]), joined)


OPTIONS = {"model": "m", "pretrained": "p", "prefix": "", "precision": "fp32"}
IMAGE, TEXT = (feature("open_clip", layer, **OPTIONS) for layer in ("image", "text"))
COSINES = torch.tensor([0.5, -0.25, 0.125, -0.75, 0.25, 0.0625])


def seen(per_prompt: int = 1, prompts: tuple[str, ...] = PROMPTS) -> Any:
    """Embeddings on the unit circle with these cosines to their texts."""
    images = torch.stack([COSINES, (1 - COSINES**2).sqrt()], 1)
    texts = torch.tensor([[1.0, 0.0]]).expand(6, 2).contiguous()
    return by_hand({IMAGE: images, TEXT: texts}, sample_set(prompts, per_prompt))


@pytest.mark.parametrize(
    ("scale", "clamp", "expected"),
    [(1.0, "none", COSINES.mean()), (2.5, "pictures", 2.5 * COSINES.clamp(min=0).mean()), (-3.0, "none", -3 * COSINES.mean()), (1.0, "mean", 0.0)],
)
def test_scale_and_clamp(scale: float, clamp: str, expected: float) -> None:
    (value,) = score(model="m", pretrained="p", scale=scale, clamp=clamp).measure(seen())
    assert value.value == pytest.approx(float(expected), abs=1e-7)
    assert value.interval is not None and value.interval[0] <= value.value <= value.interval[1]


def test_the_interval_is_over_pictures_or_over_prompts() -> None:
    metric = score(model="m", pretrained="p")
    for per_prompt, over, units in ((1, "images", COSINES), (2, "prompts", COSINES.view(3, 2).mean(1)), (3, "prompts", COSINES.view(2, 3).mean(1))):
        (value,) = metric.measure(seen(per_prompt, tuple(text for text in PROMPTS[: 6 // per_prompt] for _ in range(per_prompt))))
        assert (value.n, value.std_over, value.interval_over) == (6, over, over)
        expected = stats.t.interval(0.95, len(units) - 1, float(units.mean()), float(units.std()) / len(units) ** 0.5)
        assert value.interval == pytest.approx(expected, rel=1e-5)
        assert value.std == pytest.approx(float(units.std()), rel=1e-5)


def test_a_prompt_that_comes_again_is_no_new_draw() -> None:
    metric = score(model="m", pretrained="p")
    (value,) = metric.measure(seen(1, PROMPTS[:3] * 2))
    units = COSINES.view(2, 3).mean(0)
    expected = stats.t.interval(0.95, 2, float(units.mean()), float(units.std()) / 3**0.5)
    assert (value.n, value.std_over, value.interval_over) == (6, "prompts", "prompts")
    assert (value.value, value.interval) == (pytest.approx(float(COSINES.mean()), rel=1e-6), pytest.approx(expected, rel=1e-5))


def test_scores_are_those_of_single_pictures() -> None:
    found = score(model="m", pretrained="p", scale=2.0).scores(seen())["clip_score"]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, 2 * COSINES.double(), rtol=0, atol=1e-7)


def test_pictures_without_prompts_have_no_score() -> None:
    with pytest.raises(Unavailable, match="prompts, which these have none of"):
        score(model="m", pretrained="p").measure(seen(prompts=("",) * 6))


def test_the_record_says_what_a_preset_decides() -> None:
    for name, decided in PRESETS.items():
        dumped = score(preset=name).config.model_dump()
        assert dumped == {"set": None, "preset": name, "precision": "fp32", "square": None, **decided}
        assert validate(ClipScore.Config, dumped, "metrics.clip_score") == score(preset=name).config


def test_results_json_says_the_whole_convention() -> None:
    content = {"name": "p", "sets": {"all": {"prompts": None, "count": 4}}, "metrics": {"clip_score": {"preset": "original"}, "cmmd": None}}
    found = provenance(protocol_from(content))["conventions"]["metrics"]
    assert found["clip_score"] == {
        "set": "all", "preset": "original", "model": "ViT-B-32", "pretrained": "openai", "prefix": "A photo depicts ", "scale": 2.5,
        "clamp": "pictures", "precision": "fp32", "square": None, "convention": ClipScore.convention,
    }  # fmt: skip
    assert found["cmmd"] == {"set": "all", "convention": Cmmd.convention}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"give a preset \(dmd2, sana-mjhq, torchmetrics, original\), or model and pretrained"),
        ({"model": "ViT-L-14"}, r"give a preset"),
        ({"preset": "dmd"}, r"preset 'dmd'; did you mean 'dmd2'"),
        ({"preset": "dmd2", "prefix": ""}, r"preset dmd2 says what prefix is: leave out the one or the other"),
        ({"preset": "dmd2", "prefx": ""}, r"prefx"),
        ({"model": "m", "pretrained": "p", "clamp": "images"}, r"clamp"),
    ],
)
def test_options_that_say_too_little_or_too_much(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        score(**options)
    assert "\n" not in str(refused.value)


def test_one_extractor_makes_both_embeddings() -> None:
    (features,) = score(preset="dmd2").needs().generated.values()
    assert len({one.options for one in features}) == 1 and [one.layer for one in features] == ["image", "text"]
