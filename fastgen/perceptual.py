"""LPIPS, the perceptual distance that DMD regresses with (Zhang et al. 2018, arXiv:1801.03924), by the authors' own package `lpips`.

The package brings its linear weights; those of the backbone come from torchvision's server on first use.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fastgen.errors import UserError

KEY = "recipe key distiller.regression.metric"
Distance = Callable[[Tensor, Tensor], Tensor]

# The authors measured with pictures of 64 pixels and advise against smaller ones (PerceptualSimilarity#37); below 16 the fourth pooling
# of VGG leaves nothing.
SMALLEST = 64


@functools.cache
def load_lpips(net: str = "vgg", device: torch.device | str = "cpu") -> Distance:
    """(a, b), pixels (B, 3, H, W) in [0, 1] -> their distances (B,), fp32, with gradients to both. Frozen, loaded once a process.

    UserError that names distiller.regression.metric when the package or its backbone's weights cannot be had.
    """
    network = _network(net).to(device)
    return lambda a, b: distance(network, a, b)


def distance(network: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """LPIPS (B,) of pixels (B, 3, H, W) in [0, 1] by `network`, an `lpips.LPIPS`, which takes them in [-1, 1].

    Pictures whose shorter side is below 64 pixels are enlarged to it (bilinear). Values outside [0, 1] are not clamped.
    """
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3:
        raise UserError(f"{KEY}: lpips compares pictures (B, 3, H, W), not {tuple(a.shape)} and {tuple(b.shape)}; `latent` compares anything")
    return network(*(2 * _large_enough(pixels.float()) - 1 for pixels in (a, b))).flatten()


def _large_enough(pixels: Tensor) -> Tensor:
    height, width = pixels.shape[-2:]
    if min(height, width) >= SMALLEST:
        return pixels
    scale = SMALLEST / min(height, width)
    return interpolate(pixels, size=(round(height * scale), round(width * scale)), mode="bilinear", align_corners=False)


def _network(net: str) -> nn.Module:
    try:
        import lpips  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{KEY}: lpips needs the package of that name (pip install lpips); `latent` needs nothing") from error
    made: Any = lpips.LPIPS
    try:
        # torchvision warns of the way in which lpips asks for weights, and torch.hub announces a download; a mistake has one line.
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return made(net=net, verbose=False).eval().requires_grad_(False)
    except (OSError, RuntimeError) as error:  # no connection; a file that is broken or of another hash
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{KEY}: cannot get the {net} weights of lpips from torchvision's server ({reason}); `latent` needs none") from error
