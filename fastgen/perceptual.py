"""LPIPS, the perceptual distance that DMD regresses with (Zhang et al. 2018, arXiv:1801.03924), by the authors' own package `lpips`.

The package brings its linear weights; those of the backbone come from torchvision's server on first use, or from a file of torchvision's.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fastgen.errors import UserError
from fastgen.files import loading

KEY = "recipe key distiller.regression.metric"
Distance = Callable[[Tensor, Tensor], Tensor]

# The authors measured with pictures of 64 pixels and advise against smaller ones (PerceptualSimilarity#37); below 16 the fourth pooling
# of VGG leaves nothing.
SMALLEST = 64


@functools.cache
def load_lpips(net: str = "vgg", device: torch.device | str = "cpu", key: str = KEY) -> Distance:
    """(a, b), pixels (B, 3, H, W) in [0, 1] -> their distances (B,), fp32, with gradients to both. Frozen, loaded once a process.

    UserError that begins with `key` when the package or its backbone's weights cannot be had.
    """
    network = _network(net, key).to(device)
    return lambda a, b: distance(network, a, b, key)


def distance(network: nn.Module, a: Tensor, b: Tensor, key: str = KEY) -> Tensor:
    """LPIPS (B,) of pixels (B, 3, H, W) in [0, 1] by `network`, an `lpips.LPIPS`, which takes them in [-1, 1].

    Pictures whose shorter side is below 64 pixels are enlarged to it (bilinear). Values outside [0, 1] are not clamped.
    """
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3:
        raise UserError(f"{key}: lpips compares pictures (B, 3, H, W), not {tuple(a.shape)} and {tuple(b.shape)}; another metric compares anything")
    return network(*(2 * large_enough(pixels.float()) - 1 for pixels in (a, b))).flatten()


def large_enough(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) whose shorter side is at least 64, enlarged bilinearly where it is not."""
    height, width = pixels.shape[-2:]
    if min(height, width) >= SMALLEST:
        return pixels
    scale = SMALLEST / min(height, width)
    return interpolate(pixels, size=(round(height * scale), round(width * scale)), mode="bilinear", align_corners=False)


def pairwise(network: Any, pixels: Tensor) -> Tensor:
    """LPIPS (B, B), fp64 on the CPU, between all pictures (B, 3, H, W) of a batch, in the range that `network`, an `lpips.LPIPS`, takes.

    Every picture goes through the backbone once, not once a pair, and one layer's features are held at a time.
    """
    from lpips import normalize_tensor  # pyright: ignore[reportMissingImports]

    rows, columns = torch.tril_indices(len(pixels), len(pixels), -1)
    distances = torch.zeros(len(pixels), len(pixels), dtype=torch.float64)
    features = network.scaling_layer(pixels)
    for layer, head in enumerate(network.lins, 1):
        features = getattr(network.net, f"slice{layer}")(features)
        unit = normalize_tensor(features)
        means = [head((unit[row] - unit[column])[None] ** 2).mean() for row, column in zip(rows, columns, strict=True)]
        distances[rows, columns] += torch.stack(means).cpu().double()
    return distances + distances.T


def backbone_url(net: str) -> str:
    """Where torchvision has the backbone's weights; the file's name ends in the beginning of its SHA-256."""
    from torchvision import models

    weights = {"alex": models.AlexNet_Weights, "vgg": models.VGG16_Weights, "squeeze": models.SqueezeNet1_1_Weights}
    return weights[net].IMAGENET1K_V1.url


def network_from(net: str, backbone: Path) -> nn.Module:
    """An `lpips.LPIPS` with a backbone from torchvision's file, frozen; nothing is downloaded. UserError for a file of something else."""
    import lpips  # pyright: ignore[reportMissingImports]

    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices=[]):  # random weights first
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval().requires_grad_(False)
    with loading(backbone):
        given = torch.load(backbone, map_location="cpu", weights_only=True)
        # The package cuts torchvision's `features` into slices and keeps the layers' numbers.
        network.net.load_state_dict({name: given[re.sub(r"^slice\d+", "features", name)] for name in network.net.state_dict()})
    return network


def _network(net: str, key: str) -> nn.Module:
    try:
        import lpips  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{key}: lpips needs the package of that name (pip install lpips); other metrics do not") from error
    made: Any = lpips.LPIPS
    try:
        # torchvision warns of the way in which lpips asks for weights, and torch.hub announces a download; a mistake has one line.
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return made(net=net, verbose=False).eval().requires_grad_(False)
    except (OSError, RuntimeError) as error:  # no connection; a file that is broken or of another hash
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}: cannot get the {net} weights of lpips from torchvision's server ({reason}); other metrics need none") from error
