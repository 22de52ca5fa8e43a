"""Error to the teacher: values by hand, and what is no comparison."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastgen.evaluation.extractors.base import Pictures, Resources, feature
from fastgen.evaluation.extractors.thumbnails import Thumbnails
from fastgen.evaluation.metrics.base import Measured
from fastgen.evaluation.metrics.teacher_error import TeacherError
from fastgen.evaluation.protocol import SampleSet
from fastgen.evaluation.tables import Table
from fastgen.evaluation.weights import Unavailable

SET = SampleSet("main", ("a", "b", "c"), (1, 2, 3), chunk=3)
METRIC = TeacherError(TeacherError.Config(), ["main"])


def measured(pixels: Tensor, samples: SampleSet = SET, teacher: Measured | None = None) -> Measured:
    layers = Thumbnails(Thumbnails.Config(), Resources())(Pictures(pixels, samples.prompts), ["rgb", "size"])
    tables = {("main", feature("thumbnails", layer, size=64)): Table(rows) for layer, rows in layers.items()}
    return Measured({"main": samples}, tables, teacher=teacher)


def flat(*values: int, side: int = 8) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, side, side).contiguous()


def test_it_is_the_mean_of_each_pictures_root_mean_square() -> None:
    theirs = flat(0, 100, 255)
    mine = flat(51, 100, 0)
    mine[1, :, :4] = 150  # half of it by 50
    (value,) = METRIC.measure(measured(mine, teacher=measured(theirs)))
    each = [51 / 255, 50 / 255 / 2**0.5, 1.0]
    assert value.value == pytest.approx(sum(each) / 3, rel=1e-12)
    assert (value.name, value.n, value.std_over, value.interval_over) == ("teacher_error", 3, "images", "images")
    scores = METRIC.scores(measured(mine, teacher=measured(theirs)))["teacher_error"]
    torch.testing.assert_close(scores, torch.tensor(each, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_teachers_own_pictures_have_no_error_and_noise_that_nobody_sees_little() -> None:
    """Of large pictures the difference of 8 by 8 pixels is averaged before it is squared."""
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randint(0, 240, (3, 3, 512, 512), generator=generator, dtype=torch.uint8)
    teacher = measured(theirs)
    assert METRIC.measure(measured(theirs, teacher=teacher))[0].value == 0
    noisy = theirs + torch.randint(0, 16, theirs.shape, generator=generator, dtype=torch.uint8)
    error = METRIC.measure(measured(noisy, teacher=teacher))[0].value
    assert error == pytest.approx(7.5 / 255, rel=0.05)  # the shift of 7.5 stays, the spread of 4.6 is divided by 8


def test_many_pictures_are_read_in_blocks() -> None:
    count = 700
    samples = SampleSet("main", ("a",) * count, tuple(range(count)), chunk=count)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    other = pixels.flip(0)
    (value,) = METRIC.measure(measured(pixels, samples, measured(other, samples)))
    wanted = ((pixels.double() - other.double()) / 255).square().flatten(1).mean(1).sqrt().mean()
    assert value.value == pytest.approx(float(wanted), rel=1e-12)


def test_what_is_no_comparison_is_refused() -> None:
    mine = measured(flat(0, 1, 2))
    with pytest.raises(Unavailable, match=r"^needs the teacher's pictures$"):
        METRIC.measure(mine)
    larger = measured(flat(0, 1, 2, side=128))
    with pytest.raises(Unavailable, match=r"the teacher's have 128 x 128 pixels \(width x height\), these have 8 x 8$"):
        METRIC.measure(replace(mine, teacher=larger))
    twice = measured(flat(0, 1, 2, side=256), teacher=larger)  # of the same thumbnails' size
    with pytest.raises(Unavailable, match="compares pictures of one size"):
        METRIC.measure(twice)
    for other in (replace(SET, seeds=(1, 2, 4)), replace(SET, prompts=("a", "b", "d")), SET.head(2)):
        with pytest.raises(Unavailable, match=r"^needs the teacher's pictures of the same prompts and seeds, the set main$"):
            METRIC.measure(replace(mine, teacher=measured(flat(*range(len(other))), other)))
    with pytest.raises(Unavailable, match="of the same prompts and seeds"):
        METRIC.measure(replace(mine, teacher=Measured({}, {})))
