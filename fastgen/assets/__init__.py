"""What ships inside fastgen, and the scripts that make it: teachers of digits and of scenes (stock diffusers folders), classifiers of both,
others for losses, which judge nothing, and what the scenes teacher draws, as statistics."""

from __future__ import annotations

from pathlib import Path

DIGITS_TEACHER = Path(__file__).parent / "digits"
DIGITS_CLASSIFIER = Path(__file__).parent / "digits_classifier"
SCENES_TEACHER = Path(__file__).parent / "scenes"
SCENES_CLASSIFIER = Path(__file__).parent / "scenes_classifier"
DIGITS_FEATURES = Path(__file__).parent / "digits_features"
SCENES_FEATURES = Path(__file__).parent / "scenes_features"
SCENES_STATISTICS = Path(__file__).parent / "scenes_statistics"
