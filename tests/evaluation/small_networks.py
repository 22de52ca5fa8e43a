"""Weights of tiny networks under the names that metrics look for, in one folder: random ones, and CLIPs that know some photographs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photographs import Piece
from tiny_clips import MEAN, SIZE, STD, call, cropped, image_embeddings, inputs_of, put, tiny_clip
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastgen.evaluation.extractors import hps_v21, lpips, pick_score

CLIPS = {"ViT-L-14": "vit_large_patch14_clip_224.openai", "ViT-L-14-336": "vit_large_patch14_clip_336.openai"}


def write_all(folder: Path, seen: Sequence[Piece], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights for every metric but those of Inception; seen: what CLIPs are fitted to."""
    write_dinov2(folder / "dinov2-large")
    call(monkeypatch, *CLIPS, hps_v21.MODEL)
    for place in CLIPS.values():
        put(fitted_clip(seen, quick_gelu=True), folder / place / "open_clip_model.safetensors")
    torch.save({"state_dict": fitted_clip(seen).state_dict()}, folder / hps_v21.FILE)
    write_pick_score(folder / pick_score.FOLDER, seen)
    name = write_alexnet(folder)
    monkeypatch.setattr(lpips, "backbone_url", lambda net: f"https://download.pytorch.org/models/{name}")
    return folder


def write_dinov2(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)


def write_alexnet(folder: Path) -> str:
    """Random convolutions for LPIPS; the file's name, which ends in the beginning of its hash as torchvision's do."""
    from torchvision.models import alexnet

    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {f"features.{name}": each.shape for name, each in alexnet(weights=None).features.state_dict().items()}
    state = {name: torch.randn(shape, generator=generator) / max(1, shape[1:].numel()) ** 0.5 for name, shape in shapes.items()}
    torch.save(state, folder / "file")
    digest = hashlib.sha256((folder / "file").read_bytes()).hexdigest()
    return (folder / "file").rename(folder / f"alexnet-owt-{digest[:8]}.pth").name


def fitted_clip(seen: Sequence[Piece], *, quick_gelu: bool = False) -> nn.Module:
    """A random CLIP of open_clip's, fitted as `fit` says."""
    import open_clip

    module = tiny_clip(quick_gelu=quick_gelu)

    def before(prompts: list[str]) -> Tensor:
        known, module.text_projection = module.text_projection, nn.Parameter(torch.eye(len(module.text_projection)))  # pyright: ignore[reportArgumentType]
        found, module.text_projection = module.encode_text(open_clip.tokenize(prompts)), known
        return found

    with torch.no_grad():
        projection = fit(seen, image_embeddings(module, pixels(seen)), before)
    module.text_projection = nn.Parameter(projection)
    return module


def write_pick_score(folder: Path, seen: Sequence[Piece]) -> None:
    """A random CLIP of transformers', fitted as `fit` says, with a token a letter."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1, "pad_token_id": len(pieces) - 1}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, **special, "vocab_size": len(pieces), "max_position_embeddings": 77}
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "image_size": SIZE, "patch_size": 8}, projection_dim=16)).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)

        def before(prompts: list[str]) -> Tensor:
            return model.text_model(**tokenizer(prompts, padding=True, return_tensors="pt")).pooler_output

        embedded = normalize(model.get_image_features(inputs_of(cropped(pixels(seen)))).pooler_output, dim=1)
        model.text_projection.weight.copy_(fit(seen, embedded, before).T)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    known = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    known |= {"do_center_crop": True, "do_normalize": True, "do_resize": True, "image_mean": MEAN, "image_std": STD, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(known))


def fit(seen: Sequence[Piece], embedded: Tensor, before: Callable[[list[str]], Tensor]) -> Tensor:
    """(width, D): the last step from text, solved for: each prompt's embedding points where its photograph's pieces differ from all, so that fit to a
    prompt means something. embedded: (N, D), of the pieces, of unit length, by a network of random weights; before: what text is before that step."""
    prompts = list(dict.fromkeys(piece.prompt for piece in seen))
    means = torch.stack([embedded[[piece.prompt == prompt for piece in seen]].mean(0) for prompt in prompts])
    wanted = normalize(means - embedded.mean(0), dim=1)
    return torch.linalg.lstsq(before(prompts).double(), wanted.double()).solution.float()


def pixels(pieces: Sequence[Piece]) -> Tensor:
    """(N, 3, H, W) uint8."""
    return torch.from_numpy(np.stack([np.asarray(piece.image) for piece in pieces])).permute(0, 3, 1, 2)
