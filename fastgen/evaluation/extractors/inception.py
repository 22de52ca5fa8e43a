"""The Inception network of FID: TensorFlow's of 2015-12-05 as torch-fidelity has it, which is another than torchvision's."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgen.errors import one_line
from fastgen.evaluation.extractors.base import Extractor, Options, Pictures, Resources
from fastgen.evaluation.weights import Unavailable
from fastgen.fingerprints import known_hash

SIDE = 299
FILE = "weights-inception-2015-12-05-6726825d.pth"
ALIAS = "pt_inception-2015-12-05-6726825d.pth"  # the same file, as pytorch-fid calls it
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SOURCE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
_BROKEN = (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError, OSError, SafetensorError)
_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
_AT_ONCE = 16  # pictures on a CPU, where larger batches leave its caches: 64 at once are a sixth slower


class Inception(Extractor):
    """Layers: `pool3` (2048); `logits_unbiased` (1008), the last layer without its bias, of which the Inception score is taken; `spatial`
    (2023), the first 7 channels of TensorFlow's mixed_6/conv, 17 · 17 · 7 in the order height, width, channel, as ADM has them; `cropped`
    (1, uint8), whether `crop` cut a patch out of the picture.

    `spatial` is unchecked: that mixed_6/conv is the output of Mixed_6d's 1x1 branch, after its ReLU, is read from torch-fidelity's conversion of
    the weights, and has not been compared with ADM's statistics.
    """

    class Config(Options):
        """resize to 299 x 299: `tf1`, TensorFlow 1's bilinear inside the network, without antialiasing; `clean`, clean-fid's: Pillow's bicubic
        with antialiasing in floats, clipped to [0, 255] and not rounded; `pytorch_fid`: torch's bilinear, without antialiasing. crop: instead,
        the central 299 x 299 pixels of the picture as it was drawn; one with a shorter side is resized whole, as in DMD2. dtype: of the
        network; features are stored in fp32 anyway. weights, sha256: another file than FID's, .safetensors or .pth, and its hash."""

        resize: Literal["tf1", "clean", "pytorch_fid"] = "tf1"
        crop: Literal[299] | None = None
        dtype: Literal["fp32", "fp64"] = "fp32"
        weights: str | None = None
        sha256: str | None = None

    convention = (
        "Inception of 2015-12-05 (torch-fidelity's port); resized to 299x299 as `resize` says (tf1: TensorFlow 1 bilinear; clean: Pillow bicubic, "
        "antialiased, in floats; pytorch_fid: torch bilinear), then (x - 128) / 128, or 2 x / 255 - 1 for pytorch_fid; TF32 off"
    )

    def __init__(self, config: Any, resources: Resources) -> None:
        super().__init__(config, resources)
        if find_spec("torch_fidelity") is None:
            raise Unavailable("needs the package torch-fidelity: pip install torch-fidelity")
        if config.weights is None:
            self._path = _known_file(resources)
        else:
            self._path = resources.weights.file(config.weights, source="the protocol's author", sha256=config.sha256)
            _ = self._network  # nobody else has read it yet

    @property
    def hash(self) -> str:
        return known_hash(self._path)

    @torch.no_grad()
    def __call__(self, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
        raw = pictures.pixels if pictures.raw is None else pictures.raw
        pixels = pictures.pixels if self.config.crop is None else [patch(each) for each in raw]
        found = {"cropped": torch.tensor([[int(self.config.crop is not None and min(each.shape[1:]) >= SIDE)] for each in raw], dtype=torch.uint8)}
        if set(layers) != {"cropped"}:
            size = _AT_ONCE if self._is_on_cpu else len(pixels)
            parts = [self._seen(pixels[start : start + size]) for start in range(0, len(pixels), size)]
            found |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: found[name] for name in layers}

    def _seen(self, pixels: Sequence[Tensor] | Tensor) -> dict[str, Tensor]:
        """The network's layers in fp32, of some pictures at once."""
        inputs = _same_sizes(pixels, lambda batch: network_input(batch, self.config.resize, self.resources.device, _DTYPES[self.config.dtype]))
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return {name: rows.float().cpu() for name, rows in _features(self._network, inputs.to(memory_format=self._order)).items()}

    @property
    def _is_on_cpu(self) -> bool:
        return self.resources.device.type == "cpu"

    @property
    def _order(self) -> torch.memory_format:
        """Channels last in memory let a CPU's convolutions take two thirds of the time; features differ by rounding, 1e-6 of the largest."""
        return torch.channels_last if self._is_on_cpu else torch.contiguous_format

    @cached_property
    def _network(self) -> nn.Module:
        network: Any = load_network(self._path, self.config.dtype)
        return network.to(self.resources.device, memory_format=self._order)


