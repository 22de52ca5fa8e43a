"""What the bundled scenes folder, its classifier and its statistics promise."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import fastgen
from fastgen.assets import SCENES_CLASSIFIER, SCENES_STATISTICS, SCENES_TEACHER, encoders
from fastgen.assets.classifier import ABSENT, disturbed, load_scene_classifier, predicted, slots
from fastgen.assets.skeleton import SCENES, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer
from fastgen.config import Recipe
from fastgen.data import digits, scenes
from fastgen.evaluation.teacher_statistics import read_statistics
from fastgen.families import source_hash
from fastgen.plan import plan

WORDS = SCENES.words()
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
FEW = 400


@pytest.fixture(scope="module")
def held_out() -> scenes.Scenes:
    return scenes.make(FEW, scenes.pools()[1], 99)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(SCENES_TEACHER, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_classifier_is_right_on_held_out_scenes_as_recorded(held_out: scenes.Scenes) -> None:
    record = json.loads((SCENES_CLASSIFIER / "config.json").read_text())
    classifier = load_scene_classifier()
    right = predicted(classifier, held_out.images) == slots(held_out)
    for slot, colour in enumerate(scenes.COLOURS):
        assert record["held_out_accuracy"][colour] >= 0.97
        # Five standard errors of so many scenes.
        assert right[:, slot].double().mean() == pytest.approx(record["held_out_accuracy"][colour], abs=5 * (0.03 / FEW) ** 0.5)
    assert right.all(1).double().mean() > 0.93
    assert record["parameters"] == sum(p.numel() for p in classifier.parameters())


def test_slots_say_which_digit_each_colour_shows() -> None:
    of = scenes.Scenes(torch.empty(2, 3, 16, 16), torch.tensor([[0, 2], [3, 1]]), torch.tensor([[3, 7], [0, 9]]), torch.tensor([0, 2]))
    assert slots(of).tolist() == [[3, ABSENT, 7, ABSENT], [ABSENT, 9, ABSENT, 0]]


def test_training_scenes_are_disturbed_and_never_of_the_reference() -> None:
    torch.manual_seed(0)
    images, labels = disturbed(300)
    assert images.shape == (300, 3, 16, 16) and images.abs().max() <= 1
    shown = (labels != ABSENT).sum(1)
    assert set(shown.tolist()) == {1, 2} and 0.02 < (shown == 1).double().mean() < 0.2
    again, _ = disturbed(300)
    assert not torch.equal(images, again)
    mass = scenes.moments((images + 1) / 2)[..., 0]
    assert mass[labels != ABSENT].min() > mass[labels == ABSENT].mean()


def test_the_folder_is_small_and_safe() -> None:
    files = [path for path in SCENES_TEACHER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}


def test_plain_diffusers_draws_16_by_16(pipeline: Any) -> None:
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline"
    assert sum(p.numel() for p in pipeline.transformer.parameters()) <= 1.3e6
    images = pipeline(
        "a red three left of a blue seven",
        num_inference_steps=4,
        guidance_scale=1.5,
        max_sequence_length=SCENES.tokens,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert pipeline.scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all() and images.std() > 0.1


def test_it_loads_as_a_teacher_and_in_recipes() -> None:
    teacher = fastgen.load_teacher("fastgen:scenes")
    assert teacher.steps == 28
    assert teacher(["two digits"] * 2, [0, 1], 1).shape == (2, 3, 16, 16)
    asked = Recipe.load(
        "digits_dmd2_1step",
        [
            "teacher.pretrained=fastgen:scenes",
            f"teacher.max_sequence_length={SCENES.tokens}",
            "data.prompts=fastgen:scenes",
            "evaluate.protocol=null",
        ],
    )
    assert plan(asked).family.picture_shape == (3, 16, 16)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_caption_word_is_one_known_token(pipeline: Any, name: str) -> None:
    tokenizer = getattr(pipeline, name)
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in WORDS]
    assert {len(row) for row in ids} == {1}
    assert len({row[0] for row in ids}) == len(WORDS)
    assert tokenizer.unk_token_id not in {row[0] for row in ids}
    assert max(len(tokenizer(caption).input_ids) for caption in SCENES.captions()) == (9 if name == "tokenizer_3" else SCENES.tokens)


@torch.no_grad()
def test_encoded_captions_carry_the_order_of_words(pipeline: Any) -> None:
    texts = [
        "a red three left of a blue seven",
        "a blue three left of a red seven",
        "a red seven left of a blue three",
        "a blue seven left of a red three",
    ]
    tokens, _, pooled, _ = pipeline.encode_prompt(texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=SCENES.tokens)
    for value in (tokens[:, : SCENES.tokens], pooled):
        flat = value.flatten(1)
        assert torch.pdist(flat).min() > 0.1 * flat.norm(dim=1).mean()


@torch.no_grad()
def test_the_vae_does_not_change_the_classifiers_mind(pipeline: Any, held_out: scenes.Scenes) -> None:
    vae, classifier = pipeline.vae, load_scene_classifier()
    latents = vae.encode(held_out.images).latent_dist.mode()
    assert latents.shape == (FEW, 8, 8, 8)
    decoded = vae.decode(latents).sample
    assert (decoded - held_out.images).square().mean() <= 5e-3
    assert (predicted(classifier, decoded) == predicted(classifier, held_out.images)).double().mean() > 0.98


def test_tokenizers_are_rebuilt(pipeline: Any) -> None:
    assert clip_tokenizer(SCENES).get_vocab() == pipeline.tokenizer.get_vocab()
    assert t5_tokenizer(SCENES).get_vocab() == pipeline.tokenizer_3.get_vocab()


@torch.no_grad()
@pytest.mark.parametrize("name", TOKENIZERS)
def test_encoders_know_which_digit_is_meant(pipeline: Any, name: str) -> None:
    """A linear reading of the token of a digit's word, fitted on half of the captions, of the other half: its colour, the digit, and, but for
    CLIP's, which has not read on, where it stands."""
    encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"))
    ids, rows, places, classes = encoders.examples(getattr(pipeline, name))
    tokens = encoders.t5_tokens if name == "tokenizer_3" else encoders.clip_tokens
    seen = tokens(encoder, ids)[rows, places].double()
    seen = torch.cat([seen, torch.ones(len(seen), 1)], 1)
    fitted, other = rows % 2 == 0, rows % 2 == 1
    for column, count in enumerate(encoders.CLASSES[: 3 if name == "tokenizer_3" else 2]):
        wanted = torch.nn.functional.one_hot(classes[:, column], count).double()
        weights = torch.linalg.lstsq(seen[fitted], wanted[fitted]).solution
        assert ((seen[other] @ weights).argmax(1) == classes[other, column]).double().mean() > 0.97, encoders.Mention._fields[column]


