"""What `fastgen cache` makes once for several runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen import conditioning, foresight, group
from fastgen.conditioning import Conditioning
from fastgen.config import Recipe
from fastgen.data.encoded import Encoder, Keeping
from fastgen.data.encoders import of_images, of_prompts
from fastgen.data.images import CaptionedImages, images_of
from fastgen.data.latents import LatentImages
from fastgen.data.pair_folder import check_unused, kept_before, open_folder
from fastgen.data.pairs import Solver, TeacherSampler
from fastgen.data.prompts import load_prompts
from fastgen.data.remote import fetch, is_remote
from fastgen.data.store import DTYPES, Kind, Store
from fastgen.data.training import prompt_weights
from fastgen.errors import UserError
from fastgen.families.base import Family
from fastgen.generator import ImageGenerator, teacher_family
from fastgen.group import Alone
from fastgen.parallel import own_device
from fastgen.plan import autocast_of, check_pictures, check_texts, drawing, frozen_dtype_of, pinned, plan, storage_of
from fastgen.progress import Progress
from fastgen.roles import build_roles, frozen
from fastgen.run.agreement import agree, by_key
from fastgen.run.building import image_keepings, keeping_of
from fastgen.sampling import Predict


def cache_pairs(
    recipe: Recipe,
    output: Path,
    *,
    count: int | None = None,
    steps: int | None = None,
    solver: Solver = "euler",
    source: Literal["noise", "data"] = "noise",
    part: tuple[int, int] = (0, 1),
    batch: int | None = None,
    progress: Progress | None = None,
) -> tuple[Store, int]:
    """Draw noise-sample pairs from a recipe's guided teacher into the folder `output`/pairs; returns the store and how many pairs are new.

    Of the recipe it takes teacher, data, train.seed, train.precision and train.device. source: `noise`, whose samples are drawn, or `data`, the
    images, for each of which the noise is sought that the unguided teacher's ODE leads to. count: unless stated what the folder was begun for, or
    10,000; of data, all. steps: by default the teacher's own; batch: by default what training takes at once. part: as for `cache_encoded`. A store
    of the same drawing is continued, also to a larger count. UserError before anything is written.
    """
    how: Any = {"count": count, "steps": steps, "solver": solver, "source": source, "batch": batch}
    with _members(recipe, part, how) as members:
        return _cache_pairs(recipe, output, **how, part=part, members=members, progress=_told(progress, members))


def _cache_pairs(
    recipe: Recipe,
    output: Path,
    *,
    count: int | None,
    steps: int | None,
    solver: Solver,
    source: Literal["noise", "data"],
    batch: int | None,
    part: tuple[int, int],
    members: Alone,
    progress: Progress,
) -> tuple[Store, int]:
    recipe = pinned(recipe)
    if given := [key for key, value in {"student.sizes": recipe.student.sizes, "data.buckets": recipe.data.buckets}.items() if value is not None]:
        said = "a folder holds pairs of one size; give teacher.size in its place, or have a run draw them of every size (data.pairs: a number)"
        raise UserError(f"recipe key {given[0]}: {said}")
    images = images_of(recipe.data)
    if recipe.data.prompts is None and images is None:
        raise UserError("recipe key data.prompts: missing; pairs are drawn for prompts, or for the captions of data.images")
    _check_source(recipe, source, images, count)
    prompts = prompt_weights(None if images else load_prompts(str(recipe.data.prompts)), images)
    check_unused(output)
    block, device, at_once = recipe.teacher, own_device(recipe.train.device), batch or recipe.train.at_once
    family = teacher_family(block.pretrained, block.family, **block.options)
    second = foresight.check_second_round(recipe, family, asked=False, drawn=True, steps=steps)
    for warning in (*second, *(images.warnings if images else ()), *check_texts(recipe, family, prompts)):
        progress.warn(f"warning: {warning}")
    if source == "data":
        check_pictures(images, recipe, family)
    by_content = None if source == "noise" or images is None else images.content()
    how = drawing(recipe, family, prompts, steps, solver, by_content)
    data = recipe.data.model_copy(update={"store": str(output), "keep": "auto", "encode": "ahead"})
    keeping = Keeping(device, data, members=members).of_pairs()

    @functools.cache
    def sampler() -> TeacherSampler:
        progress.stage(f"loading {block.pretrained}")
        return how.sampler(_guided(recipe, family, device), device)

    def encode(texts: Sequence[str]) -> Conditioning:
        return _encode(family, texts)

    family.encode_with(device, DTYPES[frozen_dtype_of(recipe)])
    if source == "noise":
        begun = kept_before(output / "pairs")
        encoder = how.of_noise(sampler, encode, max(count or begun or 10_000, begun), at_once)
        keeping.check(encoder)
        if count is not None:
            _check_begun(output, count)
    else:
        assert images is not None
        encoder = how.of_data(sampler, encode, _latents(images, family, keeping, device, at_once, progress), images.captions, at_once)
        keeping.check(encoder)
    return _filled(keeping, encoder, part, progress)


def _guided(recipe: Recipe, family: Family, device: torch.device) -> Predict:
    """The recipe's teacher with its guidance, its weights held and computed with as in a run."""
    block = recipe.teacher
    held = build_roles(
        {"teacher": frozen()},
        family,
        family.load_backbone(),
        autocast=autocast_of(recipe),
        storage=storage_of(recipe),
        device=device,
        offloaded=block.offload,
    )
    network, steps = held.predictors()["teacher"], family.own_call["num_inference_steps"]
    return ImageGenerator(family, network, steps=steps, guidance=block.guidance, negative_prompt=block.negative_prompt, device=device).predict


