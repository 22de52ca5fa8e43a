"""Tiny random CLIPs under the names of real ones, with weights in files as open_clip's own downloads are called, and their embeddings computed
directly: by Pillow, open_clip's plain model and its tokenizer, without anything of fastgen's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastgen.evaluation.extraction import Extractors
from fastgen.evaluation.extractors.base import Feature, Pictures, Resources
from fastgen.evaluation.metrics.base import Measured, Metric
from fastgen.evaluation.protocol import SampleSet
from fastgen.evaluation.tables import Table
from fastgen.evaluation.weights import Weights

SIZE = 32
TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 64, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def call(monkeypatch: pytest.MonkeyPatch, *models: str) -> None:
    """Let open_clip build tiny networks where it is asked for these models."""
    for model in models:
        monkeypatch.setitem(factory._MODEL_CONFIGS, model, TINY)


def tiny_clip(*, quick_gelu: bool = False, seed: int = 0) -> open_clip.CLIP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = open_clip.CLIP(TINY["embed_dim"], TINY["vision_cfg"], TINY["text_cfg"], quick_gelu=quick_gelu).eval()
        with torch.no_grad():
            for parameter in module.parameters():  # those that start at zero or one too
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return module


def put(module: nn.Module, path: Path) -> Path:
    """The weights in a .safetensors file; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, path)
    return path


def put_scripted(module: nn.Module, path: Path) -> None:
    """The weights in a TorchScript archive, in fp16, as OpenAI's files are."""
    bare = nn.Module()
    for name, value in module.state_dict().items():
        *folders, last = name.split(".")
        place = bare
        for folder in folders:
            if folder not in place._modules:
                place.add_module(folder, nn.Module())
            place = place.get_submodule(folder)
        place.register_parameter(last, nn.Parameter(value.half(), requires_grad=False))
    torch.jit.save(torch.jit.script(bare), str(path))


def tag(model: str, name: str, monkeypatch: pytest.MonkeyPatch, **record: Any) -> None:
    """Let open_clip know weights `name` of a model."""
    monkeypatch.setitem(pretrained._PRETRAINED, model, {name: {**pretrained._pcfg(), **record}})


def pictures(count: int, height: int = 40, width: int = 56, seed: int = 0) -> Tensor:
    """(count, 3, height, width) uint8: a random slope of colours with noise."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 3, 3, 3, generator=generator)
    smooth = torch.nn.functional.interpolate(corners, size=(height, width), mode="bilinear", align_corners=True)
    noisy = smooth + 0.2 * torch.randn(count, 3, height, width, generator=generator)
    return (noisy * 255).clamp(0, 255).to(torch.uint8)


def cropped(pixels: Tensor, size: int = SIZE) -> list[Image.Image]:
    """Pillow's bicubic to `size` by the shorter side, then the centre."""
    found: list[Image.Image] = []
    for picture in pixels.permute(0, 2, 3, 1).numpy():
        height, width = picture.shape[:2]
        scale = size / min(height, width)
        image = Image.fromarray(picture).resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        found.append(image.crop((left, top, left + size, top + size)))
    return found


def inputs_of(images: Sequence[Image.Image]) -> Tensor:
    values = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@torch.no_grad()
def image_embeddings(module: open_clip.CLIP, pixels: Tensor) -> Tensor:
    return normalize(torch.cat([module.encode_image(one[None]) for one in inputs_of(cropped(pixels))]), dim=1)


@torch.no_grad()
def text_embeddings(module: open_clip.CLIP, texts: Sequence[str]) -> Tensor:
    return normalize(torch.cat([module.encode_text(open_clip.tokenize([text])) for text in texts]), dim=1)


def resources(folder: Path | None) -> Resources:
    return Resources(Weights(folder))


def sample_set(prompts: Sequence[str], per_prompt: int = 1) -> SampleSet:
    """Of these prompts, one for each picture."""
    return SampleSet("all", tuple(prompts), tuple(range(len(prompts))), per_prompt=per_prompt)


def measured(metric: Metric, pixels: Tensor, samples: SampleSet, **known: Any) -> Measured:
    """What a metric sees of these pictures."""
    extractors, (features,) = Extractors(metric.resources), metric.needs().generated.values()
    made = extractors(Pictures(pixels, samples.prompts, samples.per_prompt), features)
    return Measured({"all": samples}, {("all", one): Table(made[extractors.name(one)]) for one in features}, **known)


def by_hand(features: dict[Feature, Tensor], samples: SampleSet, **known: Any) -> Measured:
    return Measured({"all": samples}, {("all", one): Table(rows) for one, rows in features.items()}, **known)


def with_code(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: dict[str, Any]) -> list[str]:
    """Let a folder of a model hub bring code, which its JSON files name. changes: their further keys, by stem. What is filled if that code runs,
    or somebody is asked whether it may."""
    seen: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": seen.append(text) or "y")
    monkeypatch.setattr("builtins.code_that_ran", seen, raising=False)
    (folder / "code.py").write_text('import builtins\nbuiltins.code_that_ran.append("code")\nclass Own: pass\n')
    for stem in ("config", "preprocessor_config", "tokenizer_config"):
        if (path := folder / f"{stem}.json").is_file():
            classes = {"AutoConfig": "code.Own", "AutoModel": "code.Own", "AutoImageProcessor": "code.Own", "AutoTokenizer": ["code.Own", "code.Own"]}
            path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": classes, **changes.get(stem, {})}))
    return seen
