"""Formats of held weights as parameters of tests; bitsandbytes is optional, so what needs it is skipped without."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the package bitsandbytes is not installed")
NF4 = pytest.param("nf4", marks=needs_bitsandbytes)
FORMATS = ["bf16", "fp8", "int8", NF4]