def _check_begun(output: Path, count: int) -> None:
    """UserError for fewer pairs than a folder was begun for and does not hold yet."""
    begun = kept_before(output / "pairs")
    if count < begun and (held := open_folder(output).held()) < begun:
        raise UserError(
            f"--count: {count}, but {str(output)!r} was begun for {begun} pairs and holds {held}; finish it, use its first with data.pairs.count, "
            "or choose another folder"
        )


def _check_source(recipe: Recipe, source: str, images: CaptionedImages | LatentImages | None, count: int | None) -> None:
    if source == "noise":
        return
    if images is None:
        raise UserError("recipe key data.images: missing; --from data seeks the noise of images")
    if recipe.teacher.guidance != 1:
        raise UserError(
            f"recipe key teacher.guidance: {recipe.teacher.guidance:g}, but only the unguided teacher's flow leads from data to noise; "
            "--from data needs teacher.guidance=1"
        )
    if recipe.data.skip_broken and isinstance(images, CaptionedImages):
        raise UserError("recipe key data.skip_broken: --from data makes a pair of every image; take out those that are broken")
    if count is not None and count != len(images):
        raise UserError(f"--count: {count}, but --from data makes a pair of every image, and there are {len(images)}")


def _latents(
    images: CaptionedImages | LatentImages, family: Family, keeping: Keeping, device: torch.device, batch: int, progress: Progress
) -> Callable[[Sequence[int]], Tensor]:
    """Latents (B, *shape) of images by their numbers."""
    if isinstance(images, LatentImages):
        rows = images.latents(keeping, progress)
        return lambda ids: rows.select(torch.tensor(ids))["latents"]
    encoder = of_images(family, images, device, batch)
    return lambda ids: encoder.encode(ids).tensors["latents"]


def cache_encoded(
    kind: Kind, recipe: Recipe, output: Path, *, part: tuple[int, int] = (0, 1), progress: Progress | None = None
) -> list[tuple[Store, int]]:
    """Encode a recipe's prompts or images into the folder `output`, for data.store; returns the store and how many of its rows are new, of images
    of several sizes those of each, in a folder `HxW` of its own.

    Archives that lie elsewhere are fetched into `output/archives` first, which nothing needs afterwards.
    part: i of n, from 0 on, whose shards alone are made; the whole is the same whoever makes which. What is there already is read and kept, and
    made again where it is broken. UserError before anything is written.
    """
    with _members(recipe, part) as members:
        return _encoded_by(kind, recipe, output, part, members, _told(progress, members))


def _encoded_by(kind: Kind, recipe: Recipe, output: Path, part: tuple[int, int], members: Alone, progress: Progress) -> list[tuple[Store, int]]:
    kept_in: dict[str, Any] = {"store": str(output), "keep": "auto", "encode": "ahead"}
    if kind == "latents" and recipe.data.images is not None and is_remote(recipe.data.images):
        remote = recipe.data.images
        kept_in["images"] = members.told(lambda: str(fetch(remote, output / "archives", progress)))
    alone = {"shard": "auto", "mesh": None}  # how training spreads, which is not begun here
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=kept_in), "train": recipe.train.model_copy(update=alone)})
    planned = plan(recipe, only="train", processes=1)
    for warning in planned.warnings:
        progress.warn(f"warning: {warning}")
    if kind == "latents" and not isinstance(planned.images, CaptionedImages):
        why = "missing" if planned.images is None else f"{recipe.data.images!r} holds latents already"
        raise UserError(f"recipe key data.images: {why}; there are no pictures to encode")
    device, batch = own_device(recipe.train.device), recipe.train.at_once
    planned.family.encode_with(device, planned.frozen_dtype)
    if kind == "prompts":
        encoder = of_prompts(planned.family, list(prompt_weights(planned.prompts, planned.images)), batch)
        return [_filled(keeping_of(planned, device, members), encoder, part, progress)]
    made = []
    for family, images, keeping in zip(planned.families, planned.divided or [planned.images], image_keepings(planned, device, members), strict=True):
        assert isinstance(images, CaptionedImages)
        made.append(_filled(keeping, of_images(family, images, device, batch), part, progress))
    return made


@contextmanager
def _members(recipe: Recipe, part: tuple[int, int], how: Mapping[str, object] = MappingProxyType({})) -> Iterator[Alone]:
    """The processes that fill a store together, each a part of it. how: what they are given beside the recipe. UserError where that differs, or where
    they are one part together."""
    with group.joined() as members:
        if members.world_size > 1 and part != (0, 1):
            raise UserError(f"--part: the {members.world_size} processes that the launcher started take a part each; leave it out")
        agree(members, {**by_key(recipe.dump()), **how})
        yield members


def _told(progress: Progress | None, members: Alone) -> Progress:
    return progress if progress is not None and members.is_main else Progress()


def _filled(keeping: Keeping, encoder: Encoder, part: tuple[int, int], progress: Progress) -> tuple[Store, int]:
    several = keeping.members.world_size > 1
    kept, new = keeping.fill_together(encoder, progress, thorough=True) if several else keeping.fill(encoder, progress, part, thorough=True)
    for place, why in (kept.left_out() if not kept.missing() else {}).items():
        progress.warn(f"warning: recipe key data.images: image {place} is left out: {why}")
    return kept, new


def _encode(family: Family, prompts: Sequence[str]) -> Conditioning:
    """Each distinct prompt of a batch once; kept no longer, for thousands of prompts of a large teacher fill the memory."""
    distinct = list(dict.fromkeys(prompts))
    row = {prompt: i for i, prompt in enumerate(distinct)}
    return conditioning.select(family.encode_prompts(distinct), torch.tensor([row[prompt] for prompt in prompts]))
