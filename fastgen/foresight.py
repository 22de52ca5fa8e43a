"""What the stages after training would refuse, checked before anything is loaded, by what they themselves go by."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastgen.config import Recipe, validate
from fastgen.data.encoded import Keeping
from fastgen.data.encoders import of_images, of_prompts, origin_of
from fastgen.data.images import CaptionedImages
from fastgen.data.latents import LatentImages
from fastgen.distillers import distiller_class, distiller_names
from fastgen.errors import UserError
from fastgen.evaluation import unkept
from fastgen.evaluation.block import PROTOCOL, naming_the_key, resources_of
from fastgen.evaluation.protocol import Protocol
from fastgen.evaluation.results import reasons
from fastgen.families import resolve_source
from fastgen.families.base import Family
from fastgen.manifest import OwnSampler, Sampler
from fastgen.second_round import Former, check_guidance, former

_TIMES = 1000  # diffusers tells steps apart by 1000 t, in fp32


def check_sampler(recipe: Recipe, family: Family, able: tuple[Sampler | OwnSampler, ...]) -> None:
    """UserError for a sampler that the stock pipeline does not reproduce, though it should, or that the method's students are not made for (able:
    those that they are), and for one that draws what `euler` does."""
    asked, sampler, method = recipe.student.sampler, recipe.student.stock_sampler, recipe.distiller.name
    if asked not in able:
        raise UserError(f"recipe key student.sampler: {asked}, but {method} trains steps of the {' or '.join(able)} sampler alone")
    if asked == "fixed_noise" and recipe.student.steps == 1:
        raise UserError("recipe key student.sampler: fixed_noise, but a student of one step does not come back to its noise; use euler")
    if sampler not in family.samplers:
        seedless = "hands its scheduler no generator, so no seed would draw a picture twice"
        what = f"{family.pipeline_classes[0]} {seedless if sampler == 'stochastic' else 'renoises'}"
        raise UserError(f"recipe key student.sampler: {sampler}, but {what}; allowed: {', '.join(family.samplers)}")


def check_explicit(recipe: Recipe, family: Family) -> None:
    """UserError for explicit times, a negative prompt and guidance where the pipeline's call takes none."""
    family.check_negative(recipe.teacher.negative_prompt)
    if recipe.teacher.guidance != 1 and not family.takes_guidance:
        what = f"the call of {family.pipeline_classes[0]} has no classifier-free guidance"
        other = "; its network's own is teacher.embedded_guidance" if "embedded_guidance" in family.options else ""
        raise UserError(f"recipe key teacher.guidance: {recipe.teacher.guidance:g}, but {what}; remove it{other}")
    if recipe.student.grid != "auto" and family.exportable and not family.takes_times:
        raise UserError(f"recipe key student.grid: the call of {family.pipeline_classes[0]} takes no explicit times; remove it, or use auto")


def check_second_round(recipe: Recipe, family: Family, *, asked: bool, drawn: bool, steps: int | None = None) -> list[str]:
    """Warnings of what a teacher was not made for that is a student itself; UserError for guidance that it holds already. asked: whether the method
    asks it at times of its own; drawn: whether it draws pairs, in `steps` of its sampler, None for its own."""
    source = recipe.teacher.pretrained
    if not family.exportable:
        return []
    folder = resolve_source(source, recipe.teacher.revision)
    lines, student, told = check_guidance(source, folder, recipe.teacher.guidance), former(folder), recipe.teacher.embedded_guidance
    if student is not None and student.told is not None and told not in (None, student.told):
        lines.append(f"teacher.embedded_guidance: {told:g}, but {source!r} is a student that was trained with {student.told:g} alone; remove it")
    if student is None or _leaves_a_flow(student):
        return lines
    other = steps is not None and steps != student.steps
    grid = torch.tensor(student.grid, dtype=torch.float64)
    reasons = {
        f"{recipe.distiller.name} asks it at other times": asked,
        f"pairs are drawn in {steps}": drawn and other,
        "pairs are drawn at its scheduler's own times, not at its explicit ones": drawn
        and not other
        and not _agree(family.grid(student.steps), grid),
        "pairs are drawn along its flow, which its sampler leaves": drawn and student.sampler != "euler",
    }
    many = f"{student.steps} step{'s' * (student.steps != 1)}"
    made = f"{source!r} is a student that {student.method} made for {many}, and right at the times of these alone"
    return lines + [f"teacher.pretrained: {made}, but {why}" for why, holds in reasons.items() if holds]


