"""The embedded data set: scikit-learn's 1,797 handwritten digits (8x8, UCI), and captions that name the digit, its parity, or nothing."""

from __future__ import annotations

import torch
from torch import Tensor

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMED = ("a handwritten {}", "the digit {}", "a drawing of the number {}")
GENERIC = ("a handwritten digit", "any digit", "a drawing of a number")
PARITY = (("an even digit", "a handwritten even number"), ("an odd digit", "a handwritten odd number"))

# Shares of the captions that name the digit, its parity, or neither; the null prompt is the distiller's conditioning dropout.
SHARES = {"named": 4 / 6, "parity": 1 / 6, "generic": 1 / 6}


def load_images() -> tuple[Tensor, Tensor]:
    """All digits: images (1797, 3, 8, 8) fp32 in [-1, 1] with three equal channels, and labels (1797,) int64."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
    return grey.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels).long()


def split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row indices of a stratified split: `share` of each label, and the rest. The same writers are on both sides."""
    generator = torch.Generator().manual_seed(seed)
    parts = [rows[torch.randperm(len(rows), generator=generator)] for rows in (torch.where(labels == k)[0] for k in range(10))]
    cuts = [round(share * len(rows)) for rows in parts]
    return torch.cat([r[:c] for r, c in zip(parts, cuts, strict=True)]), torch.cat([r[c:] for r, c in zip(parts, cuts, strict=True)])


def captions(label: int) -> dict[str, float]:
    """Every caption that is true of `label`, with its probability."""
    groups = {
        "named": [template.format(WORDS[label]) for template in NAMED],
        "parity": PARITY[label % 2],
        "generic": GENERIC,
    }
    return {text: SHARES[name] / len(texts) for name, texts in groups.items() for text in texts}


def prompts() -> dict[str, float]:
    """Every caption with its probability under the data's own label frequencies: the prompt set that distillation draws from."""
    _, labels = load_images()
    share = torch.bincount(labels, minlength=10).double() / len(labels)
    table: dict[str, float] = {}
    for label, weight in enumerate(share.tolist()):
        for text, probability in captions(label).items():
            table[text] = table.get(text, 0.0) + weight * probability
    return table
