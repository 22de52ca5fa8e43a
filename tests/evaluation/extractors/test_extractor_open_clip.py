"""Embeddings by open_clip against the plain model of a tiny random CLIP, and the files that its weights are looked up in."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import pretrained
from PIL import Image
from tiny_clips import SIZE, call, image_embeddings, pictures, put, put_scripted, resources, tag, text_embeddings, tiny_clip

from fastgen.errors import UserError
from fastgen.evaluation.extractors.base import Pictures
from fastgen.evaluation.extractors.open_clip import OpenClip
from fastgen.evaluation.extractors.open_clip_networks import sources
from fastgen.evaluation.weights import Unavailable

MODEL, WEIGHTS = "tiny", "tiny.safetensors"
PROMPTS = ("a red cat", "two boats at sea", "a red cat", "", "a small house")
LONG = " ".join(["sea", "cat", "house"] * 40)
CLOSE = {"rtol": 0, "atol": 2e-6}


def build(folder: Path | None, **options: Any) -> OpenClip:
    return OpenClip(OpenClip.Config.model_validate({"model": MODEL, "pretrained": WEIGHTS} | options), resources(folder))


@pytest.fixture(scope="module")
def module() -> open_clip.CLIP:
    return tiny_clip()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, module: open_clip.CLIP) -> Path:
    return put(module, tmp_path_factory.mktemp("weights") / WEIGHTS)


@pytest.fixture
def folder(kept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the weights of `module`, and no way to download others."""
    call(monkeypatch, MODEL)
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: pytest.fail("a download"))
    return kept.parent


@pytest.mark.parametrize(("height", "width"), [(40, 56), (70, 33), (SIZE, SIZE), (20, 20)])
def test_pictures_are_resized_by_the_shorter_side_and_cropped(folder: Path, module: open_clip.CLIP, height: int, width: int) -> None:
    pixels = pictures(3, height, width)
    found = build(folder)(Pictures(pixels, ("",) * 3), ["image"])
    torch.testing.assert_close(found["image"], image_embeddings(module, pixels), **CLOSE)


@pytest.mark.parametrize("prefix", ["", "A photo depicts "])
def test_prompts_follow_the_prefix(folder: Path, module: open_clip.CLIP, prefix: str) -> None:
    found = build(folder, prefix=prefix)(Pictures(pictures(5), PROMPTS), ["text"])
    torch.testing.assert_close(found["text"], text_embeddings(module, [prefix + prompt for prompt in PROMPTS]), **CLOSE)
    assert (found["text"][0] - found["text"][1]).abs().max() > 0.01


def test_a_long_prompt_keeps_the_end_of_77_tokens(folder: Path, module: open_clip.CLIP) -> None:
    """Every word is one token: 75 of them stand between the start and the end, one less with each word of the prefix."""
    words = LONG.split()
    for prefix, left in (("", 75), ("a photo ", 73)):
        found = build(folder, prefix=prefix)(Pictures(pictures(1), (LONG,)), ["text"])["text"]
        cut, shorter = text_embeddings(module, [prefix + " ".join(words[:left]), prefix + " ".join(words[: left - 1])])
        torch.testing.assert_close(found[0], cut, **CLOSE)
        assert (found[0] - shorter).abs().max() > 1e-3


def test_each_distinct_prompt_is_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor, seen = build(folder), []
    tokenize = extractor._network._tokenizer
    monkeypatch.setattr(extractor._network, "_tokenizer", lambda texts: seen.append(list(texts)) or tokenize(texts))
    extractor(Pictures(pictures(5), PROMPTS), ["text"])
    assert seen == [["a red cat", "two boats at sea", "", "a small house"]]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_rows_do_not_depend_on_the_other_pictures(folder: Path, batch: int) -> None:
    extractor, pixels = build(folder), pictures(5)
    whole = extractor(Pictures(pixels, PROMPTS), ["image", "text"])
    parts = [extractor(Pictures(pixels[i : i + batch], PROMPTS[i : i + batch]), ["image", "text"]) for i in range(0, 5, batch)]
    for layer in ("image", "text"):
        torch.testing.assert_close(torch.cat([part[layer] for part in parts]), whole[layer], **CLOSE)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_near_and_of_unit_length(folder: Path, precision: str) -> None:
    batch = Pictures(pictures(5), PROMPTS)
    full, half = (build(folder, precision=each)(batch, ["image", "text"]) for each in ("fp32", precision))
    for layer in full:
        assert half[layer].dtype == torch.float32
        torch.testing.assert_close(half[layer].norm(dim=1), torch.ones(5), rtol=0, atol=1e-6)
        assert 0 < (half[layer] - full[layer]).abs().max() < 0.05


