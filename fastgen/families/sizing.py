"""Which sizes a pipeline draws, one at a time or several with one exported scheduler, and what of it follows the size."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor

from fastgen.errors import UserError, shown
from fastgen.families.base import Family, LatentSpec
from fastgen.families.codec import Codec
from fastgen.families.components import Component


class Sizing(Family):
    """What Pipelined says of sizes. config: the network's; size: (height, width) in pixels; frames: of a video."""

    pack: ClassVar[int] = 1  # latents on a side that `call` packs into channels
    own_size: ClassVar[tuple[int, int] | None] = None  # the call's default height and width; None: what the network's sample_size says
    own_frames: ClassVar[int | None] = None  # of a video's call; None: pictures
    sized: ClassVar[bool] = True  # the call takes height and width
    side_unit: ClassVar[int] = 1  # of which the call wants them to be multiples, whatever its network takes
    gives_sigmas: ClassVar[bool] = False  # the call hands its scheduler mu and evenly spaced times, which the scheduler shifts
    follows_size: bool = False  # whether its exported scheduler shifts by mu, which the call makes of the size
    config: Component
    codec: Codec
    size: tuple[int, int]
    frames: int | None
    _stated_shift: float | None
    _shift: float | None

    def _latent(self) -> LatentSpec:
        height, width = (side // self.pixels_per_latent for side in self.size)
        frames = () if self.frames is None else ((self.frames - 1) // self.codec.frame_stride + 1,)
        return LatentSpec(self.config.option("in_channels") // self.pack**2, (*frames, height, width))

    @property
    def resolution(self) -> int:
        """Pixels on a side of square pictures."""
        return self.size[0]

    @property
    def picture_shape(self) -> tuple[int, ...]:
        return (3, *(() if self.frames is None else (self.frames,)), *self.size)

    @property
    def patch(self) -> int:
        """Latents on a side of the network's own patches, beside what `pack` does."""
        size = _last(self.config, "patch_size")
        return 1 if size is None else size

    def largest_side(self) -> int | None:
        """The most pixels that the network's positions reach; None: any number."""
        return None

    def _size(self, given: Mapping[str, Any]) -> tuple[int, int]:
        """(height, width) in pixels, the pipeline's own where none is given; UserError where its call refuses it."""
        key = "resolution" if "resolution" in given else "size"
        if key in given:
            height, width = (given[key],) * 2 if key == "resolution" else given[key]
        elif self.own_size is not None:
            height, width = self.own_size
        elif (latents := _last(self.config, "sample_size")) is not None:
            sides = self.config.option("sample_size")
            first = sides[0] if isinstance(sides, (list, tuple)) else latents
            height, width = first * self.pixels_per_latent, latents * self.pixels_per_latent
        else:
            raise UserError(f"recipe key teacher.pretrained: its {self.component} has no sample_size; give the recipe key teacher.size")
        for side in (height, width):
            if (allowed := self._allowed(side)) is not None:
                said = f"{side} is not {allowed}" if key in given else f"the pipeline's own, {side}, is not {allowed}; give one"
                raise UserError(f"recipe key teacher.{key}: {said}")
        return height, width

    @property
    def size_unit(self) -> int:
        return math.lcm(self.pixels_per_latent * self.pack * self.patch, self.side_unit)

    def _allowed(self, side: int) -> str | None:
        """What a side of a picture must be, where this one is not."""
        unit, largest = self.size_unit, self.largest_side() or math.inf
        allowed = f"a multiple of {unit}" + ("" if largest == math.inf else f" and at most {largest}")
        return allowed if side % unit or side > largest else None

    def at_sizes(self, sizes: Sequence[Sequence[int]]) -> list[Family]:
        key = "recipe key student.sizes"
        if not self.sized:
            raise UserError(f"{key}: the call of {self.pipeline_classes[0]} takes no height and width, so it draws one size alone")
        made = [self._at(size, f"{key}.{place}") for place, size in enumerate(sizes)]
        shifts = {tuple(family.size): family.shift for family in made}
        follows = len(set(shifts.values())) > 1
        if follows and not self.gives_sigmas:
            (one, a), (other, b) = min(shifts.items(), key=lambda each: each[1]), max(shifts.items(), key=lambda each: each[1])
            raise UserError(
                f"{key}: the teacher's shift follows the size, {a:.4g} at {list(one)} and {b:.4g} at {list(other)}, and {self.pipeline_classes[0]} "
                "hands its scheduler times that cannot follow it; give teacher.shift, one for all sizes"
            )
        for family in made:
            family.follows_size = follows
        return list(made)

    def _at(self, size: Sequence[int], key: str) -> Self:
        for side in size:
            if (allowed := self._allowed(side)) is not None:
                raise UserError(f"{key}: {shown(list(size))}: {side} is not {allowed}")
        other = copy.copy(self)
        height, width = size
        other.size, other._shift, other.several_sizes = (height, width), self._stated_shift, True
        other.latent = other._latent()
        return other

    def _frames(self, given: Mapping[str, Any]) -> int | None:
        """The first frame stands alone in the latents, and each further one of them stands for `frame_stride` more."""
        frames = given.get("frames", self.own_frames)
        if frames is not None and (frames - 1) % self.codec.frame_stride:
            raise UserError(f"recipe key teacher.frames: {frames} is not 1 more than a multiple of {self.codec.frame_stride}")
        return frames

    @property
    def tokens(self) -> int:
        """Of a picture, as the call counts them where its shift goes by their number."""
        return math.prod(self.latent.size) // (self.pack * self.patch) ** 2

    def tokens_of(self, x: Tensor) -> int:
        """Of a picture in a call of the network with latents x (B, C, ..., H, W)."""
        return math.prod(x.shape[2:]) // (self.pack * self.patch) ** 2


def _last(component: Component, key: str) -> Any:
    """An option that is one number or one for each axis; None where it is given as null or its class has none."""
    try:
        value = component.option(key)
    except UserError:
        return None
    return value[-1] if isinstance(value, (list, tuple)) else value
