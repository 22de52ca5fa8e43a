"""The classifiers behind protocols `digits` and `scenes`: their features give the Fréchet distances, their labels the accuracies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgen.assets import DIGITS_CLASSIFIER, SCENES_CLASSIFIER
from fastgen.data import digits, scenes

DROPOUT, SMOOTHING = 0.25, 0.07
ABSENT = 10  # what a slot of a scene shows that shows no digit
NOISE, FAINTEST = 0.15, 0.6  # of the scenes a classifier sees in training: largest deviation of noise, least brightness of a digit
LONE = 0.1  # share of them without their second digit

Kind = TypeVar("Kind", bound="Classifier")


class Classifier(nn.Module):
    """Convolutions and one hidden layer (`trunk`) on images in [-1, 1], then logits (`head`)."""

    trunk: nn.Sequential
    head: nn.Linear

    def seen(self, images: Tensor) -> Tensor:
        """What of images (B, 3, H, W) goes into the trunk, one or more views of each in turn: (B * V, C, H, W)."""
        return images

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations (B, D), not negative."""
        return self.trunk(self.seen(images))

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.features(images))


class DigitClassifier(Classifier):
    """Three convolutions and a 64-d layer on the grey value of (B, 3, 8, 8) images; logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 48, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def seen(self, images: Tensor) -> Tensor:
        return images.mean(1, keepdim=True)


class SceneClassifier(Classifier):
    """Four convolutions and a 32-d layer on what there is of a colour, and of all, the same for each colour of (B, 3, 16, 16) images; logits
    (B, 4, 11): for each colour, the digit that it shows, or ABSENT."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(2, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
            nn.Conv2d(48, 64, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32, ABSENT + 1)

    def seen(self, images: Tensor) -> Tensor:
        unit = (images + 1) / 2
        mass = scenes.masses(unit)
        return torch.stack([mass, unit.amax(1, keepdim=True).expand_as(mass)], 2).flatten(0, 1)

    def features(self, images: Tensor) -> Tensor:
        """(B, 4 * 32), colour by colour."""
        return super().features(images).unflatten(0, (len(images), -1)).flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        return super().logits(features.unflatten(1, (len(scenes.COLOURS), -1)))


def fit(model: Classifier, draw: Callable[[], tuple[Tensor, Tensor]], steps: int, say: Callable[[str], None] = lambda line: None) -> None:
    """Cross entropy on batches (images, labels), with dropout before the last layer. say: told how far it is, twenty times."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        images, labels = draw()
        features = nn.functional.dropout(model.features(images), DROPOUT)
        loss = nn.functional.cross_entropy(model.logits(features).movedim(-1, 1), labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 20) == 0:
            say(f"classifier: step {step} of {steps}, loss {loss.item():.3f}")
    model.eval()


@torch.no_grad()
def predicted(model: nn.Module, images: Tensor) -> Tensor:
    """The most likely labels, (N,) of digits and (N, 4) of scenes."""
    return torch.cat([model(part).argmax(-1) for part in images.split(1024)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of labels that are the most likely ones."""
    return (predicted(model, images) == labels).double().mean().item()


