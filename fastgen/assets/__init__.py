"""What ships inside fastgen: the digits teacher (a stock diffusers folder), its digit classifier, and the scripts that made them."""

from __future__ import annotations

from pathlib import Path

DIGITS_TEACHER = Path(__file__).parent / "digits"
DIGITS_CLASSIFIER = Path(__file__).parent / "digits_classifier"
