"""Seeded random weights for FID's Inception network, of a size that keeps features in the order of 1 through all of its layers."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import nn

from fastgen.fingerprints import file_hash


def random_weights(path: Path, seed: int = 0) -> str:
    """Write a state dict that torch-fidelity's network takes, as .pth or .safetensors; returns the file's SHA-256."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object) -> None:
            """Nothing: its weights are written here."""

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Blank("blank", ["2048"], feature_extractor_weights_path=empty)
    generator = torch.Generator().manual_seed(seed)
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.normal_(0, (2 / part.weight[0].numel()) ** 0.5, generator=generator)
        elif isinstance(part, nn.BatchNorm2d):
            part.weight.uniform_(0.8, 1.2, generator=generator)
            part.bias.normal_(0, 0.1, generator=generator)
            part.running_mean.normal_(0, 0.1, generator=generator)  # pyright: ignore[reportOptionalMemberAccess]
            part.running_var.uniform_(0.8, 1.2, generator=generator)  # pyright: ignore[reportOptionalMemberAccess]
        elif isinstance(part, nn.Linear):
            part.weight.normal_(0, 0.1, generator=generator)
            part.bias.normal_(0, 1, generator=generator)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(dict(network.state_dict()), path)
    else:
        torch.save(network.state_dict(), path)
    return file_hash(path)
