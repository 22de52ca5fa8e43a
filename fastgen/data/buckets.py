"""Which of several sizes each training picture is for, and which sizes a set of pictures asks for.

A picture goes to the size that it loses least to: the nearest in aspect, by the ratio of the ratios, and among those of one aspect the nearest
in area. There it is cropped to that aspect and resized, as to a single size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from fastgen.data.images import CaptionedImages
from fastgen.errors import UserError

Size = tuple[int, int]  # height, width

_WIDEST = 2.0  # aspect of the sizes that `found` offers, and 1 / 2 the narrowest
_STEPS = 16  # on a side of the square
_RAREST = 0.02  # share of the pictures below which a size is not worth its batches


def nearest(sizes: Sequence[Size], picture: Size) -> int:
    """The place of the size that a picture (height, width) is for; the first of several that are equally near."""

    def distance(place: int) -> tuple[float, float]:
        (height, width), (tall, wide) = sizes[place], picture
        aspect = abs(math.log(height * wide / (width * tall)))
        return round(aspect, 9), round(abs(math.log(height * width / (tall * wide))), 9)

    return min(range(len(sizes)), key=distance)


def divided(images: CaptionedImages, sizes: Sequence[Size]) -> list[CaptionedImages]:
    """The images of each size, in their own order. UserError for a size that no image is nearest to, so that it would never be trained."""
    places = [nearest(sizes, picture) for picture in images.sizes()]
    for place, size in enumerate(sizes):
        if place not in places:
            raise UserError(f"recipe key student.sizes.{place}: {list(size)} is nearest to none of the {len(images)} images; remove it")
    return [images.chosen([i for i, own in enumerate(places) if own == place]) for place in range(len(sizes))]


def offered(square: Size, unit: int, fits: Callable[[Size], bool]) -> list[Size]:
    """Sizes of about the area of `square`, and no larger one: every aspect between 1:2 and 2:1 in steps of a sixteenth of its side, of which both
    sides are multiples of `unit`. fits: whether the teacher draws a size."""
    area = square[0] * square[1]
    step = max(1, round(math.sqrt(area) / _STEPS / unit)) * unit
    sizes = [square]
    for side in range(step, math.isqrt(int(area * _WIDEST)) + 1, step):
        other = area // side // step * step
        sizes += [(side, other), (other, side)] if other else []
    return [size for size in dict.fromkeys(sizes) if max(size) <= _WIDEST * min(size) and fits(size)]


def found(images: CaptionedImages, square: Size, unit: int, fits: Callable[[Size], bool]) -> list[Size]:
    """The offered sizes that images are nearest to, the most frequent first. Those of fewer than one image in fifty are left out, and their images
    go to the nearest of the others."""
    offers = offered(square, unit, fits)
    counts = Counter(nearest(offers, picture) for picture in images.sizes())
    common = [place for place, count in counts.items() if count >= _RAREST * len(images)]
    chosen = sorted(common or [counts.most_common(1)[0][0]], key=lambda place: (-counts[place], place))
    sizes = [offers[place] for place in chosen]
    left = {nearest(sizes, picture) for picture in images.sizes()}  # which is all of them: an image of one is still nearest to it
    return [size for place, size in enumerate(sizes) if place in left]
