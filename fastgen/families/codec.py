"""The VAE of a diffusers pipeline: pixels to normalised latents and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.families.components import Component
from fastgen.families.source import Source

_STATISTICS = ("latents_mean", "latents_std")  # one number a channel


class Codec:
    """Latents are (z - shift) * scale of the VAE's z. numbers: the options of its configuration that the pipeline normalises by:
    `scaling_factor`, `shift_factor`, `latents_mean` and `latents_std`; the last two may be missing where there is a `scaling_factor`.

    UserError for a configuration without them. Loads on first use.
    """

    def __init__(self, source: Source, class_name: str, numbers: Sequence[str]) -> None:
        self._source, self._class_name, self._numbers = source, class_name, numbers
        self._loaded: Any = None
        self.config = source.component("vae", class_name)

    def check(self) -> None:
        """UserError for a number that the pipeline needs and does not find."""
        for key in self._numbers if self.config.classes else ():
            value = self.config.option(key)
            if key in _STATISTICS:
                numbers: Any = value if isinstance(value, (list, tuple)) else []
                listed = len(numbers) == self._channels and all(map(_is_number, numbers)) and (key == "latents_mean" or 0 not in numbers)
                fits = listed or (value is None and "scaling_factor" in self._numbers)
            else:
                fits = _is_number(value) and (key != "scaling_factor" or value != 0)
            if not fits:
                zero = "" if key in ("latents_mean", "shift_factor") else " but 0"
                what = f"{self._channels} numbers{zero}, one a channel" if key in _STATISTICS else f"a number{zero}"
                raise UserError(f"recipe key teacher.pretrained: its vae has {key} {value!r}, but {self._source.pipeline_class} needs {what}")

    @property
    def _channels(self) -> int:
        """Of the latents."""
        count = _says(self.config, "latent_channels")
        return self.config.option("z_dim") if count is None else count

    @property
    def is_video(self) -> bool:
        """Whether its pixels and latents have a time axis, which pictures go through with one frame."""
        return _says(self.config, "temperal_downsample") is not None

    @property
    def stride(self) -> int:
        """Pixels on a side of one latent."""
        return self._factor

    @property
    def _factor(self) -> int:
        """Of the VAE itself."""
        if (factor := _says(self.config, "scale_factor_spatial")) is not None:
            return factor
        if self.is_video:
            return 2 ** len(self.config.option("temperal_downsample"))
        blocks = _says(self.config, "encoder_block_out_channels") or self.config.option("block_out_channels")
        return 2 ** (len(blocks) - 1)

    @property
    def frame_stride(self) -> int:
        """Frames behind one latent frame, after the first, which stands alone."""
        factor = _says(self.config, "scale_factor_temporal")
        return 2 ** sum(self.config.option("temperal_downsample")) if factor is None else factor

    def arranged(self, latents: Tensor) -> Tensor:
        """What the VAE itself encodes, as the network has it."""
        return latents

    def unarranged(self, latents: Tensor) -> Tensor:
        return latents

    @property
    def vae(self) -> Any:
        if self._loaded is None:
            live = self._source.live
            self._loaded = live.vae if live is not None else self._source.network("vae", self._class_name).requires_grad_(False)
        return self._loaded

    def free(self) -> None:
        self._loaded = None

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised latents fp32 of pixels (B, 3[, T], H, W) in [-1, 1]; a posterior's mode, no sampling."""
        vae = self._near(pixels)
        pixels = pixels.to(vae.device, vae.dtype)
        still = self.is_video and pixels.ndim == 4
        out = vae.encode(pixels[:, :, None] if still else pixels)
        latents = self.arranged(out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latent).float()
        shift, scale = self._affine(latents)
        latents = (latents - shift) * scale
        return latents[:, :, 0] if still else latents

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3[, T], H, W) fp32, black at 0 and white at 1, not clamped; gradients reach the latents and not the VAE."""
        vae = self._near(latents)
        latents = latents.to(vae.device, vae.dtype)
        still = self.is_video and latents.ndim == 4
        latents = latents[:, :, None] if still else latents
        shift, scale = self._affine(latents)
        with _frozen(vae):
            pixels = vae.decode(self.unarranged(latents / scale + shift), return_dict=False)[0]
        pixels = pixels.float() / 2 + 0.5
        return pixels[:, :, 0] if still else pixels

    def _near(self, x: Tensor) -> Any:
        """The VAE on x's device; a live pipeline's stays where its owner put it."""
        return self.vae if self._source.live is not None else self.vae.to(x.device)

    def _affine(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(shift, scale), numbers or (1, C, 1, 1[, 1]) like x (B, C, H, W) or (B, C, T, H, W)."""
        config = self.vae.config
        numbers = {key: getattr(config, key) for key in self._numbers}
        scale = numbers.get("scaling_factor") or 1.0
        if numbers.get("latents_mean") is None or numbers.get("latents_std") is None:
            return numbers.get("shift_factor", 0.0), scale
        mean, std = (torch.tensor(numbers[key]).view(1, -1, *[1] * (x.ndim - 2)).to(x) for key in _STATISTICS)
        return mean, scale / std


class PatchedCodec(Codec):
    """Latents are 2x2 of the VAE's in channels, normalised by the running statistics of its batch norm over these (FLUX.2)."""

    @property
    def stride(self) -> int:
        return 2 * self._factor

    def arranged(self, latents: Tensor) -> Tensor:
        return F.pixel_unshuffle(latents, 2)

    def unarranged(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, 2)

    def _affine(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        norm = self.vae.bn
        mean, variance = (each.view(1, -1, 1, 1).to(x) for each in (norm.running_mean, norm.running_var))
        return mean, (variance + self.vae.config.batch_norm_eps).rsqrt()


class Pixels(Codec):
    """Of a network without a VAE, whose latents are RGB in [-1, 1], divided by those settings of the pipeline that are named instead of the
    VAE's options: by the scale of its noise, which so has unit variance."""

    def __init__(self, source: Source, class_name: str, numbers: Sequence[str]) -> None:
        self.config = Component("vae", (), {})
        self.scale = math.prod(float(source.setting(name)) for name in numbers)

    @property
    def stride(self) -> int:
        return 1

    @property
    def frame_stride(self) -> int:
        return 1

    @property
    def is_video(self) -> bool:
        return False

    def check(self) -> None:
        pass

    def free(self) -> None:
        pass

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels.float() / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float() * self.scale / 2 + 0.5


def _says(component: Component, key: str) -> Any:
    """An option, or None where its class has no such."""
    try:
        return component.option(key)
    except UserError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No graph built inside reaches the parameters; afterwards they are as a live pipeline's owner had them."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
