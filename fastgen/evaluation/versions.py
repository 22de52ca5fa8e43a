"""By what pictures and features were made, as far as neither a protocol nor a model decides it: packages and the kind of device."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

FORMAT = 1  # raised whenever we draw or extract otherwise without a new version of ours: what was made before is then made again
# Packages that decide about pictures, features or their arithmetic.
_PACKAGES = {"fastgen": "fastgen-distill", "torch": "torch", "diffusers": "diffusers", "transformers": "transformers"} | {
    name: name for name in ("numpy", "pillow", "torch-fidelity", "open_clip_torch", "lpips")
}


def installed() -> dict[str, str]:
    """The versions of those packages; what is not installed is left out."""
    return {key: version for key, package in _PACKAGES.items() if (version := _version(package))}


def made_by(device: torch.device) -> dict[str, Any]:
    """What everything is kept under that was computed here. Two machines of the same versions and kind of device, such as two GPUs, share it."""
    return {"format": FORMAT, "versions": installed(), "device": device.type}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
