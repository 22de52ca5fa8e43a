"""PickScore's reader on a tiny random CLIP, saved as the real one is, against a direct computation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clips import MEAN, SIZE, STD, cropped, inputs_of, measured, pictures, resources, sample_set, with_code
from tokenizers import pre_tokenizers
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from fastgen.errors import UserError
from fastgen.evaluation.extractors.base import Pictures
from fastgen.evaluation.extractors.pick_score import FOLDER, PickScore
from fastgen.evaluation.metrics.pick_score import PickScore as Metric
from fastgen.evaluation.weights import Unavailable

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
PIECES = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
START, END = len(PIECES) - 2, len(PIECES) - 1
PROMPTS = ("a red cat", "two boats at sea", "a red cat", "", "sea " * 60)
# As feature extractors of 2022 wrote it, which the hub still has, and as they write it now.
OLD = {"feature_extractor_type": "CLIPFeatureExtractor", "size": SIZE, "crop_size": SIZE}
NEW = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
KNOWN = {"do_center_crop": True, "do_normalize": True, "do_resize": True, "image_mean": MEAN, "image_std": STD, "resample": 3}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    special = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, **special, "vocab_size": len(PIECES), "max_position_embeddings": 77},
        vision_config={**sizes, "image_size": SIZE, "patch_size": 8}, projection_dim=16, logit_scale_init_value=3.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder / FOLDER)
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=[], model_max_length=77)
    tokenizer.save_pretrained(folder / FOLDER)
    (folder / FOLDER / "preprocessor_config.json").write_text(json.dumps(OLD | KNOWN))
    return folder


def tokens(prompt: str) -> Tensor:
    """One a letter, the last of a word marked; cut to 77 with the end."""
    ids = [LETTERS.index(letter) + len(LETTERS) * (place == len(word) - 1) for word in prompt.split() for place, letter in enumerate(word)]
    return torch.tensor([[START, *ids[:75], END]])


@torch.no_grad()
def direct(folder: Path, pixels: Tensor) -> Tensor:
    """exp(logit scale) · cosine, one picture and one prompt at a time, unpadded."""
    model: Any = CLIPModel.from_pretrained(folder / FOLDER).eval()
    images = torch.cat([model.get_image_features(one[None]).pooler_output for one in inputs_of(cropped(pixels))])
    texts = torch.cat([model.get_text_features(tokens(prompt)).pooler_output for prompt in PROMPTS])
    return model.logit_scale.exp() * (normalize(images, dim=1) * normalize(texts, dim=1)).sum(1)


def test_scores(weights: Path) -> None:
    pixels = pictures(5, 41, 60)
    found = PickScore(PickScore.Config(), resources(weights))(Pictures(pixels, PROMPTS), ["score"])["score"]
    expected = direct(weights, pixels)
    assert found.shape == (5, 1) and expected.abs().min() > 0.01
    torch.testing.assert_close(found[:, 0], expected, rtol=0, atol=1e-4)


def test_the_metric_is_their_mean(weights: Path) -> None:
    metric, pixels = Metric(Metric.Config(), ["all"], resources(weights)), pictures(5, 41, 60)
    (value,) = metric.measure(measured(metric, pixels, sample_set(PROMPTS)))
    assert (value.name, value.n, value.interval_over) == ("pick_score", 5, "prompts")  # one of them twice
    assert value.value == pytest.approx(float(direct(weights, pixels).mean()), abs=1e-4)


def test_the_folders_own_processor_is_used_in_either_form(weights: Path, tmp_path: Path) -> None:
    pixels, found = pictures(2, 41, 60), {}
    for name, processor in {"old": OLD | KNOWN, "new": NEW | KNOWN, "other": NEW | KNOWN | {"image_mean": (0.5, 0.5, 0.5)}}.items():
        shutil.copytree(weights / FOLDER, tmp_path / name / FOLDER)
        (tmp_path / name / FOLDER / "preprocessor_config.json").write_text(json.dumps(processor))
        extractor = PickScore(PickScore.Config(), resources(tmp_path / name))
        found[name] = (extractor.hash, extractor(Pictures(pixels, PROMPTS[:2]), ["score"])["score"])
    torch.testing.assert_close(found["old"][1], found["new"][1], rtol=0, atol=1e-5)
    assert (found["other"][1] - found["new"][1]).abs().max() > 1e-3
    assert len({digest for digest, _ in found.values()}) == 3


def test_no_code_of_the_folder_runs_and_nobody_is_asked(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known classes are taken in its place; without them the folder cannot be read."""
    shutil.copytree(weights / FOLDER, tmp_path / FOLDER)
    seen = [with_code(tmp_path / FOLDER, monkeypatch)]
    given = Pictures(pictures(2, 41, 60), PROMPTS[:2])
    found, expected = (PickScore(PickScore.Config(), resources(folder))(given, ["score"])["score"] for folder in (tmp_path, weights))
    assert torch.equal(found, expected)
    unknown = {
        "processor": {"preprocessor_config": {"image_processor_type": "Own", "feature_extractor_type": None}},
        "tokenizer": {"config": {"model_type": "own"}, "tokenizer_config": {"tokenizer_class": "Own"}},
    }
    for name, changes in unknown.items():
        shutil.copytree(weights / FOLDER, tmp_path / name / FOLDER)
        seen.append(with_code(tmp_path / name / FOLDER, monkeypatch, **changes))
        with pytest.raises(UserError, match=rf"^cannot read '{tmp_path / name / FOLDER}': .* contains custom code") as caught:
            PickScore(PickScore.Config(), resources(tmp_path / name))(given, ["score"])
        assert "\n" not in str(caught.value)
    assert seen == [[], [], []]


@pytest.mark.parametrize("batch", [1, 2])
def test_rows_do_not_depend_on_the_other_pictures(weights: Path, batch: int) -> None:
    extractor, pixels = PickScore(PickScore.Config(), resources(weights)), pictures(5)

    def scores(part: slice) -> Tensor:
        return extractor(Pictures(pixels[part], PROMPTS[part]), ["score"])["score"]

    parts = torch.cat([scores(slice(start, start + batch)) for start in range(0, 5, batch)])
    torch.testing.assert_close(parts, scores(slice(5)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_a_missing_file_is_one_line(weights: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(weights / FOLDER, tmp_path / FOLDER)
    (tmp_path / FOLDER / name).unlink()
    with pytest.raises(
        Unavailable, match=rf"^needs PickScore_v1/{name}, which is not in '{tmp_path}': get it from https://hugg.*/PickScore_v1 .* put it there$"
    ):
        PickScore(PickScore.Config(), resources(tmp_path))


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=rf"^needs the folder PickScore_v1, which is not in '{tmp_path}': get it from https://hugg.*/PickScore_v1 "):
        PickScore(PickScore.Config(), resources(tmp_path))