def train_digits(output: Path, seed: int, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Train on 80 % of the digits and write model.safetensors and config.json; returns what was recorded."""
    images, labels = digits.load_images()
    train, held_out = digits.split(labels, 0.8, seed)
    torch.manual_seed(seed)
    model, epochs, batch = DigitClassifier(), 40, 64

    def draw() -> tuple[Tensor, Tensor]:
        rows = train[torch.randint(len(train), (batch,))]
        return images[rows], labels[rows]

    fit(model, draw, epochs * (len(train) // batch), say)
    record = {
        "seed": seed,
        "held_out_accuracy": accuracy(model, images[held_out], labels[held_out]),
        "accuracy": accuracy(model, images, labels),
        "held_out": len(held_out),
    }
    return _written(model, output, record)


def train_scenes(output: Path, seed: int, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Train on scenes of the training digits, each of them new, and write model.safetensors and config.json; returns what was recorded."""
    torch.manual_seed(seed)
    model, steps, batch, count = SceneClassifier(), 1600, 48, 5000
    fit(model, lambda: disturbed(batch), steps, say)
    held_out = scenes.make(count, scenes.pools()[1], seed)
    found, wanted = predicted(model, held_out.images), slots(held_out)
    right, shown = found == wanted, wanted != ABSENT
    record = {
        "seed": seed,
        "held_out": count,
        "held_out_accuracy": {colour: right[:, slot].double().mean().item() for slot, colour in enumerate(scenes.COLOURS)},
        "held_out_digits": {colour: right[shown[:, slot], slot].double().mean().item() for slot, colour in enumerate(scenes.COLOURS)},
        "held_out_scenes": right.all(1).double().mean().item(),
    }
    return _written(model, output, record)


def slots(of: scenes.Scenes) -> Tensor:
    """The labels (N, 4) of scenes."""
    return torch.full((len(of), len(scenes.COLOURS)), ABSENT).scatter_(1, of.colours, of.digits)


def disturbed(count: int) -> tuple[Tensor, Tensor]:
    """New training scenes with their labels, from the ambient generator: digits turned, stretched, moved and fainter, one of them missing now
    and then, in noise."""
    images, labels = digits.load_images()
    pool = scenes.pools()[0]
    rows = pool[torch.randint(len(pool), (count, 2))]
    colours = torch.rand(count, len(scenes.COLOURS)).argsort(1)[:, :2]
    glyphs = _bent((images[rows.flatten(), :1] + 1) / 2).view(count, 2, scenes.GLYPH, scenes.GLYPH)
    there = torch.stack([torch.ones(count), (torch.rand(count) > LONE).float()], 1)
    glyphs = glyphs * (there * (FAINTEST + (1 - FAINTEST) * torch.rand(count, 2)))[..., None, None]
    pictures = scenes.compose(glyphs, colours, scenes.corners(torch.randint(len(scenes.RELATIONS), (count,))))
    noisy = pictures * 2 - 1 + NOISE * torch.rand(count, 1, 1, 1) * torch.randn(pictures.shape)
    shown = torch.where(there > 0, labels[rows], ABSENT)
    return noisy.clamp(-1, 1), torch.full((count, len(scenes.COLOURS)), ABSENT).scatter_(1, colours, shown)


def _bent(glyphs: Tensor) -> Tensor:
    """Glyphs (N, 1, 8, 8) turned by up to 0.15, stretched by up to a tenth and moved by up to half a pixel."""
    angle, wide, high, right, down = (torch.rand(5, len(glyphs)) * 2 - 1) * torch.tensor([0.15, 0.1, 0.1, 0.125, 0.125])[:, None]
    turn = [torch.stack([angle.cos() * (1 + wide), -angle.sin(), right], 1), torch.stack([angle.sin(), angle.cos() * (1 + high), down], 1)]
    grid = nn.functional.affine_grid(torch.stack(turn, 1), list(glyphs.shape), align_corners=False)
    return nn.functional.grid_sample(glyphs, grid, align_corners=False)


def _written(model: nn.Module, output: Path, record: dict[str, Any]) -> dict[str, Any]:
    record["parameters"] = sum(p.numel() for p in model.parameters())
    output.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), output / "model.safetensors")
    (output / "config.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def load_classifier(folder: Path = DIGITS_CLASSIFIER) -> DigitClassifier:
    """The bundled classifier of digits, in eval mode."""
    return _loaded(DigitClassifier(), folder)


def load_scene_classifier(folder: Path = SCENES_CLASSIFIER) -> SceneClassifier:
    """The bundled classifier of scenes, in eval mode."""
    return _loaded(SceneClassifier(), folder)


def _loaded(model: Kind, folder: Path) -> Kind:
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
