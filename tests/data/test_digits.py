"""The embedded digits and the arithmetic of their captions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fastgen.data import digits


def test_images_are_scikit_learns_in_minus_one_to_one() -> None:
    images, labels = digits.load_images()
    source: Any = load_digits()
    assert images.shape == (1797, 3, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images.min(), images.max()) == (-1, 1)
    for channel in range(3):
        np.testing.assert_array_equal((images[:, channel].numpy() + 1) * 8, source.images)
    np.testing.assert_array_equal(labels.numpy(), source.target)
    assert images.is_contiguous()


@pytest.mark.parametrize("label", range(10))
def test_captions_of_a_label_are_true_and_have_the_documented_shares(label: int) -> None:
    captions = digits.captions(label)
    word, parity = digits.WORDS[label], ("even", "odd")[label % 2]
    named = {text: p for text, p in captions.items() if word in text.split()}
    by_parity = {text: p for text, p in captions.items() if parity in text.split()}
    assert set(named) == {f"a handwritten {word}", f"the digit {word}", f"a drawing of the number {word}"}
    assert set(by_parity) == {f"an {parity} digit", f"a handwritten {parity} number"}
    assert set(captions) - set(named) - set(by_parity) == {"a handwritten digit", "any digit", "a drawing of a number"}
    assert list(named.values()) == pytest.approx([2 / 9] * 3)
    assert list(by_parity.values()) == pytest.approx([1 / 12] * 2)
    assert captions["any digit"] == pytest.approx(1 / 18)
    assert sum(captions.values()) == pytest.approx(1, abs=1e-15)
    wrong = {*digits.WORDS, "even", "odd"} - {word, parity}
    assert not any(wrong & set(text.split()) for text in captions)


def test_prompts_are_the_captions_weighted_by_the_labels_frequencies() -> None:
    table = digits.prompts()
    source: Any = load_digits()
    counts = np.bincount(source.target, minlength=10) / 1797
    assert len(table) == 30 + 4 + 3
    assert sum(table.values()) == pytest.approx(1, abs=1e-12)
    for label, word in enumerate(digits.WORDS):
        assert table[f"the digit {word}"] == pytest.approx(2 / 9 * counts[label])
    assert table["an even digit"] == pytest.approx(counts[::2].sum() / 12)
    assert table["a handwritten odd number"] == pytest.approx(counts[1::2].sum() / 12)
    assert table["a drawing of a number"] == pytest.approx(1 / 18)
