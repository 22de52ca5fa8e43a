"""The embedded scenes: what they show is what they are said to show, and the reference shows none of their digits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fastgen.data import digits, scenes
from fastgen.data.images import load_images
from fastgen.data.prompts import load_prompts

FEW = 600


@pytest.fixture(scope="module")
def few() -> scenes.Scenes:
    return scenes.make(FEW, scenes.pools()[0], 7)


def test_scenes_are_from_their_seed(few: scenes.Scenes) -> None:
    again, other = (scenes.make(FEW, scenes.pools()[0], seed) for seed in (7, 8))
    for name in ("images", "colours", "digits", "relations"):
        assert torch.equal(getattr(few, name), getattr(again, name))
        assert not torch.equal(getattr(few, name), getattr(other, name))
    assert few.images.shape == (FEW, 3, 16, 16) and few.images.dtype == torch.float32
    assert (few.images.min(), few.images.max()) == (-1, 1)


def test_training_and_reference_share_no_digit_and_every_digit_is_in_one() -> None:
    train, reference = scenes.pools()
    assert (len(train), len(reference)) == (1297, 500)
    assert sorted(torch.cat([train, reference]).tolist()) == list(range(1797))
    labels = digits.load_images()[1]
    share = torch.bincount(labels[reference]).double() / torch.bincount(labels)
    assert (share - 500 / 1797).abs().max() < 0.005


def test_colours_differ_and_everything_is_about_as_frequent(few: scenes.Scenes) -> None:
    assert (few.colours[:, 0] != few.colours[:, 1]).all()
    for values, kinds in ((few.colours, 4), (few.digits, 10), (few.relations, 4)):
        share = torch.bincount(values.flatten(), minlength=kinds).double() / values.numel()
        assert (share * kinds - 1).abs().max() < 0.35


def test_the_centres_of_the_colours_tell_the_relation(few: scenes.Scenes) -> None:
    centre, rows = scenes.centres(scenes.moments((few.images + 1) / 2)), torch.arange(FEW)
    one, other = (centre[rows, few.colours[:, place]] for place in (0, 1))
    assert (scenes.relation(one, other) == few.relations).double().mean() > 0.995
    assert torch.equal(scenes.relation(other, one), scenes.relation(one, other) ^ 1)
    assert not one.isnan().any()
    assert scenes.relation(one[:1], torch.full((1, 2), torch.nan)).item() == -1


def test_digits_beside_each_other_move_along_the_rows_and_jitter_along_the_columns() -> None:
    relations = torch.arange(4).repeat_interleave(500)
    corners = scenes.corners(relations, torch.Generator().manual_seed(0))
    for number, name in enumerate(scenes.RELATIONS):
        of = corners[relations == number]
        fixed, free = (1, 0) if number < 2 else (0, 1)
        first, second = (0, 1) if name in ("left of", "above") else (1, 0)
        assert set(of[:, first, fixed].tolist()) == {0, 1}
        assert set(of[:, second, fixed].tolist()) == {7, 8}
        assert set(of[:, 0, free].tolist()) == set(of[:, 1, free].tolist()) == set(range(9))
        assert (of[:, 0, free] - of[:, 1, free]).abs().max() == scenes.FREE


def test_compositing_keeps_the_larger_value_of_each_channel() -> None:
    glyphs = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    picture = scenes.compose(glyphs, torch.tensor([[0, 3]]), torch.tensor([[[2, 1], [3, 7]]]))[0]
    red, yellow = torch.zeros(16, 16), torch.zeros(16, 16)
    red[2:10, 1:9], yellow[3:11, 7:15] = glyphs[0]
    assert torch.equal(picture, torch.stack([torch.maximum(red, yellow), yellow, torch.zeros(16, 16)]))


def test_scenes_show_the_digits_of_their_pool_and_nothing_else() -> None:
    images, labels = digits.load_images()
    of = scenes.make(50, torch.tensor([11]), 0)
    assert (of.digits == labels[11]).all()
    mass = scenes.moments((of.images + 1) / 2)[..., 0]
    whole = ((images[11, 0] + 1) / 2).sum()
    there = torch.zeros(50, 4, dtype=torch.bool).scatter(1, of.colours, True)
    assert (mass[there] / whole).min() > 0.8  # where two meet, one hides a little of the other
    assert (mass[there] / whole).max() <= 1 + 1e-6
    assert (mass[~there] / whole).max() < 0.2  # red and green that meet are yellow


def test_captions_are_true_and_have_the_documented_shares() -> None:
    found = scenes.captions((0, 2), (3, 7), 0)
    assert found == pytest.approx(
        {
            "a red three left of a blue seven": 0.6,
            "two digits": 0.1,
            "a red digit and a blue digit": 0.1,
            "a three and a seven": 0.1,
            "a red digit and a seven": 0.1,
        }
    )
    assert "an eight and a one" in scenes.captions((1, 3), (8, 1), 2)
    assert "a green eight above a yellow one" in scenes.captions((1, 3), (8, 1), 2)


def test_prompts_are_the_captions_of_the_data_set() -> None:
    table, images = load_prompts("fastgen:scenes"), load_images("fastgen:scenes")
    assert len(images) == 20_000
    counted = Counter()
    for captions in images.captions:
        counted.update(captions)
    assert table.keys() == counted.keys()
    assert table["two digits"] == pytest.approx(0.1)
    assert sum(table.values()) == pytest.approx(1)
    assert sum(weight for text, weight in table.items() if any(relation in text for relation in scenes.RELATIONS)) == pytest.approx(0.6)
    assert table["a red digit and a blue digit"] == pytest.approx(counted["a red digit and a blue digit"] / 20_000)
