"""What the stages after training would refuse, checked before anything is loaded, by what they themselves go by."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastgen.config import EvaluateBlock, Recipe
from fastgen.data.images import CaptionedImages
from fastgen.errors import UserError
from fastgen.evaluation import unkept
from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.protocol import load_protocol
from fastgen.evaluation.weights import Weights
from fastgen.families.base import Family
from fastgen.files import expanded
from fastgen.manifest import Sampler

_TIMES = 1000  # diffusers tells steps apart by 1000 t, in fp32


def check_sampler(recipe: Recipe, family: Family, able: tuple[Sampler, ...]) -> None:
    """UserError for a sampler that the stock pipeline does not reproduce, or that the method's students are not made for (able: those that
    they are)."""
    sampler, method = recipe.student.sampler, recipe.distiller.name
    if sampler not in able:
        raise UserError(f"recipe key student.sampler: {sampler}, but {method} trains steps of the {' or '.join(able)} sampler alone")
    if sampler not in family.samplers:
        what = f"{family.pipeline_classes[0]} hands its scheduler no generator, so no seed would draw a picture twice"
        raise UserError(f"recipe key student.sampler: {sampler}, but {what}; allowed: {', '.join(family.samplers)}")


def check_explicit(recipe: Recipe, family: Family) -> None:
    """UserError for explicit times, and for a negative prompt, where the pipeline's call takes none."""
    family.check_negative(recipe.teacher.negative_prompt)
    if recipe.student.grid != "auto" and family.exportable and not family.takes_times:
        raise UserError(f"recipe key student.grid: the call of {family.pipeline_classes[0]} takes no explicit times; remove it, or use auto")


def check_grid(recipe: Recipe, family: Family) -> None:
    """UserError for a sampling grid that the exported scheduler cannot step on: it has other times, or two that are one when they are rounded."""
    student = recipe.student
    given = None if student.grid == "auto" else list(student.grid)
    times = family.sampling_times(student.steps, given, student.sampler)
    key = f"student.steps: {student.steps} steps with teacher.shift {family.shift:g}" if given is None else f"student.grid: {given}"
    if given is not None and not _agree(times / family.path.t_max, torch.tensor(given, dtype=torch.float64)):
        raise UserError(f"recipe key {key[:200]} cannot be exported: the scheduler would step on {times.tolist()}"[:500])
    for a, b in pairwise([*(_TIMES * times.float()).tolist(), 0.0]):
        if a <= b:
            raise UserError(f"recipe key {key[:200]} has two times that are the same in fp32 ({b / _TIMES:.9g}), which no scheduler tells apart")


def _agree(times: Tensor, given: Tensor) -> bool:
    return times.shape == given.shape and bool(torch.allclose(times, given, rtol=1e-6, atol=1e-9))


def check_images(images: CaptionedImages | None, family: Family) -> None:
    """UserError for images where the teacher makes videos, and for those that come as tensors of another width than the teacher's."""
    if images is not None and len(family.latent.size) > 2:
        how = "distillers that train on prompts are dmd2, tbcm, and scm and rcm with distiller.points: teacher_trajectory"
        raise UserError(f"recipe key data.images: the teacher makes videos, and fastgen does not read videos yet; {how}")
    if images is not None and family.latent.size:
        images.check_size(*family.picture_shape[-2:])


def check_measuring(recipe: Recipe, family: Family, *, at_the_end: bool) -> list[str]:
    """UserError where evaluate.protocol cannot measure the student: its pictures have another shape, it has prompts of which the pipeline
    reads nothing, or nothing that it measures can be measured here; warnings of what cannot. at_the_end: whether the student is measured
    after training, rather than at evaluate.every alone."""
    if recipe.evaluate.protocol is None or not (at_the_end or recipe.evaluate.every):
        return []
    protocol = load_protocol(recipe.evaluate.protocol, data_dir=recipe.evaluate.data_dir)
    protocol.check_image(family.picture_shape, "recipe key evaluate.protocol")
    texts = dict.fromkeys(text for each in protocol.sets.values() for text in each.prompts)
    family.legibility(list(texts)).check("recipe key evaluate.protocol")
    missing = unkept.missing_at_start(protocol, resources_of(recipe.evaluate))
    return [f"evaluate.protocol: {each['name']} will not be measured: {each['reason']}" for each in missing]


def resources_of(block: EvaluateBlock) -> Resources:
    """What a recipe's evaluation is built from."""
    weights, data = (None if given is None else expanded(given) for given in (block.weights_dir, block.data_dir))
    return Resources(weights=Weights(weights), data_dir=data)
