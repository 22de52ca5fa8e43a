"""Feature extractors, found by file name."""

from __future__ import annotations

from fastgen.discovery import find_class, module_names
from fastgen.evaluation.extractors.base import Extractor

_SHARED = ("base", "clip_inputs", "hub_models", "open_clip_networks")


def find_extractor(name: str) -> type[Extractor]:
    """The extractor in `extractors/<name>.py`; UserError for an unknown one."""
    return find_class(__name__, name, Extractor, module_names(__name__, shared=_SHARED), f"unknown extractor {name!r}")