def _leaves_a_flow(student: Former) -> bool:
    """Whether its method does, as it was configured; methods of another fastgen are not known, and nothing is said of their students."""
    if student.method not in distiller_names():
        return True
    method = distiller_class(student.method)
    try:
        config = validate(method.Config, {**student.distiller, "name": student.method}, "distiller")
    except UserError:  # of keys that have gone since
        return True
    return method.leaves_a_flow(config)


def check_grid(recipe: Recipe, family: Family) -> None:
    """UserError for a sampling grid that the exported scheduler cannot step on: it has other times, or two that are one when they are rounded."""
    student = recipe.student
    given = None if student.grid == "auto" else list(student.grid)
    times = family.sampling_times(student.steps, given, student.stock_sampler)
    key = f"student.steps: {student.steps} steps with teacher.shift {family.shift:g}" if given is None else f"student.grid: {given}"
    if given is not None and not _agree(times / family.path.t_max, torch.tensor(given, dtype=torch.float64)):
        raise UserError(f"recipe key {key[:200]} cannot be exported: the scheduler would step on {times.tolist()}"[:500])
    if not bool(times.isfinite().all()):
        raise UserError(f"recipe key {key[:200]} cannot be exported: the scheduler's times are not finite at {list(family.picture_shape[-2:])}")
    for a, b in pairwise([*(_TIMES * times.float()).tolist(), 0.0]):
        if a <= b:
            raise UserError(f"recipe key {key[:200]} has two times that are the same in fp32 ({b / _TIMES:.9g}), which no scheduler tells apart")


def _agree(times: Tensor, given: Tensor) -> bool:
    return times.shape == given.shape and bool(torch.allclose(times, given, rtol=1e-6, atol=1e-9))


def check_images(images: CaptionedImages | None, family: Family) -> None:
    """UserError for images where the teacher makes videos or vectors, and for those that come as tensors of another width than the teacher's."""
    if images is not None and len(family.latent.size) > 2:
        how = "distillers that train on prompts are dmd2, tbcm, and scm and rcm with distiller.points: teacher_trajectory"
        raise UserError(f"recipe key data.images: the teacher makes videos, and fastgen does not read videos yet; {how}")
    if images is not None and not family.latent.size:
        how = "train on data.prompts, or on what it draws: data.images may be a folder that fastgen cache pairs has made"
        raise UserError(f"recipe key data.images: the teacher makes vectors of {family.latent.shape[0]} numbers, and pictures are none; {how}")
    if images is not None:
        images.check_size(*family.picture_shape[-2:])


def enlarged(parts: Sequence[CaptionedImages | LatentImages | None], families: Sequence[Family], *, buckets: bool) -> list[str]:
    """A warning where pictures are smaller than what they are made into: how many, and the smallest of them. parts: the images of each size."""
    found: list[tuple[int, str, str]] = []
    for images, family in zip(parts, families, strict=True):
        if isinstance(images, CaptionedImages) and len(family.picture_shape) == 3:
            height, width = family.picture_shape[-2:]
            for i, (tall, wide) in images.enlarged(height, width).items():
                found.append((tall * wide, f"{tall}x{wide}, made {height}x{width}", str(images.sources[i])))
    if not found:
        return []
    total = sum(len(images) for images in parts if images is not None)
    _, sizes, name = min(found)
    way_on = "leave them out, or give smaller student.sizes" if len(families) > 1 or buckets else "leave them out, or give a smaller teacher.size"
    what = f"{len(found)} of {total} pictures are smaller than what they are trained as and are enlarged, which blurs them"
    return [f"data.images: {what}, such as {name!r} ({sizes}); {way_on}"]


