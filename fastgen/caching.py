"""What `fastgen cache` makes once for several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastgen import conditioning
from fastgen.conditioning import Conditioning
from fastgen.config import Recipe
from fastgen.data.encoded import of_images, of_prompts
from fastgen.data.images import CaptionedImages, images_of
from fastgen.data.pair_folder import Manifest, PairFolder, create_folder
from fastgen.data.pairs import Solver, TeacherSampler
from fastgen.data.prompts import load_prompts
from fastgen.data.remote import fetch, is_remote
from fastgen.data.store import Kind, Store
from fastgen.data.training import prompt_weights
from fastgen.errors import UserError
from fastgen.families import source_hash
from fastgen.families.base import Family
from fastgen.generator import load_teacher
from fastgen.parallel import choose_device
from fastgen.plan import check_texts, pinned, plan, resolved_teacher
from fastgen.progress import Progress
from fastgen.run.building import keeping_of


def cache_pairs(
    recipe: Recipe,
    output: Path,
    *,
    count: int,
    steps: int | None = None,
    solver: Solver = "euler",
    batch: int | None = None,
    progress: Progress | None = None,
) -> tuple[PairFolder, int]:
    """Draw noise-sample pairs from a recipe's guided teacher into the folder `output`; returns it and how many pairs are new.

    Of the recipe it takes teacher, data, train.seed and train.device. steps: by default the teacher's own; batch: by
    default what training takes at once. A folder of the same drawing is
    continued, also to a larger count. UserError before anything is written.
    """
    progress, recipe = progress or Progress(), pinned(recipe)
    images = images_of(recipe.data)
    if recipe.data.prompts is None and images is None:
        raise UserError("recipe key data.prompts: missing; pairs are drawn for prompts, or for the captions of data.images")
    prompts = prompt_weights(None if images else load_prompts(str(recipe.data.prompts)), images)
    block = recipe.teacher
    teacher = load_teacher(
        block.pretrained,
        family=block.family,
        steps=steps,
        guidance=block.guidance,
        negative_prompt=block.negative_prompt,
        device=choose_device(recipe.train.device),
        **block.options,
    )
    for warning in (*(images.warnings if images else ()), *check_texts(recipe, teacher.family, prompts)):
        progress.warn(f"warning: {warning}")
    sampler = TeacherSampler(teacher.predict, teacher.times().to(teacher.device), teacher.family.latent.shape, solver)
    described = resolved_teacher(recipe) | {"sha256": source_hash(block.pretrained, block.revision)}
    manifest = Manifest.describe(sampler, described, prompts, seed=recipe.train.seed, count=count)
    folder = create_folder(output, manifest)
    progress.start("drawing pairs", folder.manifest.count, held := folder.held())
    try:
        folder.complete(
            sampler,
            lambda texts: _encode(teacher.family, texts),
            prompts,
            batch=batch or recipe.train.at_once,
            progress=lambda done: progress.update(done, {}),
        )
    finally:  # a bar left running hides the terminal's cursor
        progress.finish()
    return folder, folder.manifest.count - held


def cache_encoded(kind: Kind, recipe: Recipe, output: Path, *, part: tuple[int, int] = (0, 1), progress: Progress | None = None) -> tuple[Store, int]:
    """Encode a recipe's prompts or images into the folder `output`, for data.store; returns the store and how many of its rows are new.

    Archives that lie elsewhere are fetched into `output/archives` first, which nothing needs afterwards.
    part: i of n, from 0 on, whose shards alone are made; the whole is the same whoever makes which. What is there already is read and kept, and
    made again where it is broken. UserError before anything is written.
    """
    progress = progress or Progress()
    kept_in: dict[str, Any] = {"store": str(output), "keep": "auto", "encode": "ahead"}
    if kind == "latents" and recipe.data.images is not None and is_remote(recipe.data.images):
        kept_in["images"] = str(fetch(recipe.data.images, output / "archives", progress))
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=kept_in)})
    planned = plan(recipe, only="train")
    for warning in planned.warnings:
        progress.warn(f"warning: {warning}")
    if kind == "latents" and not isinstance(planned.images, CaptionedImages):
        why = "missing" if planned.images is None else f"{recipe.data.images!r} holds latents already"
        raise UserError(f"recipe key data.images: {why}; there are no pictures to encode")
    keeping, batch = keeping_of(planned, choose_device(recipe.train.device)), recipe.train.at_once
    planned.family.encode_with(keeping.device, planned.frozen_dtype)
    if kind == "latents":
        assert isinstance(planned.images, CaptionedImages)
        encoder = of_images(planned.family, planned.images, keeping.device, batch)
    else:
        encoder = of_prompts(planned.family, list(prompt_weights(planned.prompts, planned.images)), batch)
    kept, new = keeping.fill(encoder, progress, part, thorough=True)
    for place, why in (kept.left_out() if not kept.missing() else {}).items():
        progress.warn(f"warning: recipe key data.images: image {place} is left out: {why}")
    return kept, new


def _encode(family: Family, prompts: Sequence[str]) -> Conditioning:
    """Each distinct prompt of a batch once; kept no longer, for thousands of prompts of a large teacher fill the memory."""
    distinct = list(dict.fromkeys(prompts))
    row = {prompt: i for i, prompt in enumerate(distinct)}
    return conditioning.select(family.encode_prompts(distinct), torch.tensor([row[prompt] for prompt in prompts]))