def _known_file(resources: Resources) -> Path:
    folder = resources.weights.folder
    name = ALIAS if folder is not None and (folder / ALIAS).is_file() and not (folder / FILE).exists() else FILE
    return resources.weights.file(name, source=SOURCE, sha256=SHA256)


def load_network(path: Path, dtype: str = "fp32") -> nn.Module:
    """torch-fidelity's network with the weights of a file: .safetensors, or what torch.load reads with weights_only. Unavailable where it holds
    none of this network."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    ours = io.BytesIO()  # torch-fidelity unpickles whatever it is given: it gets what has been read safely
    try:
        torch.save(_read_state(path), ours)
        ours.seek(0)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=ours)
    except _BROKEN as error:
        raise Unavailable(f"{str(path)!r} does not hold the weights of FID's Inception network ({one_line(str(error), 200)})") from error
    return network.to(_DTYPES[dtype])  # torch-fidelity 0.4.0 takes its own "float64" for fp32


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _features(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """pool3, spatial and logits_unbiased of inputs (B, 3, 299, 299), which go through the network's parts in the order in which it has them."""
    found: dict[str, Tensor] = {}
    part: Any
    for name, part in network.named_children():
        if name == "Mixed_6d":
            found["spatial"] = part.branch1x1(x)[:, :7].movedim(1, -1).flatten(1)
        x = x.flatten(1) @ part.weight.T if name == "fc" else part(x)
        if name == "AvgPool":
            found["pool3"] = x.flatten(1)
    return found | {"logits_unbiased": x}


def patch(picture: Tensor) -> Tensor:
    """The central 299 x 299 pixels of a picture (3, H, W), an odd margin as torchvision's `center_crop` has it; all of it if one side is shorter."""
    height, width = picture.shape[1:]
    if min(height, width) < SIDE:
        return picture
    top, left = round((height - SIDE) / 2), round((width - SIDE) / 2)
    return picture[:, top : top + SIDE, left : left + SIDE]


def network_input(pixels: Tensor, resize: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(B, 3, 299, 299), about in [-1, 1], of 8-bit pictures (B, 3, H, W)."""
    if resize == "clean":
        return (clean(pixels).to(device, dtype) - 128) / 128
    wide = pixels.to(device, dtype)
    if resize == "pytorch_fid":
        return 2 * nn.functional.interpolate(wide / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    return (interpolate_bilinear_2d_like_tensorflow1x(wide, size=(SIDE, SIDE), align_corners=False) - 128) / 128


def clean(pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) resized to 299 x 299 as clean-fid does: each channel by Pillow in fp32, bicubic with antialiasing, clipped to [0, 255],
    where bicubic overshoots, and not rounded (Parmar et al. 2022, arXiv:2104.11222)."""
    channels = [Image.fromarray(channel).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for channel in pixels.flatten(0, 1).float().numpy()]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 255).unflatten(0, (len(pixels), 3))


def _same_sizes(pixels: Sequence[Tensor] | Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of batches, of pictures that need not have one size."""
    if isinstance(pixels, Tensor):
        return function(pixels)
    if len({each.shape for each in pixels}) == 1:
        return function(torch.stack(list(pixels)))
    return torch.cat([function(each[None]) for each in pixels])
