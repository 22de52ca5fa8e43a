"""The tiny diffusers denoisers that tests of mixtures of experts split, and the splits that divide their layers evenly."""

from __future__ import annotations

from typing import Any

import diffusers_zoo
import torch
from torch import Tensor, nn

from fastgen.surgery import moe
from fastgen.surgery.moe.split import Choice


class Around(nn.Module):
    """A network of one block with one layer in it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"ff": layer})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["ff"](x)


BLOCKS = {
    "dit": ["transformer_blocks"],
    "sd15": ["down_blocks", "up_blocks"],
    "sd3": ["transformer_blocks"],
    "flux": ["transformer_blocks", "single_transformer_blocks"],
    "flux2klein": ["transformer_blocks", "single_transformer_blocks"],
    "flux3": ["mode_blocks.image", "txt_mode_blocks", "single_transformer_blocks"],
    "ovis": ["transformer_blocks", "single_transformer_blocks"],
    "prx": ["blocks"],
    "pixart": ["transformer_blocks"],
    "sana": ["transformer_blocks"],
    "wan": ["blocks"],
    "qwen": ["transformer_blocks"],
    "zimage": ["noise_refiner", "layers"],
}
SPLIT = [name for name in BLOCKS if name not in ("sana",)]


def blocks(name: str, network: nn.Module) -> list[nn.Module]:
    return [block for key in BLOCKS[name] for block in network.get_submodule(key).children()]


def experts(name: str, active: float, choice: Choice = "token") -> moe.Experts:
    """Four routed experts; of Z-Image's 85 hidden neurons each takes a fifth, as the others' cannot."""
    return moe.Experts(4, 1.0, 1.0 if name == "zimage" else 0.25, active, choice)


def split(
    name: str, active: float = 4, choice: Choice = "token", dtype: torch.dtype = torch.float64
) -> tuple[diffusers_zoo.Denoiser, list[moe.ExpertLayer]]:
    """A tiny denoiser with experts, its routers still at zero."""
    denoiser = diffusers_zoo.build(name, dtype)
    how, inside = experts(name, active, choice), blocks(name, denoiser.network)
    importance = moe.random(moe.to_convert(denoiser.network, inside, how), seed=0)
    return denoiser, moe.convert(denoiser.network, inside, how, importance)


@torch.no_grad()
def stir(layers: list[moe.ExpertLayer]) -> None:
    """Random routers, of scores far enough apart that a small step changes no choice."""
    generator = torch.Generator().manual_seed(4)
    for layer in layers:
        layer.router.weight.copy_(torch.randn(layer.router.weight.shape, generator=generator))


def largest(a: Tensor, b: Any) -> float:
    return float((a.detach() - b.detach()).abs().max())


# More of the tiny networks' blocks, so that there are groups of them.
DEEP: dict[str, dict[str, int]] = {
    "dit": {"num_layers": 4},
    "sd3": {"num_layers": 5},
    "flux": {"num_layers": 4, "num_single_layers": 5},
    "flux2klein": {"num_layers": 2, "num_single_layers": 4},
    "pixart": {"num_layers": 4},
    "sana": {"num_layers": 4},
    "wan": {"num_layers": 4},
    "qwen": {"num_layers": 4},
    "ovis": {"num_layers": 2, "num_single_layers": 4},
    "prx": {"depth": 4},
    "zimage": {},
}


def deep(name: str, dtype: torch.dtype = torch.float64) -> tuple[diffusers_zoo.Denoiser, list[nn.Module]]:
    """A denoiser and its blocks, of all its lists."""
    denoiser = diffusers_zoo.build(name, dtype, **DEEP[name])
    return denoiser, [block for key in BLOCKS[name] for block in denoiser.network.get_submodule(key).children()]


def grouped(
    name: str, kept: int, size: int = 2, dtype: torch.dtype = torch.float64, *, random: bool = True
) -> tuple[diffusers_zoo.Denoiser, list[moe.BlockRouter]]:
    """Its blocks in groups, whose routers are random, so that the two samples choose unlike, or at zero."""
    denoiser, inside = deep(name, dtype)
    routers = moe.mix_blocks(denoiser.network, inside, moe.Groups(size, kept))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for router in routers if random else []:
            for parameter in router.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return denoiser, routers
