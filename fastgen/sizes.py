"""Several sizes of one student, before anything is loaded: which, whether the teacher draws them all, and what a recipe may ask beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastgen.config import Recipe
from fastgen.data import buckets
from fastgen.data.images import CaptionedImages
from fastgen.data.latents import LatentImages
from fastgen.distillers.base import Distiller
from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.base import Family
from fastgen.manifest import MOST_SIZES

KEY = "recipe key student.sizes"
_BUCKETS = "recipe key data.buckets"  # of sizes that come of it


@contextmanager
def _naming(key: str, instead_of: str) -> Iterator[None]:
    """What is refused by another key is by the one that a recipe has."""
    try:
        yield
    except UserError as error:
        if (said := str(error)).startswith(instead_of):
            raise UserError(f"{key}{said.removeprefix(instead_of)}") from error
        raise


def find_teacher(recipe: Recipe, *, planning: bool = False) -> Family:
    """The family of a recipe's teacher, at the first of several sizes. planning: as of `find_family`."""
    teacher, sizes = recipe.teacher, recipe.student.sizes
    if not sizes:
        return find_family(teacher.pretrained, teacher.family, planning=planning, **teacher.options)
    for key in ("size", "resolution"):
        if getattr(teacher, key) is not None:
            raise UserError(f"recipe key teacher.{key}: student.sizes says which sizes are drawn; remove one of them")
    if recipe.data.buckets is not None:
        raise UserError(f"{_BUCKETS}: fills student.sizes, which is given; remove one of them")
    with _naming(f"{KEY}.0: ", instead_of="recipe key teacher.size: "):
        return find_family(teacher.pretrained, teacher.family, planning=planning, **teacher.options, size=sizes[0])


def at_all(recipe: Recipe, family: Family, images: CaptionedImages | LatentImages | None) -> list[Family]:
    """The family at each of a recipe's sizes; none where it has but the teacher's own. images: with data.buckets, those that ask for sizes."""
    if recipe.data.buckets is not None:
        assert isinstance(images, CaptionedImages), "images_of refuses buckets of anything else"

        def fits(size: buckets.Size) -> bool:
            try:
                return bool(family.at_sizes([size]))
            except UserError:
                return False

        *_, height, width = family.picture_shape
        with _naming(_BUCKETS, instead_of=KEY):
            if not fits((height, width)):  # which is the teacher's own, so it is the pipeline that has no other
                family.at_sizes([(height, width)])
            return family.at_sizes(buckets.found(images, (height, width), family.size_unit, fits)[:MOST_SIZES])
    return family.at_sizes(recipe.student.sizes) if recipe.student.sizes else []


def parts_of(images: CaptionedImages | LatentImages | None, families: Sequence[Family]) -> list[CaptionedImages | LatentImages]:
    """The images of each of several sizes; none where there are none."""
    if images is None or not families:
        return []
    if isinstance(images, CaptionedImages):
        return list(buckets.divided(images, [(family.picture_shape[-2], family.picture_shape[-1]) for family in families]))
    if images.parts or len(families) == 1:
        return list(images.parts) or [images]
    raise UserError(
        f"recipe key data.images: these are latents of one size, and student.sizes has {len(families)}; `fastgen cache latents` with these sizes "
        "makes a folder of each"
    )


def check_one_grid(recipe: Recipe, method: type[Distiller], config: Any, grids: Sequence[Tensor]) -> None:
    """UserError where sizes have grids of their own (grids: their times (N,)) and the student can have one alone: its networks divide the times,
    or a second time is folded into its weights. One and the same comes of student.grid, or of a stated teacher.shift."""
    if all(bool((times == grids[0]).all()) for times in grids):
        return
    students = [spec for spec in method.roles_for(config).values() if spec.averaged]
    reasons = {
        "its phases divide one grid": method.phased,
        "its second time is folded into the weights, for one grid": any("second_time" in spec.inputs for spec in students),
        "its sampler's windows have the ends of one grid": recipe.student.own_sampler == "linear_windows",
    }
    if why := next((why for why, holds in reasons.items() if holds), None):
        other = next(place for place, times in enumerate(grids) if not bool((times == grids[0]).all()))
        here, there = ([round(time, 4) for time in grids[place].tolist()] for place in (0, other))
        key = f"{KEY}.{other}" if recipe.data.buckets is None else _BUCKETS
        raise UserError(
            f"{key}: the teacher's shift follows the size, so its grid is {there} where the first has {here}, but of {recipe.distiller.name} "
            f"{why}; give teacher.shift or student.grid, one for all sizes"
        )


def check_pairs(recipe: Recipe, families: Sequence[Family]) -> None:
    """UserError for pairs that cannot be of every size."""
    asked = recipe.data.pairs_asked
    if asked is None or not families:
        return
    if asked.folder is not None and len(families) > 1:
        said = f"{asked.folder!r} holds pairs of one size, and the student has {len(families)}"
        raise UserError(f"recipe key data.pairs: {said}; give a number, and data.store to keep what the teacher draws")
    if asked.count is not None and asked.count < len(families):
        raise UserError(f"recipe key data.pairs: {asked.count} for {len(families)} sizes; each needs one or more")