def test_mentions_are_what_captions_say() -> None:
    said = encoders.mentions()
    assert set(said) == set(scenes.prompts())
    full = next(text for text in said if text.startswith("a blue seven below"))
    assert said[full][0] == (2, 7, 3) and said[full][1].relation == 2
    assert said["two digits"] == said["a red digit and a blue digit"] == ()
    assert said["a three and a seven"] == ((-1, 3, -1), (-1, 7, -1)) and said["a red digit and a seven"] == ((-1, 7, -1),)


@pytest.mark.parametrize("clip", [True, False])
def test_encoders_learn_to_read(monkeypatch: pytest.MonkeyPatch, clip: bool) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(encoders, "STEPS", 100)
    tokenizer = clip_tokenizer(SCENES) if clip else t5_tokenizer(SCENES)
    encoder, tokens = (clip_encoder(tokenizer), encoders.clip_tokens) if clip else (t5_encoder(tokenizer), encoders.t5_tokens)
    assert encoders.teach(encoder, tokenizer, tokens) < 1.5  # 5.5 of chance
    assert not any(weight.requires_grad for weight in encoder.parameters())


def test_the_statistics_are_of_this_teacher_and_this_classifier() -> None:
    known, record = read_statistics(), json.loads((SCENES_STATISTICS / "config.json").read_text())
    assert known.teacher == source_hash("fastgen:scenes")
    assert (record["n"], record["steps"]) == (5000, 28)
    assert known.fit.mean.shape == (128,) and known.fit.mean.dtype == torch.float64
    torch.testing.assert_close(known.fit.cov, known.fit.cov.T, rtol=0, atol=1e-12)  # sums of several threads
    assert known.fit.cov.diagonal().min() >= 0


def test_the_reference_digits_are_held_out_of_both_trainings() -> None:
    train, reference = (set(rows.tolist()) for rows in scenes.pools())
    assert not train & reference
    assert len(train | reference) == len(digits.load_images()[1])
