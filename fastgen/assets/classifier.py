"""The digit classifier behind protocol `digits`: its features give FD-digits, its labels prompt accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgen.assets import DIGITS_CLASSIFIER
from fastgen.data import digits

EPOCHS, BATCH = 40, 64
DROPOUT, SMOOTHING = 0.25, 0.07


class DigitClassifier(nn.Module):
    """Three convolutions and a 64-d layer on the grey value of (B, 3, 8, 8) images in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 48, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations (B, 64), not negative."""
        return self.trunk(images.mean(1, keepdim=True))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10)."""
        return self.head(self.features(images))


def split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Row indices of a stratified 80/20 split (train, held out). The same writers are on both sides."""
    generator = torch.Generator().manual_seed(seed)
    parts = [rows[torch.randperm(len(rows), generator=generator)] for rows in (torch.where(labels == k)[0] for k in range(10))]
    cuts = [round(0.8 * len(rows)) for rows in parts]
    return torch.cat([r[:c] for r, c in zip(parts, cuts, strict=True)]), torch.cat([r[c:] for r, c in zip(parts, cuts, strict=True)])


@torch.no_grad()
def accuracy(model: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images (N, 3, 8, 8) whose most likely label is right."""
    return (model(images).argmax(1) == labels).double().mean().item()


def train_classifier(output: Path, seed: int) -> dict[str, Any]:
    """Train on the training split and write model.safetensors and config.json; returns what was recorded."""
    images, labels = digits.load_images()
    train, held_out = split(labels, seed)
    torch.manual_seed(seed)
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = EPOCHS * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = train[torch.randint(len(train), (BATCH,))]
        features = nn.functional.dropout(model.features(images[rows]), DROPOUT)
        loss = nn.functional.cross_entropy(model.head(features), labels[rows], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    record = {
        "seed": seed,
        "held_out_accuracy": accuracy(model, images[held_out], labels[held_out]),
        "accuracy": accuracy(model, images, labels),
        "held_out": len(held_out),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    output.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), output / "model.safetensors")
    (output / "config.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def load_classifier(folder: Path = DIGITS_CLASSIFIER) -> DigitClassifier:
    """The bundled classifier, in eval mode."""
    model = DigitClassifier()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
