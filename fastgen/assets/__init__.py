"""What ships inside fastgen, and the scripts that make it: the digits teacher (a stock diffusers folder), classifiers of digits and of scenes."""

from __future__ import annotations

from pathlib import Path

DIGITS_TEACHER = Path(__file__).parent / "digits"
DIGITS_CLASSIFIER = Path(__file__).parent / "digits_classifier"
SCENES_TEACHER = Path(__file__).parent / "scenes"
SCENES_CLASSIFIER = Path(__file__).parent / "scenes_classifier"
SCENES_STATISTICS = Path(__file__).parent / "scenes_statistics"
