"""Protocol digits, measured by a classifier that needs no training."""

from __future__ import annotations

import pytest
from linear_classifier import LinearClassifier
from torch import Tensor

from fastgen.assets import classifier as bundled
from fastgen.data import digits
from fastgen.evaluation.protocol import Protocol, load_protocol


@pytest.fixture(scope="session")
def linear() -> LinearClassifier:
    return LinearClassifier()


@pytest.fixture
def classifier(linear: LinearClassifier, monkeypatch: pytest.MonkeyPatch) -> LinearClassifier:
    """What protocol digits measures with while a test has it, in place of the bundled one."""
    monkeypatch.setattr(bundled, "load_classifier", lambda: linear)
    return linear


@pytest.fixture
def protocol(classifier: LinearClassifier) -> Protocol:
    """Protocol digits, measured by `classifier`."""
    return load_protocol("digits")


@pytest.fixture(scope="session")
def real() -> Tensor:
    """All real images, (1797, 3, 8, 8) in [0, 1]."""
    return (digits.load_images()[0] + 1) / 2