def test_the_hash_is_that_of_the_file(folder: Path) -> None:
    assert build(folder).hash == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def test_what_the_weights_ask_for_is_done(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean, std, interpolation and resize mode of open_clip's record."""
    tag(MODEL, "other", monkeypatch, hf_hub="o/r/", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", resize_mode="squash")
    put(tiny_clip(), tmp_path / "r" / "open_clip_model.safetensors")
    extractor = build(tmp_path, pretrained="other")
    picture = torch.zeros(1, 3, 40, 64, dtype=torch.uint8)
    picture[..., :32] = 255  # black and white halves, of which squashing keeps the border in the middle
    (image,) = extractor._network._transform(Image.fromarray(picture[0].permute(1, 2, 0).numpy()))[None]
    assert image.shape == (3, SIZE, SIZE)
    torch.testing.assert_close(image[:, :, :12], torch.ones(3, SIZE, 12))
    torch.testing.assert_close(image[:, :, 20:], -torch.ones(3, SIZE, 12))


def test_weights_of_openai_are_read_from_the_hub_file_and_from_their_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both with OpenAI's approximation of GELU, which the network's name does not say; safetensors first."""
    module = tiny_clip(quick_gelu=True, seed=1).half().float()
    put_scripted(module, tmp_path / "Tiny.pt")
    digest = hashlib.sha256((tmp_path / "Tiny.pt").read_bytes()).hexdigest()
    url = f"https://openaipublic.azureedge.net/clip/models/{digest}/Tiny.pt"
    tag(MODEL, "openai", monkeypatch, hf_hub="timm/tiny.openai/", url=url, quick_gelu=True)
    batch, expected = Pictures(pictures(5), PROMPTS), (image_embeddings(module, pictures(5)), text_embeddings(module, PROMPTS))
    scripted = build(tmp_path, pretrained="openai")
    put(module, tmp_path / "tiny.openai" / "open_clip_model.safetensors")
    hub = build(tmp_path, pretrained="openai")
    assert scripted.hash == digest != hub.hash
    plain = image_embeddings(tiny_clip(seed=1), pictures(5))
    for extractor in (scripted, hub):
        found = extractor(batch, ["image", "text"])
        torch.testing.assert_close(found["image"], expected[0], **CLOSE)
        torch.testing.assert_close(found["text"], expected[1], **CLOSE)
        assert (found["image"] - plain).abs().max() > 1e-3


def test_a_file_of_another_hash_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tag(MODEL, "openai", monkeypatch, url=f"https://openaipublic.azureedge.net/clip/models/{'0' * 64}/Tiny.pt")
    (tmp_path / "Tiny.pt").write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(Unavailable, match=rf"^'.*Tiny\.pt' is not .*SHA-256 is {found}, not {'0' * 64}; get it from https://openaipublic\S+$"):
        build(tmp_path, pretrained="openai")


def test_weights_that_are_missing_are_one_line(tmp_path: Path) -> None:
    """With the file, its source and the place where it should lie."""
    with pytest.raises(Unavailable) as laion:
        OpenClip(OpenClip.Config(model="ViT-g-14", pretrained="laion2b_s12b_b42k"), resources(tmp_path))
    assert str(laion.value) == (
        f"needs CLIP-ViT-g-14-laion2B-s12B-b42K/open_clip_model.safetensors, which is not in {str(tmp_path)!r}: "
        "get it from https://huggingface.co/laion/CLIP-ViT-g-14-laion2B-s12B-b42K and put it there"
    )
    with pytest.raises(Unavailable) as openai:
        OpenClip(OpenClip.Config(model="ViT-L-14", pretrained="openai"), resources(tmp_path))
    assert str(openai.value).startswith("needs vit_large_patch14_clip_224.openai/open_clip_model.safetensors, which is not in ")
    assert "(or ViT-L-14.pt from https://openaipublic.azureedge.net/clip/models/b8cca3fd41ae0c99" in str(openai.value)
    with pytest.raises(
        Unavailable, match=r"^needs CLIP-ViT-g-14\S+ from https://huggingface\.co/laion/\S+: put it into a folder .* --weights-dir \(recipe key"
    ):
        OpenClip(OpenClip.Config(model="ViT-g-14", pretrained="laion2b_s12b_b42k"), resources(None))


def test_hashes_are_known_where_an_address_states_them() -> None:
    openai = sources(pretrained.get_pretrained_cfg("ViT-L-14-336", "openai"))
    assert [source.file.rpartition("/")[2] for source in openai] == [
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin",
        "ViT-L-14-336px.pt",
    ]
    assert openai[-1].sha256 == "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"
    assert openai[-1].scripted and not openai[0].scripted
    release = sources(
        {"url": "https://github.com/mlfoundations/open_clip/releases/download/v0.2-weights/vit_b_32-quickgelu-laion400m_e31-d867053b.pt"}
    )
    assert [(source.sha256, source.scripted) for source in release] == [("d867053b", False)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "ViT-g14", "pretrained": "laion2b_s12b_b42k"}, r"no model 'ViT-g14'; did you mean 'ViT-g-14'"),
        ({"model": "ViT-g-14", "pretrained": "laion2b"}, r"no weights 'laion2b' of ViT-g-14;.* laion2b_s12b_b42k"),
        ({"model": "ViT-B-16-SigLIP", "pretrained": "webli"}, r"its tokenizer lies on a hub"),
        ({"model": "xlm-roberta-base-ViT-B-32", "pretrained": "laion5b_s13b_b90k"}, r"its tokenizer lies on a hub"),
    ],
)
def test_models_that_cannot_be_read_are_refused(tmp_path: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(tmp_path, **options)


class Anything:
    """What only unpickling makes."""


@pytest.mark.parametrize("damage", ["other", "cut", "object"])
def test_a_file_that_holds_other_things_is_one_line(folder: Path, tmp_path: Path, damage: str, module: open_clip.CLIP) -> None:
    name = "broken.pt" if damage == "object" else "broken.safetensors"
    if damage == "other":
        put(module.visual, tmp_path / name)
    elif damage == "cut":
        (tmp_path / name).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    else:
        torch.save({"state_dict": Anything()}, tmp_path / name)
    extractor = build(tmp_path, pretrained=name)
    with pytest.raises(UserError, match=rf"^cannot read '.*{name}': ") as refused:
        extractor(Pictures(pictures(1), ("",)), ["image"])
    assert "\n" not in str(refused.value)
