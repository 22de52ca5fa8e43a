"""What the bundled digits folder and its classifier promise: recorded numbers are true, captions are told apart, plain diffusers runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgen.assets import DIGITS_CLASSIFIER, DIGITS_TEACHER
from fastgen.assets.classifier import DigitClassifier, accuracy, load_classifier
from fastgen.assets.skeleton import DIGITS, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer
from fastgen.data import digits

CAPTIONS = sorted(digits.prompts())
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})
TOKENS = DIGITS.tokens
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    return digits.load_images()


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import DiffusionPipeline

    return load(DiffusionPipeline, DIGITS_TEACHER)


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    return load_classifier()


def load(cls: Any, folder: Path) -> Any:
    pipeline = cls.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, num_inference_steps: int) -> np.ndarray:
    """Images (1, 8, 8, 3) in [0, 1] of one prompt and seed."""
    return pipeline(
        "a handwritten seven",
        num_inference_steps=num_inference_steps,
        guidance_scale=1.5,
        max_sequence_length=TOKENS,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


@torch.no_grad()
def encode(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    """CLIP tokens (N, 8, 64), T5 tokens (N, 8, 64) and the pooled vector (N, 64)."""
    tokens, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
    return {"clip": tokens[:, :TOKENS], "t5": tokens[:, TOKENS:], "pooled": pooled}


def test_the_split_is_stratified_and_disjoint(data: tuple[Tensor, Tensor]):
    labels = data[1]
    train, held_out = digits.split(labels, 0.8, 0)
    assert sorted(torch.cat([train, held_out]).tolist()) == list(range(len(labels)))
    share = torch.bincount(labels[held_out]).double() / torch.bincount(labels)
    assert (share - 0.2).abs().max() < 0.005
    assert torch.equal(held_out, digits.split(labels, 0.8, 0)[1])
    assert not torch.equal(held_out, digits.split(labels, 0.8, 1)[1])


def test_recorded_accuracy_is_true(classifier: DigitClassifier, data: tuple[Tensor, Tensor]):
    record = json.loads((DIGITS_CLASSIFIER / "config.json").read_text())
    images, labels = data
    _, held_out = digits.split(labels, 0.8, record["seed"])
    assert len(held_out) == record["held_out"]
    # One image of the held-out set is 0.003: another machine's rounding may turn a tie, nothing more.
    assert accuracy(classifier, images[held_out], labels[held_out]) == pytest.approx(record["held_out_accuracy"], abs=0.003)
    assert accuracy(classifier, images, labels) == pytest.approx(record["accuracy"], abs=0.001)
    assert record["held_out_accuracy"] >= 0.97
    assert record["parameters"] == sum(p.numel() for p in classifier.parameters())


def test_classifier_is_fixed_and_differentiable(classifier: DigitClassifier, data: tuple[Tensor, Tensor]):
    assert not classifier.training
    images = data[0][:5].clone().requires_grad_()
    features, logits = classifier.features(images), classifier(images)
    assert features.shape == (5, 64)
    assert logits.shape == (5, 10)
    torch.testing.assert_close(classifier.head(features), logits)
    logits.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().amax((1, 2, 3)).min() > 0


def test_the_folder_is_small_and_safe():
    files = [path for path in DIGITS_TEACHER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}


def test_plain_diffusers_loads_native_classes(pipeline: Any):
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline"
    names = {name: type(part).__name__ for name, part in pipeline.components.items() if part is not None}
    assert names == {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "scheduler": "FlowMapEulerDiscreteScheduler",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "tokenizer_3": "T5Tokenizer",
    }


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_caption_word_is_one_known_token(pipeline: Any, name: str):
    tokenizer = getattr(pipeline, name)
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in WORDS]
    assert {len(row) for row in ids} == {1}
    assert len({row[0] for row in ids}) == len(WORDS)
    assert tokenizer.unk_token_id not in {row[0] for row in ids}


def test_captions_fit_and_unknown_words_do_not_pass_for_known_ones(pipeline: Any):
    longest = {name: max(len(getattr(pipeline, name)(caption).input_ids) for caption in CAPTIONS) for name in TOKENIZERS}
    assert longest == {"tokenizer": 8, "tokenizer_2": 8, "tokenizer_3": 7}
    assert {getattr(pipeline, name).model_max_length for name in TOKENIZERS} == {TOKENS}
    t5 = pipeline.tokenizer_3
    for text in ("cat", "apple", "Seven"):
        assert t5.unk_token_id in t5(text).input_ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_survive_saving(pipeline: Any, name: str, tmp_path: Path):
    from transformers import AutoTokenizer

    before = getattr(pipeline, name)
    before.save_pretrained(tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert type(after) is type(before)
    texts = [*CAPTIONS, "", "a cat"]
    padded: dict[str, Any] = {"padding": "max_length", "max_length": TOKENS, "truncation": True}
    assert after(texts, **padded).input_ids == before(texts, **padded).input_ids


def test_encoded_captions_differ_by_more_than_a_tenth_of_their_norm(pipeline: Any):
    for name, value in encode(pipeline, [*CAPTIONS, ""]).items():
        flat = value.flatten(1)
        assert torch.pdist(flat).min() > 0.1 * flat.norm(dim=1).mean(), name
        assert 0.2 < value.square().mean().sqrt() < 2, name


@torch.no_grad()
def test_the_vae_returns_the_digits(pipeline: Any, data: tuple[Tensor, Tensor]):
    vae, images = pipeline.vae, data[0]
    posterior = vae.encode(images).latent_dist
    assert posterior.mean.shape == (len(images), 2, 8, 8)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    for latents in (posterior.mode(), posterior.mean + posterior.std * noise):
        assert (vae.decode(latents).sample - images).square().mean() <= 1.5e-3
    normalised = (posterior.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    assert normalised.mean().abs() < 0.01
    assert abs(normalised.std().item() - 1) < 0.01
    assert normalised.std((0, 2, 3)).min() > 0.5


@torch.no_grad()
def test_the_vae_does_not_change_the_classifiers_mind(pipeline: Any, classifier: DigitClassifier, data: tuple[Tensor, Tensor]):
    images, labels = data
    decoded = pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mode()).sample
    assert accuracy(classifier, decoded, labels) == pytest.approx(accuracy(classifier, images, labels), abs=0.003)


def test_a_stock_call_steps_evenly_down_to_zero(pipeline: Any):
    images = draw(pipeline, 4)
    assert pipeline.scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert images.shape == (1, 8, 8, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0.1


def test_a_saved_pipeline_draws_the_same_pictures(pipeline: Any, tmp_path: Path):
    pipeline.save_pretrained(tmp_path)
    np.testing.assert_allclose(draw(load(type(pipeline), tmp_path), 2), draw(pipeline, 2), rtol=0, atol=1e-5)


def test_tokenizers_are_rebuilt_as_they_ship(pipeline: Any) -> None:
    rebuilt = {"tokenizer": clip_tokenizer(DIGITS), "tokenizer_2": clip_tokenizer(DIGITS), "tokenizer_3": t5_tokenizer(DIGITS)}
    for name, tokenizer in rebuilt.items():
        assert tokenizer.get_vocab() == getattr(pipeline, name).get_vocab()
        assert tokenizer(CAPTIONS).input_ids == getattr(pipeline, name)(CAPTIONS).input_ids


def test_text_encoders_are_rebuilt_from_the_seed(pipeline: Any) -> None:
    torch.manual_seed(0)
    rebuilt = {"text_encoder": clip_encoder(clip_tokenizer(DIGITS)), "text_encoder_2": clip_encoder(clip_tokenizer(DIGITS))}
    rebuilt["text_encoder_3"] = t5_encoder(t5_tokenizer(DIGITS))
    for name, encoder in rebuilt.items():
        shipped = getattr(pipeline, name).state_dict()
        for key, value in encoder.state_dict().items():  # torch's normal numbers are the same on every processor to rounding only
            scale = max(1.0, shipped[key].abs().max().item())
            torch.testing.assert_close(value, shipped[key], rtol=0, atol=1e-6 * scale, msg=f"{name}.{key}")