def check_store(recipe: Recipe, family: Family, prompts: Collection[str], images: CaptionedImages | LatentImages | None, dtype: torch.dtype) -> None:
    """UserError for a store that cannot take what the run encodes, and for keys that say how something is kept that is not. dtype: of the text
    encoders."""
    block, kept = recipe.data, {"store": recipe.data.store is not None, "keep": recipe.data.keep != "auto", "dtype": recipe.data.dtype != "fp32"}
    pairs = block.pairs_asked
    apart = pairs is not None or isinstance(images, LatentImages)  # kept all the same, as these keys say
    kept = {"store": kept["store"]} if apart else kept
    if block.encode == "online" and (given := [key for key, is_given in kept.items() if is_given]):
        raise UserError(f"recipe key data.{given[0]}: says how encoded data are kept, and with data.encode: online they are not; remove one of them")
    if block.keep != "auto" and block.store is None and (pairs is None or pairs.folder is None) and not isinstance(images, LatentImages):
        raise UserError("recipe key data.keep: says how data.store is read, and there is none; remove it")
    if block.store is None:
        return
    keeping = Keeping(torch.device("cpu"), block, origin_of(family, recipe.teacher, block, dtype))
    keeping.check(of_prompts(family, list(prompts)))
    if isinstance(images, CaptionedImages) and not family.several_sizes:
        keeping.check(of_images(family, images, keeping.device))


def check_stored_images(recipe: Recipe, family: Family, images: CaptionedImages | LatentImages, dtype: torch.dtype, name: str) -> None:
    """The same of the images of one of several sizes, whose store lies in a folder of that name."""
    if isinstance(images, CaptionedImages) and recipe.data.store is not None:
        keeping = Keeping(torch.device("cpu"), recipe.data, origin_of(family, recipe.teacher, recipe.data, dtype)).beside(name)
        keeping.check(of_images(family, images, keeping.device))


def check_measuring(recipe: Recipe, family: Family, protocol: Protocol | None, *, at_the_end: bool, teacher: bool) -> list[str]:
    """UserError where evaluate.protocol cannot measure the student: its pictures have another shape, it has prompts of which the pipeline
    reads nothing, or nothing that it measures can be measured here; warnings of what cannot, a line for each reason. at_the_end: whether the
    student is measured after training, rather than at evaluate.every alone; teacher: whether its teacher is too, which is at the end alone."""
    block = recipe.evaluate
    if protocol is None or not (at_the_end or block.every):
        return []
    _check_shape(recipe, family, protocol)
    texts = dict.fromkeys(text for each in protocol.sets.values() for text in each.prompts)
    unread = family.legibility(list(texts)).check(f"recipe key {PROTOCOL}")
    with naming_the_key():
        missing = unkept.missing_at_start(protocol, resources_of(block), teacher=at_the_end and teacher)
    lines = [*unread, *(f"{PROTOCOL}: {line}" for line in reasons(missing))]
    return lines + (_check_every(recipe, protocol, {each["name"] for each in missing}) if block.every else [])


def _check_shape(recipe: Recipe, family: Family, protocol: Protocol) -> None:
    try:
        protocol.check_image(family.picture_shape, f"recipe key {PROTOCOL}")
    except UserError as error:
        sizes, wanted = recipe.student.sizes or [], protocol.spec.size
        if len(sizes) > 1:
            there = wanted is not None and list(wanted) in [list(size) for size in sizes]
            way_on = f"put {list(wanted or ())} first" if there else "put the one that it measures first, or set evaluate.protocol to null"
            raise UserError(f"{error}: of several sizes the first in student.sizes is measured; {way_on}") from error
        if recipe.data.buckets is not None:
            raise UserError(f"{error}: of the sizes that data.buckets finds the most frequent is measured; type them in student.sizes") from error
        raise


def _check_every(recipe: Recipe, protocol: Protocol, missing: set[str]) -> list[str]:
    """UserError where nothing can be measured before the end; warnings of what cannot, and of a rhythm that training is too short for."""
    every, steps = recipe.evaluate.every, recipe.train.steps
    metrics = {name: metric for name, metric in protocol.metrics(resources_of(recipe.evaluate)).items() if name not in missing}
    waiting = [name for name, metric in metrics.items() if metric.needs().teacher]
    why = f"{', '.join(waiting)} {'needs' if len(waiting) == 1 else 'need'} the teacher's pictures, which are drawn at the end alone"
    if len(waiting) == len(metrics):
        raise UserError(f"recipe key evaluate.every: {why}, so nothing can be measured during training; set it to 0")
    late = f"{every} is more than train.steps, {steps}, so the student is measured at the last step alone"
    return [f"evaluate.every: {line}" for line, holds in ((why, bool(waiting)), (late, every > steps)) if holds]
